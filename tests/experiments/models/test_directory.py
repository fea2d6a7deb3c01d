"""A directory that lacks weights, has others, or holds more than the model is refused, and the tensors are named."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments.config import ModelConfig
from experiments.errors import UserError
from experiments.models.load import load_model
from tests.experiments.helpers import tiny

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def directory(tmp_path):
    model, tokenizer = tiny()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def load(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return load_model(ModelConfig(name="hf", source="hf", path=str(directory)), torch.float32, seed=0)[0]


def test_missing_weights(directory):
    with pytest.raises(UserError, match=f"lacks weights of LlamaForCausalLM: {UP}. Training would begin with random"):
        load(directory, lambda tensors: tensors.pop(UP))


def test_other_names(directory):
    def rename(tensors):
        for name in list(tensors):
            tensors[f"transformer.{name}"] = tensors.pop(name)

    with pytest.raises(UserError, match=r"lacks weights of LlamaForCausalLM: .*, … 21 in all\. Training"):
        load(directory, rename)


def test_another_shape(directory):
    with pytest.raises(UserError, match=r"up_proj.weight has the shape \[64, 64\], and config.json means \[128, 64\]"):
        load(directory, lambda tensors: tensors.update({UP: torch.zeros(64, 64)}))


def test_tensors_that_nobody_reads(directory):
    with pytest.raises(UserError, match=r"tensors that LlamaForCausalLM does not read: score.weight\. Name the right"):
        load(directory, lambda tensors: tensors.update({"score.weight": torch.zeros(2, 64)}))


def test_frequencies_in_old_files_are_no_weights(directory):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    model = load(directory, lambda tensors: tensors.update({name: torch.zeros(8)}))
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, tiny()[0].model.layers[1].mlp.up_proj.weight)
