"""Linears of experts on a CPU, one after the other: see kernels/experts.py.

PyTorch's products of 16 bits compile code for each shape that they meet (oneDNN), which takes a millisecond, and keep
that of the last 1024. Every expert has another number of rows, and another one in every step. So rows are added up to
one of a few numbers, of which there are eight between a power of two and the next. DoRA adds rows of zeros.

LoRA copies no rows. It takes those of the next experts, and writes its results into those of all experts, where the
next experts then overwrite the rows that were too many. In sums over rows, dA and dB, the added rows of the operand of
`rank` columns are zeros.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from kernels import expert_loop
from kernels.cpu.dora import dora_linear, dora_linear_backward, dora_norm
from kernels.cpu.lora import factors, wide_gradients
from kernels.cpu.nf4 import dense
from kernels.dropout import dropout as drop
from kernels.dropout import seed_of
from kernels.weight import Weight


def padded(rows: int) -> int:
    """The number of rows to compute with: at most an eighth more."""
    step = max(1, 2 ** (rows.bit_length() - 4))
    return -(-rows // step) * step


def in_few_shapes(compute: Callable, given: int, found: tuple[int, ...] = (0,)) -> Callable:
    """`compute`, whose first `given` arguments have as many rows as the first one, and so have its results `found`."""

    def run(*args):
        rows = len(args[0])
        more = padded(rows) - rows
        if not more or args[0].dtype == torch.float32:
            return compute(*args)
        of_rows = [pad(arg, (0, 0, 0, more)) if _has(arg, rows) else arg for arg in args[:given]]
        results = compute(*of_rows, *args[given:])
        if isinstance(results, Tensor):
            return results[:rows]
        return tuple(part[:rows] if i in found and _has(part, rows + more) else part for i, part in enumerate(results))

    return run


def _has(tensor: Tensor | None, rows: int) -> bool:
    return tensor is not None and tensor.dim() == 2 and len(tensor) == rows


_linear = in_few_shapes(linear, 1)
_dora, _dora_backward = in_few_shapes(dora_linear, 1, (0, 1, 4)), in_few_shapes(dora_linear_backward, 5)

experts_linear = partial(expert_loop.experts_linear, dense, _linear)
experts_linear_backward = partial(expert_loop.experts_linear_backward, dense, _linear)
experts_dora = partial(expert_loop.experts_dora, dense, _dora)
experts_dora_backward = partial(expert_loop.experts_dora_backward, dense, _dora_backward)
experts_norm = partial(expert_loop.experts_norm, dense, dora_norm)


class _Windows:
    """The experts that have rows, with their rows and those that are computed.

    Args:
        like: [S, ...], of the compute dtype.
    """

    def __init__(self, like: Tensor, ends: Tensor):
        self.rows, self.behind = len(like), int(ends[-1])
        self.experts = [
            (e, rows, slice(rows.start, rows.start + self._computed(like, rows.stop - rows.start)))
            for e, rows in expert_loop.with_rows(ends, self.rows)
        ]

    @staticmethod
    def _computed(like: Tensor, rows: int) -> int:
        return rows if like.dtype == torch.float32 else padded(rows)

    def result(self, like: Tensor, columns: int) -> Tensor:
        """Memory for [S, columns] and for the rows that the last experts compute beside their own."""
        return like.new_empty(max([self.rows, *(wide.stop for _, _, wide in self.experts)]), columns)

    def whole(self, result: Tensor) -> Tensor:
        """`result` without these, and with zeros in rows of nobody."""
        result[self.behind :] = 0
        return result[: self.rows]

    def of(self, tensor: Tensor, rows: slice, wide: slice) -> Tensor:
        """The rows `wide`, or `rows` and zeros if not all of `wide` belong to experts."""
        return tensor[wide] if wide.stop <= self.behind else pad(tensor[rows], (0, 0, 0, wide.stop - rows.stop))


def experts_lora(
    x: Tensor,
    ends: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    windows = _Windows(x, ends)
    y, xa = windows.result(x, weight.shape[1]), windows.result(x, lora_A.shape[1])
    for e, rows, wide in windows.experts:
        w = expert_loop.dense_expert(dense, weight, e, x.dtype).values
        a, b = factors(lora_A[e], lora_B[e], scaling, 1.0, x.dtype)
        own = windows.of(x, rows, wide)
        torch.mm(drop(own, dropout, seed_of(seed, e)), a.t(), out=xa[wide])
        # the small term first: rounding it loses the least
        if bias is None:
            torch.mm(xa[wide], b.t(), out=y[wide])
        else:
            torch.addmm(bias[e].to(x.dtype), xa[wide], b.t(), out=y[wide])
        y[wide].addmm_(own, w.t())
    return windows.whole(y), windows.whole(xa)


def experts_lora_backward(
    dy: Tensor,
    x: Tensor,
    xa: Tensor,
    ends: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    windows = _Windows(x, ends)
    dx = windows.result(x, x.shape[1]) if needs_dx else x.new_empty(0)
    dA, dB = lora_A.new_zeros(lora_A.shape), lora_B.new_zeros(lora_B.shape)
    for e, rows, wide in windows.experts:
        a, b = factors(lora_A[e], lora_B[e], 1.0, scaling, x.dtype)
        own_dy, own_x, own_seed = windows.of(dy, rows, wide), windows.of(x, rows, wide), seed_of(seed, e)
        own_xa = pad(xa[rows], (0, 0, 0, wide.stop - rows.stop))
        dxa = torch.mm(own_dy, b)
        dxa[rows.stop - rows.start :] = 0
        gradients = torch.mm(dxa.t(), drop(own_x, dropout, own_seed)), torch.mm(own_dy.t(), own_xa)
        dA[e], dB[e] = wide_gradients(*gradients, lora_A[e], lora_B[e])
        if needs_dx:
            torch.mm(dxa, a, out=dx[wide])
            if dropout:
                dx[wide] = drop(dx[wide], dropout, own_seed)
            dx[wide].addmm_(own_dy, expert_loop.dense_expert(dense, weight, e, x.dtype).values)
    return (windows.whole(dx) if needs_dx else dx), dA, dB
