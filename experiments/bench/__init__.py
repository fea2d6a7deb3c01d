"""This project and PEFT + bitsandbytes side by side on a CPU: seconds a training step, memory, generation.

    python -m experiments.bench_cpu        or: make bench-cpu

Each side runs in a process of its own; their steps alternate, so that a busy moment hits both. They start from the
same weights and see the same tokens. A ratio is printed only if their losses agree step for step.
"""
