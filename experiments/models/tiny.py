"""A tiny model and a tokenizer of bytes, which need no files: they know nothing."""

import tokenizers
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<|im_start|>", "<|im_end|>"]
LEAST = 256 + len(SPECIALS)  # tokens: a byte each, and these


def byte_tokenizer(size: int = LEAST) -> PreTrainedTokenizerBase:
    """A tokenizer of `size` tokens. No text has the tokens beyond the bytes and SPECIALS."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    unused = [f"<|unused_{i}|>" for i in range(size - LEAST)]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *unused])}
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    raw.add_special_tokens(SPECIALS)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=SPECIALS[1], pad_token=SPECIALS[1])
    tokenizer.chat_template = CHATML
    return tokenizer


def tiny_model(dtype: torch.dtype, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A random two-layer Llama with a tokenizer of bytes: for tests, it knows nothing."""
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    for parameter in model.parameters():  # and no buffer: as transformers loads, rotary frequencies stay in fp32
        parameter.data = parameter.data.to(dtype)
    return model, tokenizer
