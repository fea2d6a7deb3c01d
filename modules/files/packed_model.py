"""Load a model whose linears are packed in its files. The formats are in the files beside this one."""

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kernels import Weight
from modules.adapters.model_code import left_out
from modules.adapters.state import replace_module
from modules.experts import NF4Experts
from modules.files.checked import Damaged, verify_file
from modules.files.conversion import bring_into_memory
from modules.files.packed_experts import read_experts
from modules.files.tensors import TensorFiles, describe
from modules.linear import NF4Linear
from modules.mixtures import experts_weights, take_over_experts

ROTARY = r"rotary_emb\.inv_freq$"  # files of old transformers hold it, but it is computed from the config
MODELOPT_FILE = "hf_quant_config.json"


def quantization_of(directory: str | Path) -> dict | None:
    """The `quantization_config` of a model directory's config.json, or the one in ModelOpt's own file; None if its
    weights are dense.

    Raises:
        ValueError: config.json is missing, or a file is unreadable.
    """
    config = _json(Path(directory) / "config.json")
    if config.get("quantization_config") is None and (Path(directory) / MODELOPT_FILE).is_file():
        return {"quant_method": "modelopt"} | _json(Path(directory) / MODELOPT_FILE).get("quantization", {})
    return config.get("quantization_config")


def _json(path: Path) -> dict:
    try:
        verify_file(path)
        config = json.loads(path.read_text(encoding="utf-8"))
    except Damaged:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} cannot be read: it is not a JSON object")
    return config


def load_packed(
    directory: Path,
    dtype: torch.dtype | None,
    is_packed: Callable[[TensorFiles, str], bool],
    read: Callable[[TensorFiles, str, torch.Size, torch.dtype], Weight],
    leftovers: tuple[str, ...] = (),
    ends: tuple[str, ...] = (),
) -> PreTrainedModel:
    """Load a causal language model with packed linears.

    Codes and constants are copied from the memory-mapped files into `NF4Linear`s. No packed weight is ever unpacked.

    Args:
        dtype: of everything that is not packed, and to compute in. The default is the files' dtype.
        is_packed: called with the files and the full name of a linear, or of a layer's linears of experts.
        read: the packed weight of such linears, called with their shape and dtype too.
        leftovers: patterns of the names of tensors that may stay unread.
        ends: how the names of a packed linear's tensors end, where each expert may have packed linears of its own.

    Returns:
        The model on the CPU in evaluation mode.

    Raises:
        ValueError: a tensor is missing, damaged or does not fit the model. The message names the tensor.
    """
    files = TensorFiles(directory)
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except OSError as error:
        raise ValueError(f"{directory}: {error}") from error
    if hasattr(config, "quantization_config"):  # or transformers takes the model for one that its own quantizer made
        del config.quantization_config
    with _parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype or torch.float32)
    of_experts = bring_into_memory(files, model, ends)
    packed = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and is_packed(files, name)
    }
    experts = [name for name in experts_weights(model) if name in of_experts or is_packed(files, name)]
    if not packed and not experts:
        raise ValueError(f"{directory}: config.json says that linears are packed, but none of the model's is")
    stay_dense = left_out(model)  # others pack them all the same
    _load_dense(model, files, {f"{name}.weight" for name in packed} | set(experts))
    for name, module in packed.items():
        shape = module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
        weight = read(files, name, shape, module.weight.dtype)
        linear = NF4Linear(weight.values, weight.quant_state, module.bias, conv1d=isinstance(module, Conv1D))
        linear = linear if dtype is None else linear.to(dtype)
        if name in stay_dense:
            module.weight = linear.dequantize().weight
        else:
            replace_module(model, name, linear)
    if experts:
        take_over_experts(model)
    for name in experts:
        dense = model.get_submodule(name)
        if name in of_experts:
            weight = read_experts(files, of_experts[name], dense.weight.shape, dense.weight.dtype, read)
        else:
            weight = read(files, name, dense.weight.shape, dense.weight.dtype)
        linear = NF4Experts(weight.values, weight.quant_state, dense.bias, dense.in_out)
        replace_module(model, name, linear if dtype is None else linear.to(dtype))
    expected_leftovers = [*(model._keys_to_ignore_on_load_unexpected or ()), ROTARY, *leftovers]
    for name in sorted(files.unread()):
        if not any(re.search(pattern, name) for pattern in expected_leftovers):
            raise ValueError(f"{files.path(name)}: {name} belongs to no tensor of {type(model).__name__}")
    if (directory / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
        except Exception as error:  # values of other types end in any error
            told = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ValueError(f"{directory / 'generation_config.json'} cannot be read: {told}") from error
    return model.eval()


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules created in this context have their parameters on the meta device.

    Their buffers are real, because no file holds the buffers that are computed from the config.
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def _load_dense(model: nn.Module, files: TensorFiles, packed: set[str]) -> None:
    """Fill every parameter and persistent buffer of `model`, except those named in `packed`, in its dtype."""
    names_of: dict[int, list[str]] = {}  # tied parameters are one tensor with several names
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        names_of.setdefault(id(tensor), []).append(name)
    for names in names_of.values():
        if not packed.isdisjoint(names):
            if len(names) > 1:
                raise ValueError(f"{files.directory}: {names[-1]} is packed, but config.json ties it to {names[0]}")
            continue
        old = state[names[0]]
        first, *others = [name for name in names if name in files] or names[:1]
        value = files.read(first, None if old.is_floating_point() else old.dtype, old.shape)
        if value.is_floating_point() != old.is_floating_point():
            raise ValueError(f"{files.path(first)}: {first} is {describe(value.dtype, value.shape)}, not floats")
        for name in others:
            if not torch.equal(files.read(name), value):
                raise ValueError(f"{files.path(name)}: {name} differs from {first}, but config.json ties them")
        value = value.to(old.dtype)
        if isinstance(old, nn.Parameter):
            value = nn.Parameter(value, old.requires_grad)
        for name in names:
            parent, _, leaf = name.rpartition(".")
            module = model.get_submodule(parent)
            (module._parameters if isinstance(old, nn.Parameter) else module._buffers)[leaf] = value
