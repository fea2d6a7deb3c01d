"""Compile every kernel for every GPU, without a GPU, and hold its machine code to its budget.

    python -m kernels.aot [--csv FILE] [--plot FILE] [--peers] [--targets sm_80,sm_90] [--jobs N] [pattern …]

A pattern selects by kernel ("nf4_dequantize") or by kernel and configuration ("nf4_dequantize/b64-*"). The `CASES` of
the files in kernels/triton/ (see case.py there) name configurations and budgets. Each case is compiled as its launcher
launches it (`compiler.py`). `machine_code.py` says how instructions are counted, `roofline.py` how fast a GPU can be at
most. The command exits with 1, naming kernel, configuration and target, if a case does not compile, spills registers,
needs more shared memory than the GPU has, or is over its budget. Instruction and register budgets are for NVIDIA GPUs.
Of AMD code, registers, spills and shared memory (LDS) are checked against the hardware; the rest is reported only.

It is static cost: the work that a kernel gives a GPU, not its speed there. `kernels.bench` measures that.
"""
