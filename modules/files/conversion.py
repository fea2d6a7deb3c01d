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

from modules.files.tensors import TensorFiles


def bring_into_memory(files: TensorFiles, model: PreTrainedModel) -> None:
    """Give the tensors of `files` the names that `model` has for them; join and split those that it keeps otherwise.

    The tensors of a packed weight, `<weight>.absmax` and so on, follow their weight.

    Raises:
        ValueError: the model joins or splits a weight that is packed.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    parts = {name: weight for name in files if (weight := _weight_of_part(name)) in files}
    names: dict[str, str] = {}
    joined: dict[str, WeightConverter] = {}  # by the name of the first tensor that they make
    for name in sorted(files, key=dot_natural_key):  # experts in their order
        if name in parts:
            continue
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:  # it was written as it is in memory
            renamed, pattern = name, None
        if pattern is None or renamed not in state:
            names[name] = renamed
            continue
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
