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
from torch.nn.attention.varlen import varlen_attn

import kernels

OWN, NAME = "sdpa", "qdora"  # the implementation that it takes the place of, and its own name
CAUSAL = "qdora_causal"  # the same without a mask
PACKED = "qdora_packed"  # of samples laid end to end, by torch's kernel for texts of several lengths

_windows: set[int | None] = set()  # the layers' own, of the calls of PACKED in the last `packed`


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
    with _by(model, CAUSAL):
        yield


@contextlib.contextmanager
def packed(model: nn.Module) -> Iterator[set[int | None]]:
    """Inside, the model's only row holds samples laid end to end: a token sees those before it in its own sample.

    The model must be called with `boundaries_of` them, and must hand these down to its attention. There is no mask, nor
    anything that the host reads. As long as the context is open, what is yielded has the sliding windows that the
    layers gave.
    """
    _windows.clear()
    with _by(model, PACKED):
        yield _windows


def boundaries_of(boundaries: Tensor, longest: int) -> dict[str, Tensor | int]:
    """Arguments of a model inside `packed`, named as transformers does.

    Args:
        boundaries: int32 [N + 1], where each of N samples begins and the last one ends. Samples may have no tokens.
        longest: the most tokens that one has.
    """
    lengths = {"max_length_q": longest, "max_length_k": longest}
    return {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries, **lengths}


@contextlib.contextmanager
def _by(model: nn.Module, name: str) -> Iterator[None]:
    _register()
    before = _implementation(model)
    model.config._attn_implementation = name
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
    ALL_ATTENTION_FUNCTIONS.register(PACKED, _packed)
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


def _packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """The attention of PACKED. query: [1, heads, tokens, d].

    Raises:
        ValueError: the model needs something else than the kernel does.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    more = [name for name in ("position_bias", "softcap", "s_aux", "sinks", "cache") if kwargs.get(name) is not None]
    if more or not causal or attention_mask is not None or dropout or len(query) != 1 or cu_seq_lens_q is None:
        raise ValueError(f"{type(module).__name__} needs more than attention inside samples")
    _windows.add(sliding_window)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key.to(query.dtype), value.to(query.dtype)))
    out = varlen_attn(
        *(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q),
        scale=q.shape[-1] ** -0.5 if scaling is None else scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=True,
    )
    return out.unsqueeze(0), None
