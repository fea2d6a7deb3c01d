"""Behaviour that torch has on every device but the meta device: fused attention, autocast of products, grouped products
in any dtype."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

aten = torch.ops.aten


def _fused_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """F.scaled_dot_product_attention by the fused kernel, which takes a mask in the dtype of the query."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    fused = aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


class Casts:
    """Autocast's casts of the arguments of products, and its copies of parameters until it ends.

    Args:
        dtype: to cast to; None: nothing is cast.

    Attributes:
        keeps: whether it remembers. It does through a forward pass; a block that backward computes again has an
            autocast of its own.
    """

    def __init__(self, dtype: torch.dtype | None):
        self.dtype, self.kept, self.keeps = dtype, {}, True

    def end(self) -> None:
        self.kept.clear()
        self.keeps = False

    def around(self, product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`product`, whose tensors are cast first."""
        if self.dtype is None:
            return product
        return lambda *args, **more: product(*map(self._cast, args), **{k: self._cast(v) for k, v in more.items()})

    def _cast(self, value):
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == self.dtype:
            return value
        if not self.keeps or not isinstance(value, nn.Parameter):
            return value.to(self.dtype)
        if value not in self.kept:
            self.kept[value] = value.to(self.dtype)
        return self.kept[value]


@contextlib.contextmanager
def as_on_a_device(casts: Casts) -> Iterator[None]:
    """Behaviour of torch on every device but the meta device: fused attention, autocast of products."""
    attention, linear, bmm = F.scaled_dot_product_attention, F.linear, torch.bmm
    F.scaled_dot_product_attention = casts.around(_fused_attention)
    F.linear, torch.bmm = casts.around(linear), casts.around(bmm)
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.linear, torch.bmm = attention, linear, bmm


def grouped_products(a: Tensor, b: Tensor, offs: Tensor, *_) -> Tensor:
    """torch._grouped_mm of rows [S, K] and [G, K, N], or of columns [M, S] and [S, N]: for widths that are no multiple
    of 16 bytes, and in dtypes, that the meta device refuses and others take."""
    if b.dim() == 3:
        return a.new_empty(a.shape[0], b.shape[2])
    return a.new_empty(len(offs), a.shape[0], b.shape[1])
