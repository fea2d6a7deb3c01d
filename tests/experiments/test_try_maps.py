"""try_maps on the tiny model: every choice is tried and compared."""

import csv

import pytest

from experiments import try_maps
from experiments.blocks.profile import read_profile
from experiments.blocks.quant_map import read_map
from modules import decoder_linears
from tests.experiments.helpers import (
    tiny,
)


@pytest.fixture
def command(terminal, tmp_path, chats):
    given = ["model=tiny", "data=jsonl", f"data.path={chats}", "dtype=float32", f"output_dir={tmp_path / 'out'}"]
    return lambda module, *overrides: terminal(module, *given, *overrides)


def test_trials(command, profile_file, tmp_path):
    code, text = command(
        try_maps, f"profile={profile_file / 'profile.csv'}", f"maps=[{profile_file / 'map.yaml'}]", "budget=0.05",
        "candidates=[32,64,1024]", "alone=[128]", "data.max_heldout=3", "data@second=arithmetic", "second.max_heldout=3"
    )  # fmt: skip
    assert code == 0, text
    rows = {row["title"]: row for row in csv.DictReader((tmp_path / "out" / "trials.csv").open())}
    assert list(rows) == [
        "dense", "all 32", "all 64", "all 1024", "tuned as 32", "tuned as 64", "tuned as 1024", "tuned, budget", "map",
        *(f"only {kind}_proj 128" for kind in ("q", "k", "v", "o", "gate", "up", "down")),
    ]  # fmt: skip
    for size in (32, 64, 1024):
        tuned, uniform = rows[f"tuned as {size}"], rows[f"all {size}"]
        assert float(tuned["bits_per_weight"]) <= float(uniform["bits_per_weight"]) and tuned["beside"] == str(size)
        assert float(tuned["predicted_fisher"]) <= float(uniform["predicted_fisher"])
        difference = float(tuned["loss_arithmetic"]) - float(uniform["loss_arithmetic"])
        assert float(tuned["above_arithmetic"]) == pytest.approx(difference, abs=1e-9)
    assert float(rows["tuned, budget"]["bits_per_weight"]) <= 4.2
    assert (tmp_path / "out" / "trials.png").stat().st_size > 10_000
    assert read_map(tmp_path / "out" / "map_as_64.yaml").double
    assert "Spearman" in text and "tuned as 64" in text
    profile = read_profile(profile_file / "profile.csv")
    assert list(profile.layers) == list(decoder_linears(tiny()[0]))


def test_trials_without_a_profile_are_refused(command, tmp_path):
    code, text = command(try_maps)
    assert code == 1 and "no profile: python -m experiments.tune_blocks writes one" in text
    assert not (tmp_path / "out").exists()
