"""The settings of an adapter: AdapterConfig, and how its patterns are matched to names."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

ALL_LINEAR = "all-linear"
REACHED = "reached"
BASELINES = ("bitfit", "houlsby", "prefix_embed", "prefix_layer")  # not LoRA; their files are in files/baselines.py
INITS = ("default", "gaussian", "orthogonal", "pissa", "olora", "loftq", "qpissa", "eva")
INITS_WITH_NUMBER = ("pissa_niter_N", "loftq_iter_N", "qpissa_iter_N")
_WITH_NUMBER = re.compile(r"pissa_niter_\d+|(loftq|qpissa)_iter_[1-9]\d*")
QPISSA_ITERATIONS = 5  # the paper's choice


@dataclass
class AdapterSettings:
    """The settings of an adapter beside its kind. They are keys of a run too: experiments/config.py inherits them.

    Types are those that Hydra can check. AdapterConfig checks the rest.

    Attributes:
        rank: r, of every layer that `rank_pattern` does not match. A linear that is narrower gets the largest rank that
            it can have, at the same scaling.
        lora_alpha: α, of every layer that `alpha_pattern` does not match. The default is 2 · rank.
        target_modules: "all-linear" (all but the output embeddings), a list of suffixes (`q_proj` matches every
            `….q_proj`), or a regular expression that must match the full name. For "houlsby", all-linear is the last
            linear of each attention and of each MLP.
        dropout: probability of dropping an element of the adapter's input, in training mode only.
        exclude_modules: linears to leave out: a list of suffixes or a regular expression, as above.
        rank_pattern, alpha_pattern: rank and lora_alpha of single layers. A key is a regular expression that must
            match the full name, or the end of it after a dot. The first key that matches counts.
        modules_to_save: suffixes of modules that train whole, beside the adapters: `[lm_head]`.
        bias: "none", "lora_only" (the biases of the adapted linears train) or "all".
        rslora: scale by lora_alpha / √rank instead of lora_alpha / rank.
        init: how A and B start, see `modules/adapters/init.py`: default, gaussian, orthogonal, pissa, pissa_niter_N,
            olora, loftq, loftq_iter_N, qpissa, qpissa_iter_N or eva.
        freeze_A: train only B, and DoRA's magnitude. LoRA-FA, Zhang et al. 2023.
        experts: which experts of a layer get an adapter: a list of numbers, "reached" (those that calibration batches
            reach) or None: all. A dict has a list for each layer by the full name of its linear.
        shared_factor: "A" or "B": the experts of a linear share one A or one B; "none".
        prefix_tokens: how many trainable tokens precede the text.
        infix_tokens: how many trainable tokens precede the last token of the prompt.
    """

    rank: int = 16
    lora_alpha: float | None = None
    target_modules: Any = ALL_LINEAR
    dropout: float = 0.0
    exclude_modules: Any = None
    rank_pattern: Any = None
    alpha_pattern: Any = None
    modules_to_save: list[str] = field(default_factory=list)
    bias: str = "none"
    rslora: bool = False
    init: str = "default"
    freeze_A: bool = False
    experts: Any = None
    shared_factor: str = "none"
    prefix_tokens: int = 0
    infix_tokens: int = 0


_PREFIX = ("prefix_tokens", "infix_tokens")
_LORA = tuple(f.name for f in fields(AdapterSettings) if f.name not in _PREFIX)
# Each adapter and the settings that it has.
SETTINGS = {
    "lora": _LORA,
    "dora": _LORA,
    "bitfit": ("modules_to_save",),
    "houlsby": ("rank", "rank_pattern", "target_modules", "exclude_modules", "modules_to_save"),
    "prefix_embed": _PREFIX,
    "prefix_layer": _PREFIX,
}
ADAPTER_NAMES = tuple(SETTINGS)


@dataclass
class _Kind:
    adapter: str = "lora"


@dataclass
class AdapterConfig(AdapterSettings, _Kind):  # fields of the last base come first: AdapterConfig("dora", 8)
    """An adapter: its kind and its settings. SETTINGS lists which settings each kind has.

    Attributes:
        adapter: "lora", "dora", or a baseline: "bitfit" (own.py), "houlsby" (bottleneck.py),
            "prefix_embed" or "prefix_layer" (prefix.py).

    Raises:
        ValueError: a setting is out of range, has the wrong type, or the adapter does not have it.
    """

    def __post_init__(self):
        for name, default in (
            ("lora_alpha", self.rank * 2),
            ("exclude_modules", []),
            ("rank_pattern", {}),
            ("alpha_pattern", {}),
            ("modules_to_save", []),
        ):
            if getattr(self, name) is None:
                setattr(self, name, default)
        self._check_choices()
        self._check_used()
        self._check_modules()
        self._check_numbers()

    def _check_choices(self) -> None:
        if self.adapter not in ADAPTER_NAMES:
            raise ValueError(f"adapter {self.adapter!r} is not one of {', '.join(ADAPTER_NAMES)}")
        if self.init not in INITS and not _WITH_NUMBER.fullmatch(self.init):
            raise ValueError(f"init={self.init!r} is not one of {', '.join((*INITS, *INITS_WITH_NUMBER))}")
        if self.bias not in ("none", "lora_only", "all"):
            raise ValueError(f"bias={self.bias!r} is not one of none, lora_only, all")
        if self.shared_factor not in ("none", "A", "B"):
            raise ValueError(f"shared_factor={self.shared_factor!r} is not one of none, A, B")
        if self.shared_factor != "none" and self.init not in ("default", "gaussian"):
            raise ValueError(f"shared_factor={self.shared_factor}: init={self.init} starts each expert's A and B: "
                             "choose default or gaussian")  # fmt: skip
        if self.experts is not None and self.experts != REACHED:
            given = self.experts.values() if isinstance(self.experts, dict) else [self.experts]
            if not all(isinstance(numbers, list) and _are_numbers(numbers) for numbers in given):
                raise ValueError(f"experts={self.experts!r}: give different whole numbers, as in [0, 3], or {REACHED}")

    def _check_used(self) -> None:
        """A setting that the adapter does not have must keep its default. rank and lora_alpha always have a value."""
        for f in fields(self):
            value = getattr(self, f.name)
            unset = value == f.default or not value
            if f.name not in ("adapter", "rank", "lora_alpha", *SETTINGS[self.adapter]) and not unset:
                raise ValueError(f"{f.name}={value!r} is not a setting of adapter {self.adapter!r}")

    def _check_modules(self) -> None:
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, str) and name != "modules_to_save":
                compile_patterns(name, [] if value == ALL_LINEAR else [value])
            elif not isinstance(value, list | tuple | set) or not all(isinstance(suffix, str) for suffix in value):
                regex = "" if name == "modules_to_save" else " or a regular expression"
                raise ValueError(f"{name}={value!r} is not a list of suffixes{regex}")
        for name in ("rank_pattern", "alpha_pattern"):
            value = getattr(self, name)
            if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
                raise ValueError(f"{name}={value!r} is not a mapping of names: give it as {{q_proj: 8}}")
            compile_patterns(name, value)

    def _check_numbers(self) -> None:
        if not isinstance(self.dropout, int | float) or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout}: choose a number from 0 to below 1")
        for where, rank in _entries("rank", self.rank, self.rank_pattern):
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ValueError(f"{where}={rank} is not a rank: choose a whole number, 1 or more")
            if self.init == "orthogonal" and rank % 2:
                raise ValueError(f"{where}={rank} is odd: init=orthogonal needs an even rank")
        for where, alpha in _entries("lora_alpha", self.lora_alpha, self.alpha_pattern):
            if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < float("inf"):
                raise ValueError(f"{where}={alpha}: choose a number above 0")
        for name in _PREFIX:
            tokens = getattr(self, name)
            if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
                raise ValueError(f"{name}={tokens}: choose a whole number, 0 or more")
        if "prefix_tokens" in SETTINGS[self.adapter] and not self.prefix_tokens + self.infix_tokens:
            raise ValueError(f"{self.adapter} has no tokens: set prefix_tokens or infix_tokens to 1 or more")

    def experts_of(self, name: str) -> list[int] | None:
        """The experts of the linear `name` that get an adapter; None: all."""
        return self.experts.get(name) if isinstance(self.experts, dict) else self.experts

    def rank_of(self, name: str) -> int:
        """The rank of the layer `name`."""
        return self.rank_pattern.get(matching_key(self.rank_pattern, name), self.rank)

    def lora_alpha_of(self, name: str) -> float:
        """lora_alpha of the layer `name`."""
        return self.alpha_pattern.get(matching_key(self.alpha_pattern, name), self.lora_alpha)


def _are_numbers(numbers: list) -> bool:
    return len(numbers) == len(set(map(str, numbers))) > 0 and all(type(n) is int and n >= 0 for n in numbers)


def quantized_start(init: str) -> tuple[str, int] | None:
    """The arguments (start, iterations) of `quantized_init` for `init`.

    None if `init` does not compensate for the error of packing.
    """
    name, _, iterations = init.partition("_iter_")
    if name == "loftq":
        return "loftq", int(iterations or 1)
    return ("pissa", int(iterations or QPISSA_ITERATIONS)) if name == "qpissa" else None


def changes_base(init: str) -> bool:
    """True if `init` changes the codes of the packed base, so that they are not those of the plain packed model."""
    return quantized_start(init) not in (None, ("loftq", 1))


def _entries(name: str, value, pattern: dict) -> list[tuple[str, object]]:
    """(description, value) of a setting and of each value in its pattern. Messages use the description."""
    return [(name, value), *((f"{name} of {key}", number) for key, number in pattern.items())]


def compile_patterns(setting: str, patterns: Iterable[str]) -> None:
    """Raise ValueError if one of `patterns` is not a regular expression.

    Args:
        setting: the name of the setting that holds them, for the message.
    """
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{setting}={pattern!r} is not a regular expression: {error}") from error


def matching_key(patterns: Iterable[str], name: str) -> str | None:
    """The first key of a rank or alpha pattern that matches the layer `name`, by PEFT's rules; None if none does."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), None)
