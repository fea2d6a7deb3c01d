"""The gated MLP's product with SiLU, forward and backward.

    y = silu(gate) ⊙ up,   silu(x) = x σ(x)                                          [...]

    dup = dy ⊙ silu(gate),   dgate = dy ⊙ up ⊙ σ(gate) ⊙ (1 + gate ⊙ (1 − σ(gate)))

Shazeer 2020, "GLU Variants Improve Transformer". silu(gate) is rounded to gate's dtype before it is multiplied with up,
as PyTorch does. Kept from forward to backward: gate and up. silu(gate) is computed again.
"""

import torch
from torch import Tensor

from kernels.op import define_op


@define_op
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Of contiguous tensors."""
    return torch.empty_like(gate)


@define_op
def _swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(dgate, dup); dy is contiguous."""
    return torch.empty_like(gate), torch.empty_like(up)


def _keep(inputs, _) -> dict:
    return {"gate": inputs.gate, "up": inputs.up}


def _backward(kept, needs, dy: Tensor) -> dict:
    dgate, dup = _swiglu_backward(dy.contiguous(), kept.gate, kept.up)
    return {"gate": dgate if needs.gate else None, "up": dup if needs.up else None}


_swiglu.differentiate(_keep, _backward)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) ⊙ up, element by element.

    Args:
        gate, up: [...], of one shape and float dtype.

    Returns:
        [...] in their dtype. Differentiable in both.

    Raises:
        ValueError: shapes or dtypes that differ.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype or not gate.is_floating_point():
        raise ValueError(
            f"gate {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype} must be floats of one shape"
        )
    return _swiglu(gate.contiguous(), up.contiguous())
