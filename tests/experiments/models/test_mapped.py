"""Casting a model out of its mapped file gives what transformers casts."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from experiments.models import mapped


@pytest.fixture
def directory(tmp_path):
    config = LlamaConfig(
        **{"vocab_size": 3001, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "tie_word_embeddings": True},
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def test_cast(directory):
    assert mapped.stored_dtype(directory) == torch.float32
    stored = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    before = {name: value.clone() for name, value in stored.state_dict().items()}
    cast = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert mapped._mapped_files()
    mapped.cast(cast, torch.bfloat16)
    want = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    assert cast.dtype == cast.config.dtype == torch.bfloat16
    assert cast.lm_head.weight is cast.model.embed_tokens.weight
    for name, value in want.state_dict().items():
        assert torch.equal(cast.state_dict()[name], value)
    for (name, have), should in zip(cast.named_buffers(), want.buffers()):
        assert torch.equal(have, should) and have.dtype == should.dtype, name
    for name, value in before.items():  # pages that were let go are read from the file again
        assert torch.equal(stored.state_dict()[name], value)


def test_no_single_dtype(directory, tmp_path):
    assert mapped.stored_dtype(tmp_path / "nothing") is None
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2), "b": torch.ones(2).half()}, directory / "more.safetensors")
    assert mapped.stored_dtype(directory) is None
