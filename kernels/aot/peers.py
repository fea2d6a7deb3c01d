"""bitsandbytes' machine code, from the installed package, counted by the same rule as ours.

Its CUDA library is disassembled. Its Triton kernels, which it has for Intel GPUs, are compiled for NVIDIA's. No other
library has such kernels: unsloth calls bitsandbytes', PEFT's DoRA norm consists of torch operations.
"""

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels.aot import cubin, machine_code
from kernels.aot.compiler import Row, compile_all, row_of
from kernels.aot.targets import TARGETS
from kernels.triton.case import Case, meta
from kernels.triton.launch import launch


@dataclass(frozen=True)
class _CudaKernel:
    """A kernel of the CUDA library as it is launched for our configuration `config`.

    A block has `threads` threads, and each of them handles `values` values: bitsandbytes 0.50, csrc/kernels.cu and
    csrc/ops.cu.
    """

    kernel: str
    config: str
    symbol: str
    threads: int
    values: int
    bytes_per_value: float
    launches: int


_FP32_ABSMAX = 4 / 64
_CUDA = (
    _CudaKernel(
        "nf4_dequantize",
        "b64-bf16",
        "_Z20kDequantizeBlockwiseI13__nv_bfloat16Li512ELi64ELi8ELi2EEvPfPhS1_PT_ii",
        threads=64,
        values=16,
        bytes_per_value=0.5 + 2 + _FP32_ABSMAX,
        launches=3,  # double quantization: first absmax is dequantized, then its mean is added
    ),
    _CudaKernel(
        "nf4_quantize",
        "b64-bf16",
        "_Z23kQuantizeBlockwiseSmallI13__nv_bfloat16Li64ELi2EEvPfPT_S1_PhS1_ii",
        threads=32,
        values=2,
        bytes_per_value=2 + 0.5 + _FP32_ABSMAX,
        launches=1,
    ),
    _CudaKernel(
        "adamw8bit",
        "fp32",
        "_Z35kOptimizerStatic8bit2StateBlockwiseIfLi0ELi256ELi1EEvPT_S1_PhS2_fffffifPfS3_S3_S3_ffbi",
        threads=256,
        values=1,
        bytes_per_value=16 + 4 * 4 / 256,
        launches=1,  # a tensor
    ),
)


def peers(kernels: set[str], targets: list[str], jobs: int) -> tuple[list[tuple[Case, Row]], list[str]]:
    """(bitsandbytes' counterparts of `kernels`, lines about their origin and about those that are left out)."""
    if not (package := importlib.util.find_spec("bitsandbytes")):
        return [], ["left out: bitsandbytes is not installed"]
    found, notes = [], []
    libraries = sorted(Path(package.origin).parent.glob("libbitsandbytes_cuda*.so"))
    if libraries:
        notes.append(f"bitsandbytes {importlib.metadata.version('bitsandbytes')}, {libraries[-1].name}")
    else:
        notes.append("left out: bitsandbytes is installed without its CUDA library")
    for target in (name for name in targets if TARGETS[name].nvidia and TARGETS[name].bf16):
        if libraries:
            try:
                found += _from_library(libraries[-1], target)
            except (FileNotFoundError, ValueError) as error:
                notes.append(f"left out: bitsandbytes-cuda on {target}: {error}")
        cases = _triton_cases()
        for case, row in zip(cases, compile_all(cases, target, jobs)):
            if isinstance(row, Row):
                found.append((case, row))
            else:
                notes.append(f"left out: {case.config} on {target}: {type(row).__name__}: {row}")
    return [(case, row) for case, row in found if row.kernel in kernels], notes


def _from_library(library: Path, target: str) -> list[tuple[Case, Row]]:
    image = cubin.extract(library, target)
    texts = [cubin.text_section(image, peer.symbol) for peer in _CUDA]
    rows = []
    for peer, listing in zip(_CUDA, cubin.disassemble(texts, TARGETS[target].gpu.arch)):
        code, used = machine_code.parse_sass(listing), cubin.usage(image, peer.symbol)
        case = Case(
            kernel=peer.kernel,
            config=f"bitsandbytes-cuda-{peer.config}",
            call=lambda: None,  # not a Triton kernel: there is nothing to compile
            fn=None,
            values=peer.threads * peer.values,
            bytes_per_value=peer.bytes_per_value,
            launches=peer.launches,
        )
        spilled = max(used.stack_bytes, machine_code.spilled_bytes(code))
        row = row_of(case, target, code, peer.threads // 32, used.registers, spilled, used.shared_bytes)
        rows.append((case, row))
    return rows


def _triton_cases() -> list[Case]:
    """Its Triton kernels as backends/triton/ops.py launches them: for a bf16 weight at blocksize 64, for fp32 AdamW."""
    from bitsandbytes.backends.triton import kernels_4bit, kernels_optim

    n, blocksize, split_bytes, split_blocks = 4096 * 4096, 64, 256, 4
    w, packed, absmax = meta(n, dtype="bf16"), meta(n // 2, dtype=torch.uint8), meta(n // blocksize)
    p, codes, code_map, codes_absmax = meta(n), meta(n, dtype=torch.uint8), meta(256), meta(n // 256)

    def launched(kernel, **arguments) -> dict:
        # one program will do: the grid is not a part of the machine code
        return {"fn": kernel, "call": lambda: launch(kernel, (1,), **arguments, fp_fusion=True)}

    return [
        Case(
            kernel="nf4_dequantize",
            config="bitsandbytes-triton-b64-bf16",
            **launched(
                kernels_4bit.dequant_nf4_kernel,
                a_ptr=packed, c_ptr=w, absmax_ptr=absmax, num_paired_elements=n // 2, num_output_elements=n,
                QUANT_BLOCK=blocksize, SPLIT_SIZE=split_bytes,
            ),
            values=2 * split_bytes,
            bytes_per_value=_CUDA[0].bytes_per_value,
            launches=3,
        ),
        Case(
            kernel="nf4_quantize",
            config="bitsandbytes-triton-b64-bf16",
            **launched(
                kernels_4bit.quantize_nf4_blockwise_kernel,
                A_ptr=w, absmax_ptr=absmax.bfloat16(), out_ptr=packed, n_elements=n, absmax_elements=n // blocksize,
                BLOCK_SIZE=blocksize, SPLIT_NUM_BLOCKS=split_blocks,
            ),
            values=2 * split_blocks * blocksize,
            bytes_per_value=2 + 0.5 + 2 / blocksize,
            launches=2,  # absmax comes in bf16 and is then converted
        ),
        Case(
            kernel="adamw8bit",
            config="bitsandbytes-triton-fp32",
            **launched(
                kernels_optim._optimizer_update_2state_8bit_blockwise_triton_kernel,
                p_ptr=p, g_ptr=p, state1_ptr=codes, state2_ptr=codes, beta1=0.9, beta2=0.999, beta3=0.0, alpha=0.0,
                eps=1e-8, step=3, beta1_step=0.1, beta2_step=0.001, lr=1e-3, qmap1_ptr=code_map, qmap2_ptr=code_map,
                absmax1_ptr=codes_absmax, absmax2_ptr=codes_absmax, weight_decay=0.01, gnorm_scale=1.0, n_elements=n,
                BLOCK_SIZE_N=256, N_PER_TH=1, OPTIMIZER_ID=kernels_optim.ADAM, num_warps=2,
            ),
            values=256,
            bytes_per_value=_CUDA[2].bytes_per_value,
        ),
    ]  # fmt: skip
