"""quant_study from the command line on the tiny model: what it prints and writes; bad input."""

import math

import pytest
import torch

from experiments import decompose_study, quant_study
from experiments.config import ModelConfig
from experiments.data.samples import load_data
from experiments.models.load import load_model
from experiments.system.cli import composed
from experiments.training.evaluation import evaluate
from kernels import dequantize_4bit, quantize_4bit
from kernels.codebook import normal_float
from modules import decoder_linears, quantize
from tests.experiments.helpers import csv_rows, nearest


@pytest.fixture
def quant(terminal, tmp_path, chats):
    given = ["model=tiny", "data=jsonl", f"data.path={chats}", "every=5", "values=5000", f"output_dir={tmp_path}/out"]
    return lambda *overrides: terminal(quant_study, *given, *overrides)


def test_the_table_the_csv_and_the_plots(quant, tmp_path):
    code, text = quant("quant_types=[nf4,nf2,nf8]", "blocksizes=[32,64]", "double=[true,false]", "data.max_heldout=4")
    assert code == 0, text
    lines = [line.split() for line in text.splitlines()]
    assert [line[:3] for line in lines if line[:1] == ["nf2"]] == [
        *(["nf2", "32", "8"], ["nf2", "32", "fp32"], ["nf2", "64", "8"], ["nf2", "64", "fp32"])
    ]
    assert "64: 0.500, 0.127" in text and "Q4_1" not in text
    rows = csv_rows(tmp_path / "out" / "study.csv")
    assert len(rows) == 3 * 2 * 2 * (3 + 1 + 3)  # settings × (three linears, all of them, three kinds)
    for picture in ("errors.png", "loss.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")

    model, _ = load_model(ModelConfig(name="tiny", source="tiny"), torch.float32, 0)
    name, linear = list(decoder_linears(model).items())[5]
    w = linear.weight.detach().double().view(-1).numpy()
    lost = nearest(w, normal_float(2).double().numpy(), 64) - w
    (row,) = (r for r in rows if list(r.values())[:4] == [name, "nf2", "64", "False"])
    assert float(row["rms_relative"]) == pytest.approx(math.sqrt((lost**2).sum() / (w**2).sum()), rel=1e-5)
    assert float(row["bits"]) == 2.5 and row["loss"] == ""

    together = {(r["quant_type"], r["blocksize"], r["double"]): r for r in rows if r["weights"] == "tiny's linears"}
    gaussian = {(r["quant_type"], r["blocksize"], r["double"]): r for r in rows if r["weights"] == "Gaussian"}
    assert all(float(row["loss"]) > 0 for row in together.values())
    for key in together:  # the tiny model's weights are Gaussian
        assert float(together[key]["rms_relative"]) == pytest.approx(float(gaussian[key]["rms_relative"]), rel=0.05)
    dense = float(next(line for line in lines if line[:1] == ["dense"])[1])
    assert float(together["nf8", "32", "False"]["loss"]) == pytest.approx(dense, abs=2e-3)


def test_the_loss_is_that_of_a_packed_model(quant, tmp_path, chats):
    assert quant("quant_types=[nf4]", "blocksizes=[64]", "double=[true]", "batch_size=4")[0] == 0
    model, tokenizer = load_model(ModelConfig(name="tiny", source="tiny"), torch.float32, 0)
    quantize(model)
    heldout = load_data(composed("+method=qlora", "data=jsonl", f"data.path={chats}").data, tokenizer).heldout
    loss = evaluate(model, heldout, 4, tokenizer.pad_token_id).loss
    (row,) = (row for row in csv_rows(tmp_path / "out" / "study.csv") if row["loss"])
    assert float(row["loss"]) == pytest.approx(loss, rel=2e-3)  # the study's model may compute in bf16


def test_random_weights_are_what_they_are_called():
    found = quant_study.random_weights(200_000, seed=1)
    excess = {name: (((w - w.mean()) / w.std()) ** 4).mean().item() - 3 for name, w in found.items()}
    assert abs(excess["Gaussian"]) < 0.1 and excess["Laplace"] == pytest.approx(3, abs=0.5)
    assert excess["Student's t (ν=3)"] > 20
    assert torch.equal(quant_study.random_weights(100, 3)["Laplace"], quant_study.random_weights(100, 3)["Laplace"])


def test_without_the_loss(quant, tmp_path):
    code, text = quant("quant_types=[int4]", "blocksizes=[4096]", "double=[false]", "loss=false")
    assert code == 0 and "held-out" not in text and not (tmp_path / "out" / "loss.png").exists()


def test_block_formats_beside_others(quant, tmp_path):
    """They come once each, whatever the block sizes, with the error that quantize_4bit makes and the bits it takes."""
    code, text = quant("quant_types=[nf4,mxfp4,nvfp4]", "blocksizes=[64,128]", "double=[false,true]", "loss=false")
    assert code == 0, text
    rows = [row for row in csv_rows(tmp_path / "out" / "study.csv") if row["weights"] == "Gaussian"]
    found = [(row["quant_type"], row["blocksize"], row["double"]) for row in rows]
    assert found[4:] == [("mxfp4", "32", "True"), ("nvfp4", "16", "True")] and len(found) == 6
    assert "block 64: 0.500, 0.127; 128:" in text
    w = quant_study.random_weights(5000, 0)["Gaussian"]
    for row, codes_and_scales in zip(rows[4:], (4 + 8 / 32, 4 + 8 / 16)):
        error = dequantize_4bit(*quantize_4bit(w, quant_type=row["quant_type"])) - w
        assert float(row["rms_relative"]) == pytest.approx((error.norm() / w.norm()).item(), rel=1e-4)
        assert float(row["bits"]) == pytest.approx(codes_and_scales, abs=0.03)  # and 32 bits for 256 blocks


BAD_QUANT = {
    "type": (["quant_types=[nf4,nf9]"], "quant_types: 'nf9' is not one of nf4, fp4, int4, mxfp4, nvfp4 or nfK"),
    "block": (["blocksizes=[48]"], "blocksizes: 48 is not one of 32, 64"),
    "nothing": (["double=[]"], "double=[] leaves nothing to compare"),
    "every": (["every=0"], "every=0: choose 1 or more"),
    "misspelt": (["blocksize=64"], "no such key: blocksize; did you mean blocksizes?"),
    "shapes only": (["model=gpt3-175b"], "model=gpt3-175b has shapes for"),
}


@pytest.mark.parametrize("overrides, message", BAD_QUANT.values(), ids=BAD_QUANT)
def test_bad_input_to_quant_study(quant, tmp_path, overrides, message):
    code, text = quant(*overrides)
    assert code == 1 and message in text and "Traceback" not in text, text
    assert len([line for line in text.splitlines() if line.startswith("error: ")]) == 1
    assert not (tmp_path / "out").exists()


def test_a_packed_model_is_refused(terminal, packed_tiny, tmp_path):
    code, text = terminal(quant_study, "model=hf", f"model.path={packed_tiny}", f"output_dir={tmp_path}/out")
    assert code == 1 and "model=hf is packed already: choose a dense one" in text
    code, text = terminal(decompose_study, f"base={packed_tiny}", f"output_dir={tmp_path}/out", "ranks=[2]")
    assert code == 1 and "is packed: choose a dense model" in text
