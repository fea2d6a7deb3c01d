"""This project beside PEFT + bitsandbytes, unsloth and Liger: training steps, memory, generation.

    python -m experiments.bench            on a GPU the targets of this project, on a CPU `make bench-cpu`

Each side runs in a process of its own; their steps alternate, so that a busy moment hits all. They start from the same
weights and see the same tokens. A ratio is printed only if their losses agree step for step.
"""
