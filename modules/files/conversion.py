"""Tensors of a model directory under the names and in the shapes that the model has in memory.

transformers keeps some models otherwise than their files: experts as one tensor, image-text models with other prefixes,
GPT-NeoX's head as lm_head. It has a list of transforms for each of them.
"""

import copy

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    apply_converters,
    dot_natural_key,
    rename_source_key,
)

from modules.files.packed_experts import Linears, joins_experts
from modules.files.tensors import TensorFiles


def bring_into_memory(files: TensorFiles, model: PreTrainedModel, ends: tuple[str, ...] = ()) -> dict[str, Linears]:
    """Give the tensors of `files` the names that `model` has for them; join and split those that it keeps otherwise.

    The tensors of a packed weight, `<weight>.absmax` and so on, follow their weight.

    Args:
        ends: how the names of a packed linear's tensors end, that of the codes first.

    Returns:
        By the name of an experts' weight of the model, the packed linears of which it consists. They are not joined
        (packed_experts.py), and their tensors keep their names.

    Raises:
        ValueError: the model joins or splits a packed weight that is not of experts, or of some experts alone.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    parts = {name: weight for name in files if (weight := _weight_of_part(name)) in files}
    experts: dict[str, Linears] = {}
    for linear in _packed_linears(files, ends):
        renamed, pattern = rename_source_key(f"{linear}.weight", renamings, converters, prefix, state)
        if pattern is not None and renamed in state and joins_experts(by_pattern[pattern]):
            sources = by_pattern[pattern].source_patterns
            of_pattern = experts.setdefault(renamed, [[] for _ in sources])
            of_pattern[sources.index(pattern)].append(linear)
    kept = {linear + end for linears in experts.values() for of_one in linears for linear in of_one for end in ends}
    names: dict[str, str] = {}
    joined: dict[str, WeightConverter] = {}  # by the name of the first tensor that they make
    for name in sorted(files, key=dot_natural_key):  # experts in their order
        if name in parts or name in kept:
            continue
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:  # it was written as it is in memory
            renamed, pattern = name, None
        if pattern is None or renamed not in state:
            names[name] = renamed
            continue
        if renamed in experts:
            raise ValueError(f"{files.path(name)}: {name} is dense, but {experts[renamed][0][0]} is packed")
        if name in parts.values() or not files.tensor(name).is_floating_point():
            kind = type(model).__name__
            raise ValueError(f"{files.path(name)}: {name} is packed, but {kind} joins or splits it in memory")
        converter = joined.setdefault(renamed, copy.deepcopy(by_pattern[pattern]))
        converter.add_tensor(renamed, name, pattern, files.tensor(name))
    for part, weight in parts.items():
        names[part] = names[weight] + part.removeprefix(weight)
    for first, converter in joined.items():
        sources = sorted(converter.layer_targets[first])
        made = converter.convert(first, model=model, config=model.config)
        files.replace(sources, {name: value[0] if isinstance(value, list) else value for name, value in made.items()})
    files.rename(names)
    return experts


def _packed_linears(files: TensorFiles, ends: tuple[str, ...]) -> list[str]:
    """The names of the linears that have any tensor of a packed one, experts in their order."""
    found = {
        name.removesuffix(end)
        for end in ends
        for name in files
        if name.endswith(end) and (end != ".weight" or not files.tensor(name).is_floating_point())
    }
    return sorted(found, key=dot_natural_key)


def _weight_of_part(name: str) -> str | None:
    """The weight that the tensor `name` would belong to as a part of a packed one."""
    weight, dot, _ = name.rpartition(".weight.")
    return f"{weight}.weight" if dot else None


def are_joined(model: PreTrainedModel, weights: list[str]) -> bool:
    """True if transformers, writing `model` as its files usually are, would join or split one of `weights`."""
    transforms = getattr(model, "_weight_conversions", None)
    if transforms is None:
        transforms = get_model_conversion_mapping(model, add_legacy=False)
    reverse = [t.reverse_transform() for t in transforms[::-1] if not isinstance(t, PrefixChange)]
    converters = [transform for transform in reverse if isinstance(transform, WeightConverter)]
    return any(apply_converters(weight, converters)[1] is not None for weight in weights)
