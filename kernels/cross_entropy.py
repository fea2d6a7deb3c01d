"""Cross-entropy of the logits of a linear, without logits [n, vocabulary] in memory.

    loss = Σ_t (logsumexp_v h_t·w_v − h_t·w_target(t))              h [n, hidden], w [vocabulary, hidden]
    dh_t = Σ_v (softmax_v − [v = target]) w_v                       dw and the bias' likewise, if they train

A token whose target is IGNORED has no loss and no gradient.

A chunk of tokens goes through forward and backward at once, and nothing of its logits is kept. Products run in the
compute dtype, softmax and sums in fp32. Kept from forward to backward: the gradients for dloss = 1.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.op import define_op

IGNORED = -100  # as torch's ignore_index
CHUNK_BYTES = 2**26  # of logits: enough tokens for a product that reads the whole of w


@define_op
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    needs_dhidden: bool,
    needs_dweight: bool,
    needs_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss [], dh, dw and the bias', each without an element where it is not needed)"""
    return hidden.new_empty((), dtype=precise(hidden)), *zeros_for(
        *(hidden, weight, bias, needs_dhidden, needs_dweight, needs_dbias)
    )


def precise(hidden: Tensor) -> torch.dtype:
    """The dtype of softmax and sums."""
    return torch.promote_types(hidden.dtype, torch.float32)


def zeros_for(hidden: Tensor, weight: Tensor, bias: Tensor | None, *needs: bool) -> list[Tensor]:
    """Zeros for each gradient that is needed, else no element."""
    like = (hidden, weight, hidden if bias is None else bias)
    return [tensor.new_zeros(tensor.shape if needed else 0) for tensor, needed in zip(like, needs)]


def by_chunks(
    loss_of: Callable[[Tensor, Tensor], Tensor],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    needs_dhidden: bool,
    needs_dweight: bool,
    needs_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The results of the op.

    Args:
        loss_of: Σ cross-entropy of logits [rows, vocabulary] and targets [rows]; the logits become their gradient, and
            zeros where the target is IGNORED.
    """
    dhidden, dweight, dbias = zeros_for(hidden, weight, bias, needs_dhidden, needs_dweight, needs_dbias)
    loss = torch.zeros((), dtype=precise(hidden), device=hidden.device)
    most = max(1, CHUNK_BYTES // (hidden.element_size() * weight.shape[0]))
    rows = -(-len(hidden) // max(1, -(-len(hidden) // most))) or 1  # chunks of one size
    for start in range(0, hidden.shape[0], rows):
        h = hidden[start : start + rows]
        dlogits = F.linear(h, weight, bias)  # the logits, until their gradient takes their place
        loss += loss_of(dlogits, targets[start : start + rows])
        if needs_dhidden:
            dhidden[start : start + rows] = dlogits @ weight.to(dlogits.dtype)
        if needs_dweight:
            dweight += dlogits.t() @ h.to(dlogits.dtype)
        if needs_dbias:
            dbias += dlogits.sum(0)
    return loss, dhidden, dweight, dbias


def _keep(_, results) -> dict:
    return dict(zip(("hidden", "weight", "bias"), results[1:]))


def _backward(kept, needs, dloss: Tensor, *_) -> dict:
    return {name: gradient * dloss if getattr(needs, name) else None for name, gradient in vars(kept).items()}


_linear_cross_entropy.differentiate(_keep, _backward)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Σ cross-entropy of logits = hidden · weightᵀ + bias.

    Args:
        hidden: [n, hidden]. weight: [vocabulary, hidden]. bias: [vocabulary] or None.
        targets: int64 [n]. A target of −100 is ignored, as in torch.

    Returns:
        fp32 [] (fp64 for fp64), in nats. Differentiable once, in hidden, weight and bias.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        IndexError: on a CPU in bf16, a target that is not in the vocabulary.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} must be [n, hidden] and weight {tuple(weight.shape)} [vocabulary, hidden]"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} must be [{weight.shape[0]}]")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets {tuple(targets.shape)} {targets.dtype} must be int64 [{hidden.shape[0]}]")
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    return _linear_cross_entropy(hidden, weight, bias, targets, *needs)[0]
