"""The column of Triton kernels, for CUDA tensors: files and functions have the names of the ops that they compute.

launch.py launches them all. The other files without an op of their name hold kernels that several ops share.
"""
