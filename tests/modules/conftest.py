import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture
def llama():
    """A seeded random Llama of two layers, 14 decoder linears."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=99,
    )
    return LlamaForCausalLM(config)
