"""What the notebooks on ablations read: committed results, or a few short runs in their place."""

import pytest

from experiments.errors import UserError
from experiments.runs import ablations
from experiments.system.files import RESULT


def test_the_small_path_makes_runs(monkeypatch, capsys):
    monkeypatch.setenv("QDORA_SMALL", "1")
    found = ablations.load("rank-docstrings", {"+method": ["lora"], "rank": [2, 4]})
    assert list(found.settings()) == ["lora rank=2", "lora rank=4"] and not capsys.readouterr().out
    with pytest.raises(UserError, match=r"results that cannot be compared: tiny on .*=256\)?; tiny on .*=512"):
        ablations.load("rank-docstrings", {"+method": ["lora"], "data.max_length": [256, 512]})


def test_no_results(tmp_path, monkeypatch):
    monkeypatch.delenv("QDORA_SMALL", raising=False)
    monkeypatch.setattr(ablations, "RESULTS", tmp_path)
    (tmp_path / "rank-docstrings").mkdir()
    (tmp_path / "rank-docstrings" / RESULT).write_text("{")
    with pytest.raises(UserError, match="no results; `make sweep-rank-docstrings` makes them in hours; QDORA_SMALL=1"):
        ablations.load("rank-docstrings", {"+method": ["lora"]})
