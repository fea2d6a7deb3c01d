"""Checksums: every flipped bit of a file is found, files of others are read as they are, bytes repeat."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from modules.files.checked import (
    SUMS,
    Damaged,
    load_tensors,
    save_tensors,
    seal_directory,
    seal_files,
    verify,
    verify_directory,
    verify_file,
)

TENSORS = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.randn(5).bfloat16(),
    "codes": torch.arange(7, dtype=torch.uint8),
    "scalar": torch.tensor(3.5),
    "none": torch.empty(0, 4),
    "gewöhnlich": torch.tensor([True, False]),
}


@pytest.fixture
def file(tmp_path):
    save_tensors(TENSORS, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def test_round_trip_that_others_read(file):
    assert equal(load_tensors(file), TENSORS) and equal(load_file(file), TENSORS)


def test_the_bytes_of_a_file_repeat(file, tmp_path):
    for _ in range(5):
        save_tensors(dict(reversed(TENSORS.items())), tmp_path / "again.safetensors")
        assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def test_every_flipped_bit_is_found_or_changes_nothing(file):
    whole, rng = file.read_bytes(), random.Random(0)
    places = rng.sample(range(8 * len(whole)), 1500)
    for place in places:
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        file.write_bytes(damaged)
        try:
            found = load_tensors(file)
        except Damaged as error:
            assert str(file) in str(error)
        else:
            assert equal(found, TENSORS), place


@pytest.mark.parametrize("cut", [0, 7, 8, 100, -1])
def test_a_file_that_is_cut(file, cut):
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(Damaged, match="is damaged or not a safetensors file"):
        load_tensors(file)


def test_the_tensor_is_named(file, tmp_path):
    bad = dict(TENSORS, a=TENSORS["a"] + 1)
    save_file(bad, tmp_path / "bad.safetensors", metadata=metadata_of(file))
    with pytest.raises(Damaged, match=r"bad\.safetensors is damaged: a is not the tensor that was written"):
        verify(tmp_path / "bad.safetensors")
    del bad["a"]
    save_file(bad, tmp_path / "bad.safetensors", metadata=metadata_of(file))
    with pytest.raises(Damaged, match="a is not the tensor that was written"):
        verify(tmp_path / "bad.safetensors")


def metadata_of(path) -> dict:
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]


def test_files_of_others_are_read_as_they_are(tmp_path):
    save_file(TENSORS, tmp_path / "theirs.safetensors")
    assert equal(load_tensors(tmp_path / "theirs.safetensors"), TENSORS)
    verify_directory(tmp_path)


def test_a_directory_of_another_library(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt", "made": "elsewhere"})
    (tmp_path / "config.json").write_text('{"a": 1}')
    seal_directory(tmp_path)
    verify_directory(tmp_path)
    assert equal(load_file(tmp_path / "model.safetensors"), TENSORS)
    assert metadata_of(tmp_path / "model.safetensors")["made"] == "elsewhere"
    before = (tmp_path / "model.safetensors").read_bytes()
    seal_directory(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    copy = shutil.copytree(tmp_path, tmp_path / "copy")
    (copy / "config.json").write_text('{"a": 2}')
    with pytest.raises(Damaged, match=r"config\.json is damaged, or was changed .*: if on purpose, delete .*/copy/"):
        verify_directory(copy)
    (copy / SUMS).unlink()
    verify_directory(copy)


def test_files_without_and_with_checksums(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    seal_files(tmp_path, ["a.txt", "missing.txt"])
    (tmp_path / "b.txt").write_text("other")
    verify_file(tmp_path / "a.txt")
    verify_file(tmp_path / "b.txt")  # nobody asked for its checksum
    (tmp_path / "a.txt").unlink()
    with pytest.raises(Damaged, match=r"a\.txt is damaged"):
        verify_file(tmp_path / "a.txt")
    for content in ("{", "[]"):
        (tmp_path / SUMS).write_text(content)
        with pytest.raises(Damaged, match=r"checksums\.json is damaged"):
            verify_file(tmp_path / "a.txt")
