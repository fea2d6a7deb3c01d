"""For the tests of the adapted linears: base weights, formulas in plain torch and the accuracy rule."""

import pytest
import torch
from torch import Tensor, nn

from kernels import QuantState, dequantize_4bit, quantize_4bit
from kernels.dropout import keep_mask
from kernels.op import Op

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BASES = ("dense", "nf4", "nf4-double")

# (x's leading shape, in, out, rank, bias, dropout): odd sizes, ranks that are and are not powers of two
SHAPES = [
    ((7,), 64, 48, 16, False, 0.0),
    ((2, 5), 33, 17, 3, True, 0.0),
    ((1,), 130, 95, 1, True, 0.3),
    ((3, 1, 4), 96, 128, 33, False, 0.1),
]


def shape_id(shape) -> str:
    lead, in_features, out_features, rank, bias, p = shape
    parts = ["x".join(map(str, lead)), f"K{in_features}", f"N{out_features}", f"r{rank}"]
    return "-".join(parts + ["bias"] * bias + [f"drop{p}"] * bool(p))


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same numbers on every machine, on the default device."""
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), device="cpu")
    return numbers.to(torch.get_default_device(), dtype)


def adapted_tensors(shape, dtype: torch.dtype) -> tuple[dict[str, Tensor | None], Tensor]:
    """(x, adapters and bias, dy) of one of `SHAPES`: adapters train in fp32 whatever the compute dtype."""
    lead, in_features, out_features, rank, bias, _ = shape
    tensors = {
        "x": randn(*lead, in_features, seed=2, dtype=dtype),
        "lora_A": randn(rank, in_features, seed=3) / in_features**0.5,
        "lora_B": randn(out_features, rank, seed=4) / rank**0.5,
        "bias": randn(out_features, seed=5) if bias else None,
    }
    return tensors, randn(*lead, out_features, seed=6, dtype=dtype)


def dropout_seed() -> Tensor:
    """On the default device, where the ops want it."""
    return torch.tensor(42)


def make_base(kind: str, out_features: int, in_features: int, dtype: torch.dtype, blocksize: int = 64):
    """(weight as the op takes it, its quant_state or None, the numbers it stands for in fp32)."""
    w = randn(out_features, in_features, seed=1, dtype=dtype) / in_features**0.5
    return quantized_base(kind, w, blocksize)


def quantized_base(kind: str, w: Tensor, blocksize: int = 64) -> tuple[Tensor, QuantState | None, Tensor]:
    if kind == "dense":
        return w, None, w.float()
    packed, state = quantize_4bit(w, blocksize, double_quant=kind == "nf4-double")
    return packed, state, dequantize_4bit(packed, state, torch.float32)


def plain_linear(
    x: Tensor,
    w: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    magnitude: Tensor | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """LoRA, or DoRA if there is a magnitude, as the papers and PEFT write it: everything in x's dtype, W + sBA formed.

    In float64 it is the exact answer, in the op's dtype what PyTorch loses at that precision.
    """
    dtype = x.dtype
    norm_dtype = torch.promote_types(dtype, torch.float32)
    norm = (w.to(norm_dtype) + scaling * (lora_B.to(norm_dtype) @ lora_A.to(norm_dtype))).norm(dim=1).detach()
    w, lora_A, lora_B = w.to(dtype), lora_A.to(dtype), lora_B.to(dtype)
    mask = 1.0 if p == 0 else keep_mask(x.shape[0], x.shape[1], p, seed).to(dtype) / (1 - p)
    dropped = x * mask
    adapter = (dropped @ lora_A.t()) @ lora_B.t() * scaling
    if magnitude is None:
        y = x @ w.t() + adapter
    else:
        gain = torch.where(norm > 0, magnitude / norm, 0).to(dtype)
        y = (x - dropped) @ w.t() + gain * (dropped @ w.t() + adapter)
    return y if bias is None else y + bias.to(dtype)


def with_gradients(fn, tensors: dict[str, Tensor | None], dy: Tensor) -> dict[str, Tensor]:
    """{"y": fn(**tensors)} and {"d" + name: gradient} of each tensor, for the output gradient dy."""
    leaves = {name: None if t is None else t.detach().clone().requires_grad_() for name, t in tensors.items()}
    y = fn(**leaves)
    y.backward(dy.to(y.dtype).view_as(y))
    return {"y": y.detach()} | {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf is not None}


def to_dtype(tensors: dict[str, Tensor | None], dtype: torch.dtype) -> dict[str, Tensor | None]:
    return {name: None if t is None else t.to(dtype) for name, t in tensors.items()}


def assert_as_accurate(got: dict[str, Tensor], torch_at_dtype: dict, exact: dict, dtype: torch.dtype) -> None:
    """error(got) ≤ 2 · error(torch at that dtype) + floor, each the largest absolute error against float64.

    The floor is four units in the last place of the largest exact value: torch may happen to hit it exactly, and the
    largest of a few errors varies with the order of a sum.
    """
    assert got.keys() == exact.keys()
    for name, want in exact.items():
        scale = want.abs().max().item()
        allowed = 2 * (torch_at_dtype[name].double() - want).abs().max().item() + 4 * torch.finfo(dtype).eps * scale
        error = (got[name].double() - want).abs().max().item()
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e} (largest value {scale:.3e})"


def opcheck(op: Op, *args) -> None:
    """torch's checks of an op's schema, fake and autograd."""
    torch.library.opcheck(op.dispatched, tuple(op.flatten(args)))


def peft_layer(base: nn.Module, rank: int, alpha: float, **config) -> tuple[nn.Module, nn.Module]:
    """(PEFT model around `base`, its adapter layer) with a B that is not zero."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        nn.Sequential(base), peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"], **config)
    )
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.lora_B["default"].weight.copy_(randn(base.out_features, rank, seed=4))
    return model.train(), layer


def compare_with_peft(ours, model, x: Tensor, dy: Tensor, weights: dict[str, nn.Parameter]) -> None:
    """Forward and the gradient of x and of each of PEFT's `weights`, which `ours` takes by name, all in fp32."""

    def check(got: Tensor, want: Tensor, name: str) -> None:
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6 * want.abs().max().item(), msg=lambda m: f"{name}: {m}")

    theirs = {"x": x.clone().requires_grad_()}
    y = model(theirs["x"])
    y.backward(dy)
    mine = {"x": x.clone().requires_grad_()} | {n: p.detach().clone().requires_grad_() for n, p in weights.items()}
    out = ours(**mine)
    out.backward(dy)
    check(out, y, "y")
    for name, leaf in mine.items():
        want = theirs["x"].grad if name == "x" else weights[name].grad
        check(leaf.grad, want, f"d{name}")
