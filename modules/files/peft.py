"""Adapters on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors in one directory.

    base_model.model.<path>.lora_A.weight           [rank, in]
    base_model.model.<path>.lora_B.weight           [out, rank]
    base_model.model.<path>.lora_magnitude_vector   [out], DoRA
    base_model.model.<path>.base_layer.bias         [out], an adapted linear's bias that trained
    base_model.model.<path>.<tensor>                a tensor of another module that trained whole

The files of the baselines: baselines.py; LoRA on experts: peft_experts.py. PEFT has no DoRA on experts. That is written
under the names above, in the shapes of the layers, with qdora_config.json in place of adapter_config.json. A file is
written under a temporary name and then renamed, so an interrupted write leaves no partial file.
"""

import json
import os
import re
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from modules.adapters.attach import add_adapter, give_up_adding, own_tensors, prepare_to_add
from modules.adapters.base_print import OtherBase, is_other_base
from modules.adapters.config import BASELINES, AdapterConfig
from modules.adapters.init import initialise
from modules.adapters.model_code import left_out
from modules.adapters.own import own_tensor
from modules.adapters.saving import saves_adapters
from modules.adapters.state import DEFAULT, Adapter, adapters, detach, named_adapter, state_of
from modules.adapters.targets import all_linears, find_targets, matches
from modules.files.baselines import (
    OUR_CONFIG_FILE,
    baseline_state,
    is_prompt_tuning,
    our_config,
    prompt_learning_config,
    read_our_config,
    read_prompt_tuning,
)
from modules.files.checked import Damaged, base_of, load_tensors, save_tensors, seal_files, verify_file
from modules.files.peft_config import read_config, targets_in_file, write_config
from modules.files.peft_experts import experts_in_file, fits_peft, from_peft, of_experts, to_peft
from modules.linear import DoRALinear, LoRALinear

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
CONFIG_FILES = (CONFIG_FILE, OUR_CONFIG_FILE)
PREFIX = "base_model.model."
LARGE_RANK = 4096  # settings up to here need no more memory than models have
_LAYER = re.compile(rf"{re.escape(PREFIX)}(.+)\.(?:lora_.+|base_layer\..+)")


def adapter_state(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """The tensors of an adapter under the names in its file, which are PEFT's if PEFT has this kind of adapter.

    Those of experts are of all experts, and not yet in PEFT's layout, see peft_experts.py. PiSSA and OLoRA become a
    plain LoRA of twice the rank, which computes the same.

    Args:
        name: of the adapter; None: the active adapter.
    """
    adapter = named_adapter(model, name)
    if adapter.config.adapter in BASELINES:
        return baseline_state(adapter)
    state = {}
    for path, module in adapter.modules.items():
        if not isinstance(module, LoRALinear):
            state |= {f"{PREFIX}{path}.{tensor}": own_tensor(module, tensor) for tensor in adapter.own[path]}
            continue
        lora_A, lora_B = module.factors()
        state |= {f"{PREFIX}{path}.lora_A.weight": lora_A, f"{PREFIX}{path}.lora_B.weight": lora_B}
        if isinstance(module, DoRALinear):
            state[f"{PREFIX}{path}.lora_magnitude_vector"] = module.whole_magnitude()
        if module.bias is not None:
            state[f"{PREFIX}{path}.base_layer.bias"] = module.bias
    return state


@saves_adapters
def save_adapter(
    model: nn.Module, directory: str | Path, base_model_name: str | None = None, name: str | None = None
) -> None:
    """Write an adapter of `model` so that `peft.PeftModel.from_pretrained(base_model, directory)` reads it.

    Args:
        base_model_name: the base model's name in the config (PEFT's `base_model_name_or_path`).
        name: of the adapter; None: the active adapter.

    Raises:
        ValueError: the model has no adapter, or no adapter of this name.
    """
    if not adapters(model):
        raise ValueError("the model has no adapter to save")
    adapter, state = named_adapter(model, name), adapter_state(model, name)
    if fits_peft(adapter):
        state = to_peft(model, of_experts(adapter), state, PREFIX)
    state = {key: tensor.detach().contiguous() for key, tensor in state.items()}
    file, config = _config_file(model, adapter, state, base_model_name)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / f".{WEIGHTS_FILE}.partial"
    save_tensors(state, partial, state_of(model).base_print)
    os.replace(partial, directory / WEIGHTS_FILE)
    partial = directory / f".{file}.partial"
    partial.write_text(json.dumps(config, indent=2) + "\n")
    os.replace(partial, directory / file)
    seal_files(directory, [file, WEIGHTS_FILE])


def _config_file(
    model: nn.Module, adapter: Adapter, state: dict[str, Tensor], base_model_name: str | None
) -> tuple[str, dict]:
    """The name and the content of the config file of `adapter`, whose tensors are `state`."""
    config = adapter.config
    if config.adapter not in BASELINES and fits_peft(adapter):
        adapted = [path for path, module in adapter.modules.items() if isinstance(module, LoRALinear)]
        return CONFIG_FILE, write_config(model, config, adapted, base_model_name)
    if not is_prompt_tuning(config):
        config = replace(config, experts=None, shared_factor="none")  # each expert has its own tensors in the file
        return OUR_CONFIG_FILE, our_config(config, base_model_name)
    [(tokens, d)] = (tensor.shape for tensor in state.values())
    heads = model.config.get_text_config().num_attention_heads
    peft = prompt_learning_config(model, "PROMPT_TUNING", tokens, d, heads)
    return CONFIG_FILE, peft | {"prompt_tuning_init": "RANDOM", "base_model_name_or_path": base_model_name}


@torch.no_grad()
def load_adapter(model: nn.Module, directory: str | Path, name: str | None = None) -> list[str]:
    """Attach the adapter that `save_adapter` or PEFT wrote to `directory`, and activate it.

    Args:
        directory: of the adapter, or a directory with several adapters in folders of their names.
        name: of the adapter on the model, "default" if not given. If the directory has several adapters, it also
            selects one.

    Returns:
        The full names of the adapted linears.

    Raises:
        ValueError: the directory has no adapter, or several and `name` selects none; or the adapter is unreadable, has
            a setting that is not supported, or does not fit the model. The model is then unchanged.

    Warns:
        OtherBase: `save_adapter` wrote it for another base model of the same shapes.
    """
    directory = _find(Path(directory), name)
    name = name or DEFAULT
    raw, tensors = _read(directory)
    active = prepare_to_add(model, name)
    try:
        if experts := experts_in_file(raw, all_linears(model)):
            tensors = from_peft(model, experts, tensors, PREFIX)
        config, names, own, unknown = _contents(model, raw, tensors)
        _check_sizes(config, tensors)
        add_adapter(model, name, config, names, own)
    except ValueError as error:
        give_up_adding(model, active)
        raise ValueError(f"{directory}: {error}") from error
    state = adapter_state(model, name)
    if wrong := _differences(state, tensors, left_out(model)) | unknown:
        detach(model, name)
        give_up_adding(model, active)
        if ranks := _other_ranks(state, tensors, wrong):
            raise ValueError(f"{directory}: {CONFIG_FILE} and {WEIGHTS_FILE} disagree: {_first_three(ranks)}")
        raise ValueError(f"{directory} is an adapter for another model: {_first_three(wrong)}")
    if is_other_base(base_of(directory / WEIGHTS_FILE), state_of(model).base_print):
        warnings.warn(f"{directory} was trained on another base model of the same shapes", OtherBase, stacklevel=2)
    for path in names:
        initialise(model.get_submodule(path), config.init)
    for key, tensor in state.items():
        tensor.copy_(tensors[key])
    trained = config.adapter == "bitfit" or config.modules_to_save or config.bias == "all"
    if not trained:  # PEFT also saves embeddings that were resized and not trained
        for path in own:
            model.get_submodule(path).requires_grad_(False)
    return names


def _check_sizes(config: AdapterConfig, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError, before memory is taken for it, if a size in `config` is far above the tensors'."""
    largest = max([LARGE_RANK, *(size for tensor in tensors.values() for size in tensor.shape)])
    sizes = {"rank": config.rank, "prefix_tokens": config.prefix_tokens, "infix_tokens": config.infix_tokens}
    for name, size in (sizes | (config.rank_pattern or {})).items():
        if size is not None and size > largest:
            raise ValueError(f"{name} is {size:,} in its settings, and no side of its tensors is above {largest:,}")


def _contents(
    model: nn.Module, raw: dict, tensors: dict[str, Tensor]
) -> tuple[AdapterConfig, list[str], dict[str, list[str]], dict[str, str]]:
    """Read a file for `model`.

    Returns:
        The settings, the full names of the adapted linears, the base's tensors that the file replaces (by module), and
        the errors of the file's tensors, by key.

    Raises:
        ValueError: a setting is not supported or does not fit the model.
    """
    if "adapter" in raw:
        config = read_our_config(raw)
        names = find_targets(model, config)
        return config, names, own_tensors(model, config, names), {}
    if raw.get("peft_type") == "PROMPT_TUNING":
        return read_prompt_tuning(raw), [], {}, {}
    config = read_config(raw)
    names = targets_in_file(model, raw, config)
    if raw.get("target_parameters"):
        config = replace(config, target_modules=names)
    own, unknown = _tensors_of_base(model, names, tensors)
    modules = [name for name, _ in model.named_modules()]
    there = [suffix for suffix in config.modules_to_save if any(matches([suffix], name) for name in modules)]
    # PEFT lists modules that only some classifiers have, such as `score`. Those that the model lacks are dropped.
    return replace(config, modules_to_save=there), names, own, unknown


def _find(directory: Path, name: str | None) -> Path:
    """The directory of the adapter `name`: `directory` itself, or a folder in it."""
    folders = sorted({path.parent.name for file in CONFIG_FILES for path in directory.glob(f"*/{file}")})
    if name in folders:
        return directory / name
    here = any((directory / file).is_file() for file in CONFIG_FILES)
    if not folders or (here and name == DEFAULT):
        return directory
    if not here and name is None and len(folders) == 1:
        return directory / folders[0]
    there = ", ".join([DEFAULT] * here + folders)
    raise ValueError(f"{directory} holds several adapters: give name=, one of {there}")


def _read(directory: Path) -> tuple[dict, dict[str, Tensor]]:
    """The content of the config file, and the tensors of the weights file."""
    config_file = OUR_CONFIG_FILE if (directory / OUR_CONFIG_FILE).is_file() else CONFIG_FILE
    for name in (config_file, WEIGHTS_FILE):
        if not (directory / name).is_file():
            pickled = (directory / "adapter_model.bin").is_file()
            instead = ": adapter_model.bin is a pickle, which can run code; save it as safetensors" if pickled else ""
            raise ValueError(f"{directory} holds no adapter: {name} is missing{instead}")
    name = config_file
    try:
        verify_file(directory / name)
        raw = dict(json.loads((directory / name).read_text()))
        name = WEIGHTS_FILE
        return raw, load_tensors(directory / name)
    except Damaged:
        raise
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{directory} holds no readable adapter: {name}: {error}") from error


def _tensors_of_base(
    model: nn.Module, adapted: list[str], tensors: dict[str, Tensor]
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The tensors of a file that replace the base's own: their names by module, and the errors of others, by key.

    PEFT also saves the base weight of an adapted output embedding. It is dropped from `tensors` if it is the model's.
    """
    own, unknown = {}, {}
    modules = dict(model.named_modules())
    for key, value in list(tensors.items()):
        if "lora_embedding" in key:
            raise ValueError(f"LoRA on an embedding is not supported: {key}")
        if key.endswith(".base_layer.weight"):
            weight = getattr(modules.get(key.removeprefix(PREFIX).removesuffix(".base_layer.weight")), "weight", None)
            if weight is not None and _same(weight.cpu(), value):
                del tensors[key]
            else:
                unknown[key] = "differs from the model's weight"
            continue
        if layer := _LAYER.match(key):
            if layer[1] not in modules:
                unknown[key] = "is not in the model"
            continue
        path, _, tensor = key.removeprefix(PREFIX).rpartition(".")
        module = modules.get(path)
        if not key.startswith(PREFIX) or path in adapted or getattr(module, tensor, None) is None:
            unknown[key] = "is not in the model"
        else:
            own.setdefault(path, []).append(tensor)
    return own, unknown


def _same(weight: Tensor, value: Tensor) -> bool:
    """True if the tensors are equal, or one is the other rounded to a lower precision."""
    return torch.equal(weight.to(value.dtype), value) or torch.equal(weight, value.to(weight.dtype))


def _differences(state: dict[str, Tensor], tensors: dict[str, Tensor], reasons: dict[str, str]) -> dict[str, str]:
    """The differences in keys and shapes between the file's `tensors` and the adapter's `state`, by key.

    Args:
        reasons: why linears get no adapter here, by full name.
    """
    wrong = {}
    for key in [*state, *(key for key in tensors if key not in state)]:
        if key not in tensors:
            wrong[key] = "is not in the file"
        elif key not in state:
            reason = reasons.get(key.removeprefix(PREFIX).partition(".lora_")[0])
            why = f"that linear gets no adapter: {reason}" if reason else f"{CONFIG_FILE} puts no adapter there"
            wrong[key] = f"is in the file, but {why}"
        elif state[key].shape != tensors[key].shape:
            wrong[key] = f"is {list(tensors[key].shape)} in the file, {list(state[key].shape)} in the model"
    return wrong


def _other_ranks(state: dict[str, Tensor], tensors: dict[str, Tensor], wrong: Iterable[str]) -> dict[str, str]:
    """An error for each layer whose rank in the weights differs from the config; empty if anything else is wrong."""
    found = {}
    for key in wrong:
        layer, _, factor = key.partition(".lora_")
        axis = {"A.weight": 0, "B.weight": 1}.get(factor)
        if axis is None or key not in state or key not in tensors or tensors[key].dim() != 2:
            return {}
        ours, theirs = state[key].shape, tensors[key].shape
        if ours[1 - axis] != theirs[1 - axis]:
            return {}
        found[layer] = f"has rank {ours[axis]} in the first and {theirs[axis]} in the second"
    return found


def _first_three(wrong: dict[str, str]) -> str:
    first = "; ".join(f"{key.removeprefix(PREFIX)} {error}" for key, error in list(wrong.items())[:3])
    return first + (f"; … {len(wrong)} in all" if len(wrong) > 3 else "")
