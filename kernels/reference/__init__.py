"""The column of plain torch: the definition of every op, and the oracle of its tests.

A file here has the name of the op's file in kernels/, a function the name and the arguments of the op (see there for
shapes and formats). It knows of no other column.
"""
