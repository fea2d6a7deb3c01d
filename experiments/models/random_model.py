"""A model of the configured shapes with random weights: for speed and memory. It knows nothing."""

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiments.blocks.quant_map import blocksizes
from experiments.config import ModelConfig, QuantConfig
from experiments.errors import UserError
from experiments.models.architecture import meta_model
from experiments.models.directory import TOKENIZERS, load_tokenizer, model_directory
from experiments.models.random_weights import fill
from experiments.models.tiny import LEAST, byte_tokenizer
from experiments.system import parallel
from experiments.system.quiet import quiet
from modules import decoder_linears
from modules.adapters.state import replace_module
from modules.experts import pack_linear
from modules.linear import weight_shape
from modules.mixtures import give_back_experts, take_over_experts


def random_model(
    cfg: ModelConfig, dtype: torch.dtype, seed: int, device: torch.device, quant: QuantConfig | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model on `device`, and its tokenizer: that of its directory if there is one, else one of bytes.

    The same seed gives the same bits on every device.

    Args:
        quant: pack each decoder linear so once it is made: no two are there in full.
    """
    model = meta_model(cfg, dtype)
    take_over_experts(model)
    linears = decoder_linears(model)
    sizes = blocksizes(quant, {name: weight_shape(linear) for name, linear in linears.items()}) if quant else {}
    tokenizer, kind = _tokenizer(cfg, model.get_input_embeddings().num_embeddings)

    def pack(name: str, module: nn.Module) -> None:
        if name in sizes:
            replace_module(model, name, pack_linear(module, sizes[name], quant.double, quant.type))

    fill(model, device, seed, pack)
    if not sizes:
        give_back_experts(model)
    if parallel.is_main():
        print(f"{cfg.name} has random weights, and {kind}: for speed and memory, it knows nothing")
    return model, tokenizer


def _tokenizer(cfg: ModelConfig, embeddings: int) -> tuple[PreTrainedTokenizerBase, str]:
    if cfg.source in ("wheel", "hf", "gguf"):
        path = model_directory(cfg, weights=False)
        if path.is_dir() and any(any(Path(path).glob(pattern)) for pattern in TOKENIZERS):
            with quiet():
                return load_tokenizer(path), "its own tokenizer"
    if embeddings < LEAST:
        raise UserError(
            f"model={cfg.name}: model.weights=random takes a tokenizer of bytes, whose {LEAST} tokens are more than "
            f"the vocabulary's {embeddings}"
        )
    return byte_tokenizer(embeddings), f"a tokenizer of bytes with {embeddings:,} tokens"
