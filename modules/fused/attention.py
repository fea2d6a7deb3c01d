"""A model's attention by the op attention, where that has a kernel; elsewhere by torch's own kernels.

It is registered with transformers as one of its attention implementations.
"""

import contextlib
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator

from torch import Tensor, nn

import kernels

OWN, NAME = "sdpa", "qdora"  # the implementation that it takes the place of, and its own name
CAUSAL = "qdora_causal"  # the same without a mask


def use(model: nn.Module) -> None:
    """Have `model` compute attention here, if it would call torch's kernels, whatever their name."""
    files = {type(part).__module__ for part in model.modules()}
    if _implementation(model) == OWN and not any(map(_asks_for_own, files)):
        _register()
        model.set_attn_implementation(NAME)


def release(model: nn.Module) -> None:
    """Undo `use`."""
    if _implementation(model) == NAME:
        model.set_attn_implementation(OWN)


def can_do_without_mask(model: nn.Module) -> bool:
    """True if the code of `model` lets its attention be computed inside `without_mask`."""
    files = {type(part).__module__ for part in model.modules()}
    return _implementation(model) in (OWN, NAME) and not any(map(_asks_for_own, files))


@contextlib.contextmanager
def without_mask(model: nn.Module) -> Iterator[None]:
    """Inside, each token sees those before it and nothing else hides a token: right for texts padded on the right.

    transformers makes no mask, and so does not look at the values of one. That would have a GPU's host wait.
    """
    _register()
    before = _implementation(model)
    model.config._attn_implementation = CAUSAL
    try:
        yield
    finally:
        model.config._attn_implementation = before


def _implementation(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "_attn_implementation", None)


@functools.cache
def _asks_for_own(module: str) -> bool:
    """True if the code of a Python module does something else for OWN than for other names: DeepSeek-V3.2, Falcon."""
    try:
        source = inspect.getsource(sys.modules[module])
    except (OSError, TypeError):
        return False
    return re.search(rf"_attn_implementation (==|!=|in|not in) .*\b{OWN}\b", source) is not None


@functools.cache
def _register() -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def forward(*args, **kwargs) -> tuple[Tensor, None]:
        return _forward(sdpa_attention_forward, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register(NAME, forward)
    ALL_ATTENTION_FUNCTIONS.register(CAUSAL, forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)


def _forward(
    by_torch: Callable,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """As transformers' `sdpa_attention_forward`, which is `by_torch` and gets everything that the op cannot do."""
    batch, _, queries, d = query.shape
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    fits = causal if attention_mask is None else attention_mask.shape[:3] == (batch, 1, queries)
    fits = fits and not any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "cache"))
    if not fits or queries == 1 or dropout > 0 or not kernels.has_kernel("attention", query):
        return by_torch(module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs)
    if attention_mask is None:  # the rest of a static cache is still empty
        key, value = key[:, :, :queries], value[:, :, :queries]
    key, value = key.to(query.dtype), value.to(query.dtype)  # autocast leaves them in several
    out = kernels.attention(query, key, value, attention_mask, d**-0.5 if scaling is None else scaling)
    return out.transpose(1, 2), None
