"""bitsandbytes' machine code, from the installed package, counted by the same rule as ours.

Its CUDA library is disassembled, its Triton kernels (with which it serves Intel GPUs) are compiled for NVIDIA's. Other
libraries' kernels are not to be had here: unsloth calls bitsandbytes', PEFT's DoRA norm is torch operations.
"""

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from kernels.aot import cubin, machine_code
from kernels.aot.compiler import Row, compile_all, row_of
from kernels.aot.targets import TARGETS
from kernels.spec import KernelSpec


@dataclass(frozen=True)
class _CudaKernel:
    """A kernel of the CUDA library as it is launched for the configuration of ours that `config` names.

    values are those of one of its `threads`; bitsandbytes 0.50, csrc/kernels.cu and csrc/ops.cu.
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


def peers(kernels: set[str], targets: list[str], jobs: int) -> tuple[list[tuple[KernelSpec, Row]], list[str]]:
    """(what of bitsandbytes does the same as `kernels`, lines about where it is from and what could not be had)."""
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
        specs = _triton_specs()
        for spec, row in zip(specs, compile_all(specs, target, jobs)):
            if isinstance(row, Row):
                found.append((spec, row))
            else:
                notes.append(f"left out: {spec.config} on {target}: {type(row).__name__}: {row}")
    return [(spec, row) for spec, row in found if row.kernel in kernels], notes


def _from_library(library: Path, target: str) -> list[tuple[KernelSpec, Row]]:
    image = cubin.extract(library, target)
    texts = [cubin.text_section(image, peer.symbol) for peer in _CUDA]
    rows = []
    for peer, listing in zip(_CUDA, cubin.disassemble(texts, TARGETS[target].gpu.arch)):
        code, used = machine_code.parse_sass(listing), cubin.usage(image, peer.symbol)
        spec = KernelSpec(
            kernel=peer.kernel,
            config=f"bitsandbytes-cuda-{peer.config}",
            fn=None,  # not Triton's
            signature={},
            constexprs={},
            values=peer.threads * peer.values,
            bytes_per_value=peer.bytes_per_value,
            num_warps=peer.threads // 32,
            launches=peer.launches,
        )
        spilled = max(used.stack_bytes, machine_code.spilled_bytes(code))
        rows.append((spec, row_of(spec, target, code, used.registers, spilled, used.shared_bytes)))
    return rows


def _triton_specs() -> list[KernelSpec]:
    """Its Triton kernels as backends/triton/ops.py launches them: for a bf16 weight at blocksize 64, for fp32 AdamW."""
    from bitsandbytes.backends.triton import kernels_4bit, kernels_optim

    split_bytes, split_blocks = 256, 4
    return [
        KernelSpec(
            kernel="nf4_dequantize",
            config="bitsandbytes-triton-b64-bf16",
            fn=kernels_4bit.dequant_nf4_kernel,
            signature={"a_ptr": "*u8", "c_ptr": "*bf16", "absmax_ptr": "*fp32"}
            | dict.fromkeys(("num_paired_elements", "num_output_elements"), "i32"),
            constexprs={"QUANT_BLOCK": 64, "SPLIT_SIZE": split_bytes},
            values=2 * split_bytes,
            bytes_per_value=_CUDA[0].bytes_per_value,
            launches=3,
            num_stages=3,
            fp_fusion=True,
            divisible=("num_paired_elements", "num_output_elements"),
        ),
        KernelSpec(
            kernel="nf4_quantize",
            config="bitsandbytes-triton-b64-bf16",
            fn=kernels_4bit.quantize_nf4_blockwise_kernel,
            signature={"A_ptr": "*bf16", "absmax_ptr": "*bf16", "out_ptr": "*u8"}
            | dict.fromkeys(("n_elements", "absmax_elements"), "i32"),
            constexprs={"BLOCK_SIZE": 64, "SPLIT_NUM_BLOCKS": split_blocks},
            values=2 * split_blocks * 64,
            bytes_per_value=2 + 0.5 + 2 / 64,
            launches=2,  # absmax comes in bf16 and is then converted
            num_stages=3,
            fp_fusion=True,
            divisible=("n_elements", "absmax_elements"),
        ),
        KernelSpec(
            kernel="adamw8bit",
            config="bitsandbytes-triton-fp32",
            fn=kernels_optim._optimizer_update_2state_8bit_blockwise_triton_kernel,
            signature=dict.fromkeys(("p_ptr", "g_ptr", "qmap1_ptr", "qmap2_ptr", "absmax1_ptr", "absmax2_ptr"), "*fp32")
            | dict.fromkeys(("state1_ptr", "state2_ptr"), "*u8")
            | dict.fromkeys(("beta3", "alpha", "beta1_step", "beta2_step", "lr"), "fp32")
            | dict.fromkeys(("step", "n_elements"), "i32"),
            constexprs={"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "gnorm_scale": 1.0}
            | {"BLOCK_SIZE_N": 256, "N_PER_TH": 1, "OPTIMIZER_ID": kernels_optim.ADAM},
            values=256,
            bytes_per_value=_CUDA[2].bytes_per_value,
            num_warps=2,
            num_stages=3,
            fp_fusion=True,
            divisible=("n_elements",),
        ),
    ]
