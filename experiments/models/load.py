"""Load a causal language model and its tokenizer; pack it and attach adapters as a run's configuration says.

    python -m experiments.models        unpacks the default model into the cache

A directory that transformers and bitsandbytes saved in 4 bits is loaded as it is packed, see
modules/files/bitsandbytes.py; a GGUF file through the cache (gguf.py).
"""

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiments.blocks.quant_map import blocksizes
from experiments.config import Config, ModelConfig, adapter_settings
from experiments.data.samples import batches, collate, load_data
from experiments.data.tokens import limit_tokens
from experiments.errors import UserError
from experiments.models.directory import load_directory, model_directory
from experiments.models.random_model import random_model
from experiments.models.tiny import tiny_model
from experiments.system import parallel
from experiments.system.progress import bar
from modules import AdapterConfig, NF4Linear, adapted_linears, attach, decoder_linears, fuse, quantize
from modules.adapters.base_print import base_print
from modules.adapters.config import REACHED, quantized_start
from modules.adapters.model_code import left_out, unknown_experts
from modules.adapters.targets import biased_modules, decoder_blocks
from modules.fused import compute_mlps_in_parts
from modules.linear import weight_shape
from modules.mixtures import AllExperts, take_over_experts

CALIBRATION_BATCHES = 8  # that init=eva looks at


def load_model(cfg: ModelConfig, dtype: torch.dtype, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model on the CPU in `dtype`, in evaluation mode, and its tokenizer, which has a pad token.

    Raises:
        UserError: there is nothing to load.
    """
    sources = ("wheel", "gguf", "hf")
    if cfg.weights is not None:
        model, tokenizer = random_model(cfg, dtype, seed, torch.device("cpu"))
    elif cfg.source == "tiny":
        model, tokenizer = tiny_model(dtype, seed)
    elif cfg.source in sources:
        model, tokenizer = load_directory(model_directory(cfg), dtype)
    elif cfg.source == "preset":
        raise UserError(
            f"model={cfg.name} has shapes for experiments.plan but no weights: use model=hf model.path=DIR, or "
            "model.weights=random to try speed and memory"
        )
    else:
        raise UserError(f"model.source={cfg.source}: choose {', '.join(sources)} or tiny")
    return _ready(model, tokenizer)


def _ready(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    fit_tokenizer(tokenizer, model)
    fuse(model)
    return model.eval(), tokenizer


def _load(cfg: Config, dtype: torch.dtype, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As `load_model`; but random weights are made on `device`, and packed as they come."""
    if cfg.model.weights is None:
        return load_model(cfg.model, dtype, cfg.seed)
    quant = None if cfg.quant.name == "none" or quantized_start(cfg.init) else cfg.quant
    return _ready(*random_model(cfg.model, dtype, cfg.seed, device, quant))


def fit_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Give the tokenizer a pad token that the model has an embedding for, if it has none, and have text with tokens
    beyond the model's embeddings refused.

    Raises:
        UserError: no special token that could pad.
    """
    known = model.get_input_embeddings().weight.shape[0]
    limit_tokens(tokenizer, known)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= known:
        special = [tokenizer.eos_token_id, *sorted(tokenizer.all_special_ids), *sorted(tokenizer.added_tokens_decoder)]
        fitting = [token for token in special if token is not None and token < known]
        if not fitting:
            raise UserError(
                f"{tokenizer.name_or_path}: the tokenizer has neither pad nor other special tokens among the model's "
                f"{known} embeddings: give it one that fills short samples up, tokenizer.pad_token = …"
            )
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(fitting[0])


def load_base(cfg: Config, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The configured model on the CPU, packed if the configuration says so, without adapters, and its tokenizer.

    Args:
        dtype: of the weights that are not packed, and to compute in.
    """
    model, tokenizer = _load(cfg, dtype, torch.device("cpu"))
    _quantize(cfg, model)
    return model, tokenizer


def _quantize(cfg: Config, model: PreTrainedModel) -> None:
    """Pack the decoder as `cfg.quant` says. A model that is packed on disk must be so already, and stays as it is."""
    packed = {name: linear for name, linear in decoder_linears(model).items() if isinstance(linear, NF4Linear)}
    if not packed:
        if cfg.quant.name != "none":
            take_over_experts(model)
            shapes = {name: weight_shape(linear) for name, linear in decoder_linears(model).items()}
            sizes = blocksizes(cfg.quant, shapes, base_print(model))
            quantize(model, sizes, cfg.quant.double, bar("quantizing"), cfg.quant.type)
            release_file(model)
        return
    if cfg.quant.name == "none":
        raise UserError(
            f"model.path={cfg.model.path} is packed in four bits, and method={cfg.method.name} needs a dense model: "
            "choose +method=qlora or +method=qdora"
        )
    expected = blocksizes(cfg.quant, {name: weight_shape(linear) for name, linear in packed.items()})
    for name, linear in packed.items():
        blocksize, double = linear.blocksize, linear.quant_state.nested
        if linear.quant_type != cfg.quant.type:
            raise UserError(
                f"model.path={cfg.model.path}: {name} is packed in {linear.quant_type}, not in {cfg.quant.type}: "
                f"choose quant={linear.quant_type}"
            )
        if (blocksize, double) != (expected[name], cfg.quant.double):
            raise UserError(
                f"model.path={cfg.model.path}: {name} is packed with blocksize {blocksize} and "
                f"{'' if double else 'no '}double quantization: set quant.blocksize={blocksize} "
                f"quant.double={str(double).lower()}"
            )


def release_file(model: PreTrainedModel) -> None:
    """Copy the parameters that `model` still has in its memory-mapped file. As long as one is in use the whole file
    stays mapped, the dense weights that were packed included, and counts as this process's memory."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def prepare_model(
    cfg: Config, device: torch.device, dtype: torch.dtype, base: Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The configured model as training starts from it, with its adapters, on `device`, and its tokenizer.

    Args:
        base: a directory with the configured model packed in NF4 as `cfg.quant` says (experiments/runs/shared_base.py).
    """
    if base is None:
        model, tokenizer = _load(cfg, weights_dtype(cfg, dtype), device)
    else:
        packed = ModelConfig(name=cfg.model.name, source="hf", path=str(base))
        model, tokenizer = load_model(packed, weights_dtype(cfg, dtype), cfg.seed)
    adapt(cfg, model, tokenizer, device)
    return model, tokenizer


def weights_dtype(cfg: Config, dtype: torch.dtype) -> torch.dtype:
    """The dtype to load weights in, to compute in `dtype`. Weights that train are kept in fp32: small updates would
    round to nothing in bf16."""
    return torch.float32 if cfg.method.adapter == "none" else dtype


def adapt(cfg: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, device: torch.device) -> None:
    """Pack `model` and put adapters on it as `cfg` says, in place, and bring it to `device`.

    Args:
        tokenizer: for init=eva and experts=reached alone, which read data.
    """
    _check_positions(cfg, model)
    if quantized_start(cfg.init):  # it begins with the error of packing
        _attach(cfg, model, tokenizer)
        _quantize(cfg, model)
        model.to(device)
    else:
        _quantize(cfg, model)
        model.to(device)
        if cfg.method.adapter != "none":
            _attach(cfg, model, tokenizer)
    if cfg.trainer.mlp_tokens:
        _in_parts(model, cfg.trainer.mlp_tokens)


def _in_parts(model: PreTrainedModel, tokens: int) -> None:
    """Have MLPs compute so many tokens at a time, and print which of them cannot.

    Raises:
        UserError: none can.
    """
    found, told = compute_mlps_in_parts(model, tokens), f"trainer.mlp_tokens={tokens}: "
    whole = {name.rpartition(".")[0] for name in unknown_experts(model)}
    whole |= {name for name, module in model.named_modules() if isinstance(module, AllExperts)}
    with contextlib.suppress(ValueError):  # the model has no decoder blocks
        inside = found + list(whole)
        whole |= {
            one for one in decoder_blocks(model)[1] if not any(f"{name}.".startswith(f"{one}.") for name in inside)
        }
    names = ", ".join(sorted({type(model.get_submodule(name)).__name__ for name in whole})) or type(model).__name__
    if not found:
        raise UserError(f"{told}no MLP of {names} can be computed in parts: leave it out")
    if whole and parallel.is_main():
        print(f"{told}{names} still compute all tokens at once")


def _check_positions(cfg: Config, model: PreTrainedModel) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    positions = math.inf if positions < 0 else positions  # XLNet has relative ones
    if cfg.data.max_length + cfg.prefix_tokens + cfg.infix_tokens <= positions:
        return
    beside = ""
    if cfg.prefix_tokens or cfg.infix_tokens:
        beside = f" beside prefix_tokens={cfg.prefix_tokens} and infix_tokens={cfg.infix_tokens}"
    raise UserError(
        f"data.max_length={cfg.data.max_length}{beside} is more than the {positions} positions of {cfg.model.name}"
    )


def _attach(cfg: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    more = {}
    if cfg.init == "eva" or cfg.experts == REACHED:
        more["calibration"] = _calibration(cfg, model, tokenizer)
    if cfg.init.startswith(("pissa", "olora")):
        more["progress"] = bar("initialising")
    if cfg.method.adapter == "bitfit" and not biased_modules(model):
        linears = len(decoder_linears(model))
        print(f"{cfg.model.name} has no biases to train: each of its {linears} linears gets one, which starts at zero")
    try:
        attach(model, cfg.method.adapter, **adapter_settings(cfg), **more)
    except ValueError as error:
        raise UserError(str(error)) from error
    say_left_out(cfg, model)
    fuse(model)  # again: now there are adapters that can be computed together


def say_left_out(cfg: Config, model: PreTrainedModel) -> None:
    """Print, in a line for each reason, which linears the method leaves as they are."""
    if not parallel.is_main():
        return
    reasons: dict[str, list[str]] = {}
    for name, reason in left_out(model).items():
        reasons.setdefault(reason, []).append(name)
    how = "not adapted" if cfg.quant.name == "none" else "neither packed nor adapted"
    for reason, names in reasons.items():
        print(f"{how}: {_ends(names)}: {reason}")
    if values := unknown_experts(model):
        print(f"{how}: {_unknown(values)} stay dense and untrained")
    asked = AdapterConfig(cfg.method.adapter, **adapter_settings(cfg))
    if narrow := [name for name, layer in adapted_linears(model).items() if layer.rank < asked.rank_of(name)]:
        print(f"of the largest rank they can have: {_ends(narrow)}")


def take_experts(model: PreTrainedModel) -> None:
    """Have the experts of `model` among its linears, and print how many weights of others are not."""
    take_over_experts(model)
    if values := unknown_experts(model):
        print(f"left out: {_unknown(values)}")


def _unknown(values: dict[str, int]) -> str:
    return f"experts of a class not known here, {_ends(values)}: {sum(values.values()):,} weights"


def _ends(names: Iterable[str]) -> str:
    """The last parts of names, and how many there are of each."""
    counts = Counter(name.rpartition(".")[2] for name in names)
    return ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))


def _calibration(cfg: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[dict]:
    """The first training batches, as keyword arguments of the model."""
    stream = batches(load_data(cfg.data, tokenizer, trains=True).train, cfg.trainer.batch_size, cfg.seed)
    collated = [collate(batch, tokenizer.pad_token_id) for batch in itertools.islice(stream, CALIBRATION_BATCHES)]
    return [
        {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")} | {"use_cache": False}
        for batch in collated
    ]
