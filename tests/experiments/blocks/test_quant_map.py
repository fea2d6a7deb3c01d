"""quant=tuned reads what write_map wrote; quant.align=row; maps that do not fit are one line."""

import json

import pytest
import torch

from experiments.blocks.quant_map import QuantMap, blocksizes, read_map, write_map
from experiments.config import ModelConfig, QuantConfig
from experiments.models.load import load_model
from modules import decoder_linears, quantize
from modules.adapters.base_print import base_print
from modules.linear import weight_shape


def shapes_of_tiny():
    model, _ = load_model(ModelConfig(name="tiny", source="tiny"), torch.float32, seed=0)
    return {name: weight_shape(linear) for name, linear in decoder_linears(model).items()}


@pytest.fixture
def quant_map(tmp_path):
    """A map for the tiny model with three block sizes in turn, and its path."""
    shapes = shapes_of_tiny()
    chosen = QuantMap(True, shapes, {name: (32, 64, 128)[i % 3] for i, name in enumerate(shapes)})
    write_map(tmp_path / "map.yaml", chosen, "from a test\n\nof two lines")
    return chosen, tmp_path / "map.yaml"


def test_a_map_comes_back_as_it_was(quant_map):
    chosen, path = quant_map
    checksum, _, text = path.read_text().partition("\n")
    assert checksum.startswith("# checksum ")
    assert text.startswith("# from a test\n#\n# of two lines\ndouble: true\nlayers:\n  model.layers.0.")
    assert read_map(path) == chosen
    assert blocksizes(QuantConfig(name="tuned", map=str(path)), chosen.shapes) == chosen.blocksizes


def test_a_run_packs_each_linear_as_its_map_says(command, quant_map, tmp_path):
    chosen, path = quant_map
    code, text = command("+method=qlora", "quant=tuned", f"quant.map={path}", "trainer.steps=1")
    assert code == 0, text
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    model, _ = load_model(ModelConfig(name="tiny", source="tiny"), torch.float32, seed=0)
    quantize(model, chosen.blocksizes)
    linears = decoder_linears(model)
    assert {name: linear.blocksize for name, linear in linears.items()} == chosen.blocksizes
    stored = sum(buffer.nbytes for linear in linears.values() for buffer in linear.buffers())
    weights = sum(out * columns for out, columns in chosen.shapes.values())
    assert result["bits_per_weight"] == pytest.approx(8 * stored / weights)


def test_a_map_of_another_model_of_the_same_shapes_is_noticed(command, tmp_path):
    model, _ = load_model(ModelConfig(name="tiny", source="tiny"), torch.float32, seed=0)
    shapes = shapes_of_tiny()
    write_map(tmp_path / "map.yaml", QuantMap(True, shapes, dict.fromkeys(shapes, 64), base_print(model)), "a test")
    given = ["+method=qlora", "quant=tuned", f"quant.map={tmp_path / 'map.yaml'}", "trainer.steps=1"]
    told = "map.yaml was chosen for another model of the same shapes"
    for seed, noticed in ((0, False), (1, True)):
        code, text = command(*given, f"seed={seed}", f"output_dir={tmp_path / str(seed)}")
        assert code == 0 and (told in text) == noticed, text


def test_rows_are_kept_apart():
    shapes = {"a": (8, 576), "b": (8, 1536)}
    assert blocksizes(QuantConfig(name="nf4", blocksize=64, align="row"), shapes) == {"a": 64, "b": 64}
    assert blocksizes(QuantConfig(name="nf4", blocksize=128), shapes) == {"a": 128, "b": 128}
    with pytest.raises(ValueError, match="blocksize has no entry for"):
        model, _ = load_model(ModelConfig(name="tiny", source="tiny"), torch.float32, seed=0)
        quantize(model, {"a": 64})


BAD = {
    "no map": (["quant=tuned"], None, "quant=tuned needs quant.map=FILE: python -m"),
    "no file": (["quant=tuned", "quant.map=/nowhere"], None, "quant.map=/nowhere: no such file: python -m"),
    "not YAML": (["quant=tuned", "quant.map={path}"], "a: [", "quant.map="),
    "another YAML": (["quant=tuned", "quant.map={path}"], "a: 1", "is not a map of block sizes: it needs `double`"),
    "layer": (["quant=tuned", "quant.map={path}"], "double: true\nlayers: {x: 64}", "x needs {shape: [out, in], block"),
    "blocksize": (
        ["quant=tuned", "quant.map={path}"],
        "double: true\nlayers: {x: {shape: [4, 4], blocksize: 48}}",
        "x has blocksize 48; choose one of 32, 64",
    ),
    "another model": (
        ["quant=tuned", "quant.map={path}"],
        "double: true\nlayers: {x: {shape: [4, 4], blocksize: 64}}",
        "is for another model: model.layers.0.mlp.down_proj is missing there, (64, 128) here",
    ),
    "another double": (["quant=tuned", "quant.map={path}", "quant.double=false"], None, "chosen for quant.double=true"),
    "a map for nf4": (["quant.map={path}"], None, "is for quant=tuned, not quant=nf4"),
    "align": (["quant.align=head"], None, "quant.align=head: choose none or row"),
    "across rows": (
        ["quant.align=row", "quant.blocksize=256"],
        None,
        "blocks of 256 would run across the rows of model.layers.0.self_attn.q_proj, 64 weights each; block sizes that "
        "fit: 32, 64",
    ),
}


@pytest.mark.parametrize("overrides, content, message", BAD.values(), ids=BAD)
def test_bad_input_is_one_line(command, quant_map, tmp_path, overrides, content, message):
    path = quant_map[1]
    if content:
        path.write_text(content)
    code, text = command("+method=qlora", *(override.format(path=path) for override in overrides))
    assert code == 1 and message in text and "Traceback" not in text, text
    assert len([line for line in text.splitlines() if line.startswith("error: ")]) == 1
    assert not (tmp_path / "out").exists()
