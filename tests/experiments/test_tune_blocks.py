"""tune_blocks on the tiny model: maps that runs read; bad input."""

import json
import math

import pytest

from experiments import run, tune_blocks
from experiments.blocks.choice import constant_bits
from experiments.blocks.quant_map import read_map
from tests.experiments.helpers import (
    SMALL,
    TINY,
)


@pytest.fixture
def command(terminal, tmp_path, chats):
    given = ["model=tiny", "data=jsonl", f"data.path={chats}", "dtype=float32", f"output_dir={tmp_path / 'out'}"]
    return lambda module, *overrides: terminal(module, *given, *overrides)


@pytest.fixture
def tuned(command, tmp_path):
    """The folder that tune_blocks wrote, and what it printed."""
    code, text = command(tune_blocks, "samples=6", "bits=4.13", "candidates=[32,64,128,2048]")
    assert code == 0, text
    return tmp_path / "out", text


def test_the_map_is_read_by_a_run(tuned, terminal, chats, tmp_path):

    folder, text = tuned
    quant_map = read_map(folder / "map.yaml")
    assert quant_map.double and set(quant_map.blocksizes.values()) <= {32, 64, 128, 2048}
    assert "greedy" in text and "tuned" in text and "predicted rise" in text and str(folder / "map.yaml") in text
    constants = sum(constant_bits(math.prod(quant_map.shapes[n]), b, True) for n, b in quant_map.blocksizes.items())
    weights = sum(map(math.prod, quant_map.shapes.values()))
    assert 4 + constants / weights <= 4.13
    what = ["+method=qlora", *SMALL, "trainer.steps=1", "quant=tuned", f"quant.map={folder / 'map.yaml'}"]
    code, text = terminal(run, *TINY, *what, "data=jsonl", f"data.path={chats}", f"output_dir={tmp_path / 'run'}")
    assert code == 0, text
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["bits_per_weight"] == pytest.approx(4 + constants / weights)  # counted on the packed model


def test_another_budget_needs_no_new_profile(tuned, command, tmp_path, monkeypatch):
    folder, _ = tuned
    monkeypatch.setattr(tune_blocks, "load_model", None)
    profile = f"profile={folder / 'profile.csv'}"
    for n, overrides in enumerate(
        (["bits=4.13", "candidates=[32,64,128,2048]"], ["sensitivity=output", "quant.align=head"])
    ):
        code, text = command(tune_blocks, profile, *overrides, f"output_dir={tmp_path / str(n)}")
        assert code == 0, text
        again = read_map(tmp_path / str(n) / "map.yaml")
        assert (again == read_map(folder / "map.yaml")) is ("bits=4.13" in overrides), overrides
    assert again.blocksizes["model.layers.0.self_attn.q_proj"] <= 1024  # a head's 16 rows of 64
    code, text = command(tune_blocks, profile, "quant.align=row", f"output_dir={tmp_path / 'again'}", "budget=0.07")
    assert code == 0 and set(read_map(tmp_path / "again" / "map.yaml").blocksizes.values()) <= {32, 64, 128}


BAD = {
    "budget": (["budget=0.0001"], "the smallest possible is budget=0.00"),
    "bits": (["bits=3.9"], "the budget is 0: the smallest possible is budget="),
    "share": (["budget=1.5"], "budget=1.5 is a share of the codes' bytes: choose one between 0 and 1"),
    "both": (["budget=0.05", "bits=4.2"], "budget=0.05 and bits=4.2 are two budgets: choose one"),
    "candidate": (["candidates=[64,100]"], "candidates: 100 is not a block size; choose from 32, 64, 128"),
    "too small": (["candidates=[4096]"], "k_proj has 2048 weights, less than a block of any of candidates=[4096]: add"),
    "sensitivity": (["sensitivity=hessian"], "sensitivity=hessian: choose fisher or output"),
    "align": (["quant.align=rows"], "quant.align=rows: choose none, row, head"),
    "samples": (["samples=0"], "samples=0: choose 1 or more"),
    "no profile": (["profile=/nowhere"], "profile=/nowhere: No such file or directory: leave profile out to measure"),
    "another model": (
        ["model=smollm2", "profile={profile}"],
        "is of model=tiny, not smollm2: set it so, or",
    ),
    "another double": (
        ["quant.double=false", "profile={profile}"],
        "is of quant.double=true, not false: set it so",
    ),
    "another type": (["quant.type=fp4", "profile={profile}"], "is of quant.type=nf4, not fp4: set it so"),
    "one block size": (
        ["quant.type=nvfp4"],
        "quant.type=nvfp4: its blocks have one size, so there is nothing to choose",
    ),
    "no type": (["quant.type=nf3"], "quant.type=nf3: choose nf4, fp4, int4"),
    "no CSV": (["profile={map}"], "is not a profile that tune_blocks wrote: "),
    "misspelt": (["budgett=0.05"], "no such key: budgett; did you mean budget?"),
    "preset": (["model=gpt3-175b"], "model=gpt3-175b has shapes for experiments.plan but no weights"),
}


@pytest.mark.parametrize("overrides, message", BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_leaves_nothing(command, profile_file, tmp_path, overrides, message):
    files = {"profile": profile_file / "profile.csv", "map": profile_file / "map.yaml"}
    code, text = command(tune_blocks, "samples=1", *(override.format(**files) for override in overrides))
    assert code == 1 and message in text and "Traceback" not in text, text
    assert len([line for line in text.splitlines() if line.startswith("error: ")]) == 1
    assert not (tmp_path / "out").exists()


def test_a_packed_model_is_refused(terminal, packed_tiny, tmp_path):
    code, text = terminal(tune_blocks, "model=hf", f"model.path={packed_tiny}", f"output_dir={tmp_path / 'out'}")
    assert code == 1 and "q_proj is packed in NF4 already: block sizes are chosen for a dense model" in text
