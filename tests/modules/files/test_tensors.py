"""The tensors of a directory in one file and in shards; damaged files are named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from modules.files.bitsandbytes import load_bnb4
from tests.modules.architectures import logits


def test_shards(packed):
    directory = packed("llama", max_shard_size="30KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    assert torch.equal(logits(load_bnb4(directory)), logits(load_bnb4(packed("llama"))))


def test_a_truncated_file_is_named(llama_copy):
    path = llama_copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or not a safetensors file"):
        load_bnb4(llama_copy)


def test_shards_and_their_index_must_agree(packed, tmp_path):
    directory = shutil.copytree(packed("llama", max_shard_size="30KB"), tmp_path / "shards")
    index = directory / "model.safetensors.index.json"
    shard = json.loads(index.read_text())["weight_map"]["model.norm.weight"]
    kept = load_file(directory / shard)
    save_file({name: t for name, t in kept.items() if name != "model.norm.weight"}, directory / shard)
    with pytest.raises(ValueError, match=f"{shard}: model.norm.weight is missing: model.safetensors.index.json places"):
        load_bnb4(directory)
    (directory / shard).unlink()
    with pytest.raises(ValueError, match=f"{shard} is missing: model.safetensors.index.json names it"):
        load_bnb4(directory)
    index.write_text("[]")
    with pytest.raises(ValueError, match="is not an index of shards"):
        load_bnb4(directory)
    index.unlink()
    with pytest.raises(ValueError, match=r"no weights: neither model\.safetensors nor model"):
        load_bnb4(directory)
