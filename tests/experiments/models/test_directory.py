"""A directory that lacks weights, has others, or holds more than the model is refused, and the tensors are named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments.config import ModelConfig
from experiments.errors import UserError
from experiments.models.directory import load_directory
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

    with pytest.raises(UserError, match=r"lacks .*, … 21 in all, and holds transformer\..*, … 20 in all\. Training"):
        load(directory, rename)


def test_another_shape(directory):
    with pytest.raises(UserError, match=r"up_proj.weight has the shape \[64, 64\], and .* means \[128, 64\]"):
        load(directory, lambda tensors: tensors.update({UP: torch.zeros(64, 64)}))


def test_tensors_that_nobody_reads(directory):
    with pytest.raises(UserError, match=r"tensors that LlamaForCausalLM does not read: score.weight\. Name the right"):
        load(directory, lambda tensors: tensors.update({"score.weight": torch.zeros(2, 64)}))


def test_frequencies_in_old_files_are_no_weights(directory):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    model = load(directory, lambda tensors: tensors.update({name: torch.zeros(8)}))
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, tiny()[0].model.layers[1].mlp.up_proj.weight)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"hidden_size": "64"}, "transformers makes no model of .*config.json.*'hidden_size' expected int"),
        ({"num_attention_heads": 0}, "transformers makes no model of .*config.json: ZeroDivisionError"),
        ({"hidden_act": "nope"}, "transformers makes no model of .*config.json: KeyError: 'nope'"),
        ({"dtype": "float99"}, "transformers makes no model of .*config.json.*float99"),
        ({"model_type": "nope"}, "model type `nope`"),
        ({"model_type": "t5"}, r"no causal language model \(AutoModelForCausalLM\) for t5"),
        ({"model_type": "llava"}, r"no causal language model \(AutoModelForCausalLM\) for llava"),
        ({"model_type": "musicgen"}, "musicgen cannot be trained here: it predicts a token of each of several"),
        ({"model_type": "gemma4_assistant"}, "gemma4_assistant cannot be trained here: it drafts"),
    ],
    ids=str,
)
def test_a_config_of_no_such_model(directory, change, said):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=said):
        load_directory(directory, torch.float32)


@pytest.mark.parametrize("name, text, said", [
    ("config.json", "[]", "config.json cannot be read: it is not a JSON object"),
    ("tokenizer.json", "{}", "its tokenizer cannot be read"),
    ("tokenizer_config.json", "{", "its tokenizer cannot be read"),
    ("tokenizer_config.json", '{"model_max_length": {"x": 1}}', "its tokenizer cannot be read: TypeError"),
])  # fmt: skip
def test_damaged_json(directory, name, text, said):
    (directory / name).write_text(text)
    with pytest.raises(UserError, match=said):
        load_directory(directory, torch.float32)


def test_a_damaged_tokenizer_beside_random_weights(directory):
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="its tokenizer cannot be read"):
        load_model(ModelConfig(name="hf", source="hf", path=str(directory), weights="random"), torch.float32, seed=0)


def test_integers_are_no_weights(directory):
    """transformers would take them as they are."""
    with pytest.raises(UserError, match=r"up_proj.weight is stored as integers \(I8\), and config.json does not"):
        load(directory, lambda tensors: tensors.update({UP: tensors[UP].to(torch.int8)}))


def test_an_adapter_beside_the_model(directory):
    (directory / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds an adapter \(adapter_config.json\)"):
        load_directory(directory, torch.float32)


@pytest.mark.parametrize("index, said", [
    ("{", "Expecting property name"),
    ('{"weight_map": {}}', "its weights cannot be read: KeyError: 'metadata'"),
])  # fmt: skip
def test_a_damaged_index(directory, index, said):
    (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
    (directory / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=said):
        load_directory(directory, torch.float32)


def test_shards_and_old_names(directory):
    """All of these transformers reads, and so they are read here."""
    whole = load_directory(directory, torch.float32)[0]
    whole.save_pretrained(directory / "shards", max_shard_size="50KB")
    for file in directory.glob("tokenizer*"):
        shutil.copy(file, directory / "shards")
    assert len(list((directory / "shards").glob("*.safetensors"))) > 3

    def without_prefix(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    without = load(directory, without_prefix)
    for model in (load_directory(directory / "shards", torch.float32)[0], without):
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, whole.get_parameter(name)), name
