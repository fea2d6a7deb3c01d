"""decompose_study from the command line on the tiny model: what it prints and writes; bad input."""

import pytest
import torch

from experiments import decompose_study
from experiments.config import ModelConfig
from experiments.models.load import load_model
from modules import decoder_linears
from tests.experiments.helpers import csv_rows


@pytest.fixture
def decomposition(terminal, tmp_path):
    return lambda *overrides: terminal(decompose_study, "base=tiny", f"output_dir={tmp_path}/out", *overrides)


def test_decompositions_and_starts(decomposition, tmp_path):
    model, tokenizer = load_model(ModelConfig(name="tiny", source="tiny"), torch.float32, seed=0)
    exact = {name: linear.weight.detach().clone() for name, linear in decoder_linears(model).items()}
    with torch.no_grad():
        for linear in decoder_linears(model).values():
            linear.weight += 0.01 * torch.randn(linear.out_features, 2) @ torch.randn(2, linear.in_features)
    model.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    code, text = decomposition(f"tuned={tmp_path / 'tuned'}", "ranks=[2,8]", "every=4")
    assert code == 0, text
    assert "W of 4 linears" in text and "ΔW of 4 linears" in text and "init=qpissa" in text
    assert (tmp_path / "out" / "decompose.png").is_file()

    rows = csv_rows(tmp_path / "out" / "decompose.csv")
    assert len(rows) == 2 * 4 * 4 * 2  # W and ΔW × linears × methods × ranks
    for row in rows:
        if row["matrix"] == "ΔW" and row["method"] != "nuclear":
            assert float(row["error"]) < 1e-3  # it has rank 2
        if row["matrix"] == "W" and row["method"] == "svd":
            sigma = torch.linalg.svdvals(exact[row["layer"]].double())
            best = (sigma[int(row["rank"]) :].norm() / sigma.norm()).item()
            assert float(row["error"]) == pytest.approx(best, rel=1e-4)
    errors = {
        (row["init"], row["layer"], row["rank"]): float(row["error"])
        for row in csv_rows(tmp_path / "out" / "starts.csv")
    }
    for (init, layer, rank), error in errors.items():
        if init != "default":
            assert error < errors["default", layer, rank]
        if "iter" in init and "loftq" in init:
            assert error < errors["loftq", layer, rank]


BAD_DECOMPOSITION = {
    "rank": (["ranks=[0]"], "ranks=[0]: name one or more, each 1 or more"),
    "no rank": (["ranks=[]"], "ranks=[]: name one or more"),
    "too large": (["ranks=[33]", "every=1"], "too small for rank 33"),
    "every": (["every=0", "ranks=[2]"], "every=0: choose 1 or more"),
    "blocksize": (["blocksize=48", "ranks=[2]"], "blocksize=48: choose one of 32, 64"),
    "block": (["quant_type=mxfp4", "ranks=[2]"], "blocksize=64: mxfp4 has blocks of 32: set blocksize=32"),
    "type": (["quant_type=nf3", "ranks=[2]"], "quant_type=nf3: choose nf4, fp4, int4"),
    "no model": (["base=/nowhere", "ranks=[2]"], "/nowhere: no such directory or file"),
    "untuned": (["tuned=tiny", "ranks=[2]"], "tiny has the weights of tiny: nothing changed"),
}


@pytest.mark.parametrize("overrides, message", BAD_DECOMPOSITION.values(), ids=BAD_DECOMPOSITION)
def test_bad_input_to_decompose_study(decomposition, tmp_path, overrides, message):
    code, text = decomposition(*overrides)
    assert code == 1 and message in text and "Traceback" not in text, text
    assert not (tmp_path / "out").exists()
