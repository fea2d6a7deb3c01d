"""Load and save models in 4 bits in the format of transformers and bitsandbytes, without needing bitsandbytes.

The weights of packed linears are as packed_weight.py describes. All other tensors are as in a dense model's directory.
config.json has a `quantization_config`.

Packed experts, and data types that bitsandbytes lacks, are written in the same way, the experts of a layer as one
weight [experts, out, in]. Their `quant_method` is not bitsandbytes' but OURS, so that transformers refuses them.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kernels.codebook import BITSANDBYTES_TYPES, CODEBOOKS
from modules.adapters.model_code import left_out
from modules.adapters.state import replace_module, state_of
from modules.adapters.targets import wrapped_linears
from modules.experts import NF4Experts, experts_weights, take_over_experts
from modules.files.checked import Damaged, seal_directory, verify_file
from modules.files.conversion import are_joined, bring_into_memory
from modules.files.packed_weight import is_packed, packed_tensors, read_packed
from modules.files.tensors import TensorFiles, describe
from modules.linear import NF4Linear, weight_of

OURS = "qdora"
ROTARY = r"rotary_emb\.inv_freq$"  # files of old transformers hold it, but it is computed from the config


def quantization_of(directory: str | Path) -> dict | None:
    """The `quantization_config` of a model directory's config.json; None if its weights are dense.

    Raises:
        ValueError: config.json is missing or unreadable.
    """
    path = Path(directory) / "config.json"
    try:
        verify_file(path)
        config = json.loads(path.read_text(encoding="utf-8"))
    except Damaged:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} cannot be read: it is not a JSON object")
    return config.get("quantization_config")


def load_bnb4(directory: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a causal language model that transformers and bitsandbytes, `save_bnb4` or `save_packed` saved in 4 bits.

    Codes and constants are copied from the memory-mapped files into `NF4Linear`s. No packed weight is ever unpacked.

    Args:
        dtype: of everything that is not packed, and to compute in. The default is the files' dtype.

    Returns:
        The model on the CPU in evaluation mode.

    Raises:
        ValueError: the model is packed in another way, or a tensor is missing, damaged or does not fit the model. The
            message names the tensor.
    """
    directory = Path(directory)
    quant_type = _quant_type(directory)
    files = TensorFiles(directory)
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except OSError as error:
        raise ValueError(f"{directory}: {error}") from error
    del config.quantization_config  # or transformers takes the model for one that its own quantizer made
    with _parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype or torch.float32)
    bring_into_memory(files, model)
    packed = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and is_packed(files, f"{name}.weight")
    }
    experts = [name for name in experts_weights(model) if is_packed(files, f"{name}.weight")]
    if not packed and not experts:
        raise ValueError(f"{directory}: config.json says that linears are packed, but none of the model's is")
    stay_dense = left_out(model)  # bitsandbytes packs them all the same
    _load_dense(model, files, {f"{name}.weight" for name in packed} | set(experts))
    for name, module in packed.items():
        shape = module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
        weight = read_packed(files, f"{name}.weight", shape, quant_type)
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
        weight = read_packed(files, f"{name}.weight", dense.weight.shape, quant_type)
        linear = NF4Experts(weight.values, weight.quant_state, dense.bias, dense.in_out)
        replace_module(model, name, linear if dtype is None else linear.to(dtype))
    expected_leftovers = [*(model._keys_to_ignore_on_load_unexpected or ()), ROTARY]
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


def save_bnb4(model: PreTrainedModel, directory: str | Path) -> None:
    """Write `model` so that transformers and bitsandbytes load it. Packed linears are written as they are.

    Raises:
        ValueError: as `save_packed`; or experts are packed, or linears in a data type that bitsandbytes lacks.
    """
    packed = _packed(model)
    if experts := [name for name, linear in packed.items() if isinstance(linear, NF4Experts)]:
        raise ValueError(f"{experts[0]} is packed, and bitsandbytes has no packed experts")
    if (quant_type := _one_type(packed)) not in BITSANDBYTES_TYPES:
        raise ValueError(f"packed in {quant_type}: bitsandbytes supports one of {', '.join(BITSANDBYTES_TYPES)}")
    save_packed(model, directory)


def save_packed(model: PreTrainedModel, directory: str | Path) -> None:
    """Write `model` so that `load_bnb4` loads it; transformers and bitsandbytes too, if they can have such weights.

    Raises:
        ValueError: `directory` exists, the model has an adapter, no linear is packed, or the linears are packed in
            several data types. Nothing is written then.
    """
    directory = Path(directory)
    packed = _packed(model)
    quant_type = _one_type(packed)
    state = state_of(model)
    if wrapped_linears(model) or (state is not None and state.active is not None):
        raise ValueError("a directory of a packed model cannot hold adapters: detach or merge them first")
    if directory.exists():
        raise ValueError(f"{directory} exists already: nothing is overwritten")
    tensors = model.state_dict()
    for name, linear in packed.items():
        for key in linear.state_dict().keys() - {"bias", "_bias"}:
            del tensors[f"{name}.{key}"]
        tensors |= {f"{name}.{key}": tensor for key, tensor in packed_tensors(weight_of(linear)).items()}
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    ours = quant_type not in BITSANDBYTES_TYPES or any(isinstance(linear, NF4Experts) for linear in packed.values())
    if ours:
        settings = {"quant_method": OURS, "quant_type": quant_type}
    else:
        settings = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": quant_type,
            "bnb_4bit_use_double_quant": any(linear.quant_state.nested for linear in packed.values()),
            "bnb_4bit_compute_dtype": str(model.dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
            # transformers treats every other linear as packed
            "llm_int8_skip_modules": [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)],
        }
    model.config.quantization_config = settings
    try:
        partial.mkdir(parents=True)
        joined = are_joined(model, [f"{name}.weight" for name in packed])
        model.save_pretrained(partial, state_dict=tensors, save_original_format=not joined)
        seal_directory(partial)
        os.rename(partial, directory)
    finally:
        del model.config.quantization_config
        shutil.rmtree(partial, ignore_errors=True)


def _packed(model: nn.Module) -> dict[str, NF4Linear]:
    """The packed linears of `model`. ValueError: there are none."""
    packed = {name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    if not packed:
        raise ValueError("no linear of the model is packed: quantize it first")
    return packed


def _one_type(packed: dict[str, NF4Linear]) -> str:
    """The data type of `packed` linears. ValueError: they have several."""
    quant_type, *others = sorted({linear.quant_type for linear in packed.values()})
    if others:
        raise ValueError(f"packed in {', '.join([quant_type, *others])}: all linears must have one data type")
    return quant_type


def by_definition(model: nn.Module) -> nn.Module:
    """Make the bitsandbytes linears in `model` compute with the weights that their codes stand for; returns the model.

    On a CPU bitsandbytes 0.50 computes with others: it dequantizes wrongly if rows are not a whole number of blocks,
    and in evaluation mode with AVX-512 and bf16 it repacks weights for a kernel that rounds absmax to bf16.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            module.register_forward_hook(_by_definition)
    return model


def _by_definition(linear: nn.Module, inputs: tuple[Tensor], _: Tensor) -> Tensor:
    """Forward hook of a bitsandbytes linear: the result by the definition of its format."""
    from bitsandbytes.functional import dequantize_blockwise  # only a model that it has loaded needs it

    state, codes = linear.weight.quant_state, linear.weight.data.view(torch.uint8).flatten()
    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(absmax, state.state2).float() + state.offset
    values = state.code.to(codes.device)[torch.stack([codes >> 4, codes & 15], dim=1).flatten().long()]
    n = state.shape.numel()
    weight = (values[:n] * absmax.float().repeat_interleave(state.blocksize)[:n]).view(state.shape)
    x, bias = inputs[0], linear.bias
    weight = weight.to(state.dtype).to(x.dtype)
    return nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _quant_type(directory: Path) -> str:
    """The 4-bit data type in config.json.

    Raises:
        ValueError: the weights are dense, or packed in another way than ours and bitsandbytes' NF4 and FP4.
    """
    found = quantization_of(directory)
    if found is None:
        raise ValueError(f"{directory}: config.json has no quantization_config: the weights are not packed")
    if found.get("quant_method") == OURS:
        if found.get("quant_type") not in CODEBOOKS:
            raise ValueError(f"{directory}: quant_type is {found.get('quant_type')}, not one of {', '.join(CODEBOOKS)}")
        return found["quant_type"]
    if found.get("quant_method") != "bitsandbytes" or not found.get("load_in_4bit"):
        kind = found.get("quant_method", "an unknown method") if not found.get("load_in_8bit") else "8-bit bitsandbytes"
        raise ValueError(f"{directory}: the weights are packed with {kind}; only bitsandbytes' NF4 and FP4 can be read")
    quant_type = found.get("bnb_4bit_quant_type", "fp4")
    if quant_type not in BITSANDBYTES_TYPES:
        raise ValueError(f"{directory}: bnb_4bit_quant_type is {quant_type}, not {' or '.join(BITSANDBYTES_TYPES)}")
    return quant_type


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
