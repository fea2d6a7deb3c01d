"""Compile every kernel for every GPU, without a GPU, and hold its machine code to its budget.

    python -m kernels.aot [--csv FILE] [--plot FILE] [--peers] [--targets sm_80,sm_90] [--jobs N] [pattern …]

A pattern selects by kernel ("nf4_dequantize") or by kernel and configuration ("nf4_dequantize/b64-*"). Configurations
and budgets are the `AOT_SPECS` of the kernel files (see ../spec.py), `machine_code.py` says how instructions are
counted, `roofline.py` what a GPU can do. Exits with 1, naming kernel, configuration and target, if one does not
compile, spills registers, needs more shared memory than the GPU has, or is over its budget. Instruction and register
budgets are for NVIDIA GPUs; of AMD code registers, spills and shared memory (LDS) are checked against the hardware and
the rest is reported only.

It is static cost: what a kernel asks of a GPU, not how fast it runs there. `kernels.bench` measures that.
"""
