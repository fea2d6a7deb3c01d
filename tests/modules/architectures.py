"""Small random models of real architectures, dense and as transformers and bitsandbytes pack them in NF4."""

import copy
import functools
import tempfile

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from modules.files.bitsandbytes import by_definition

_WIDTHS = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
# Rows of whole blocks: with AVX-512 bitsandbytes 0.50.2 dequantizes others wrongly (rows of 96 in blocks of 64).
_DECODER = _WIDTHS | {"intermediate_size": 128, "num_key_value_heads": 2}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_DECODER, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=99, n_embd=64, n_layer=2, n_head=4, n_positions=32, **_SPECIAL)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_DECODER, head_dim=16)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**_DECODER, head_dim=16, layer_types=["sliding_attention", "full_attention"], sliding_window=4)
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(**_WIDTHS, ffn_dim=128, word_embed_proj_dim=64, max_position_embeddings=32)
    ),
}
ARCHITECTURES = tuple(_MODELS)
IDS = torch.arange(3, 24).view(3, 7)


@functools.cache
def _dense(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = _MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms that matter
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@functools.cache
def _bnb4(name: str) -> nn.Module:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    with tempfile.TemporaryDirectory() as directory:
        _dense(name).save_pretrained(directory)
        model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=config, dtype=torch.float32)
        return by_definition(model.eval())


def dense_model(name: str) -> nn.Module:
    """A fresh copy of the architecture's model, fp32, in evaluation mode."""
    return copy.deepcopy(_dense(name))


def bnb4_model(name: str) -> nn.Module:
    """The same model with its linears in bitsandbytes' NF4 with double quantization."""
    return copy.deepcopy(_bnb4(name))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


@torch.no_grad()
def scramble(model: nn.Module, seed: int = 1) -> None:
    """Move every parameter that trains, so that an adapter changes the output of the model."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter)).add_(0.05 * torch.randn_like(parameter))
