"""Rotary position embedding on a CPU in fewer passes, the same bits.

    y₁ = x₁ ⊙ cos₁ − x₂ ⊙ sin₁,   y₂ = x₂ ⊙ cos₂ + x₁ ⊙ sin₂             x₁, x₂ the halves of x's last dimension
    dx₁ = dy₁ ⊙ cos₁ + dy₂ ⊙ sin₂,  dx₂ = dy₂ ⊙ cos₂ − dy₁ ⊙ sin₁

transformers writes the turned halves (−x₂, x₁) as a tensor of their own, and in backward one as large as x for each
half. Its models call a function of their module, so that is where ours goes: for every model of the kind in the
process, with the function that was there for tensors elsewhere, and while compiling. RoFormer, Su et al. 2021, §3.4.2.
"""

import sys

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kernels import cpu

NAME = "apply_rotary_pos_emb"


def _kernel_takes(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    # [batch, heads, tokens, d]; some models have tokens before heads
    if not (cos.shape == sin.shape == (len(cos), 1, *x.shape[2:]) and len(cos) in (1, len(x)) and x.shape[-1] % 2 == 0):
        return False
    dense = x.transpose(1, 2)  # as a model's linear leaves it
    return cpu.takes(dense if dense.is_contiguous() else x, cos, sin)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        if _kernel_takes(x, cos, sin):
            return cpu.elementwise.rotate(x, cos, sin, backward=False)
        half = x.shape[-1] // 2
        y = x * cos
        y[..., :half].sub_(x[..., half:] * sin[..., :half])
        y[..., half:].add_(x[..., :half] * sin[..., half:])
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        cos, sin = ctx.saved_tensors
        if _kernel_takes(dy, cos, sin):
            return cpu.elementwise.rotate(dy, cos, sin, backward=True), None, None
        half = dy.shape[-1] // 2
        dx = dy * cos
        dx[..., :half].add_(dy[..., half:] * sin[..., half:])
        dx[..., half:].sub_(dy[..., :half] * sin[..., :half])
        return dx, None, None


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """q and k [batch, heads, tokens, d], turned by cos and sin [batch, tokens, d]."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _Rotary.apply(q, cos, sin), _Rotary.apply(k, cos, sin)


def _computes_the_same(function) -> bool:
    generator = torch.Generator().manual_seed(0)
    q, k, cos, sin = (
        torch.randn(size, generator=generator) for size in ((1, 2, 3, 8), (1, 1, 3, 8), (1, 3, 8), (1, 3, 8))
    )
    try:
        return all(map(torch.equal, function(q, k, cos, sin), rotary(q, k, cos, sin)))
    except (TypeError, RuntimeError):  # takes or does something else
        return False


def use_on_cpu(model: PreTrainedModel) -> None:
    """Have `model`, and others of its kind, turn queries and keys here while they are on a CPU."""
    for name in {type(module).__module__ for module in model.modules()}:
        own = getattr(sys.modules[name], NAME, None)
        if own is None or getattr(own, "on_other_devices", None) or not _computes_the_same(own):
            continue

        def ours_or_own(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args, _own=own, **kwargs):
            ours = q.is_cpu and q.dtype == cos.dtype and not torch.compiler.is_compiling()
            return (rotary if ours else _own)(q, k, cos, sin, *args, **kwargs)

        ours_or_own.on_other_devices = own
        setattr(sys.modules[name], NAME, ours_or_own)
