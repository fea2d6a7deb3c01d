"""A small part of each campaign; `make torture` runs as much as one wants (tests/torture/__main__.py)."""

import sys
from pathlib import Path

import pytest

from tests.torture import at_once, damaged, full, hostile, killed, long, numbers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes, memory and files are watched in /proc")


def test_damaged_files(tmp_path):
    pytest.importorskip("optuna", reason="a search needs Optuna: no study to damage")
    assert damaged.campaign(15, tmp_path) == []


def test_killed_runs(tmp_path):
    assert killed.campaign(1, tmp_path) == []


def test_full_disks(tmp_path):
    assert full.campaign(2, tmp_path) == []


def test_two_at_once(tmp_path):
    assert at_once.campaign(1, tmp_path) == []


def test_files_of_strangers(tmp_path, monkeypatch):
    monkeypatch.setenv("QDORA_CACHE", str(tmp_path / "cache"))
    assert hostile.campaign(14, tmp_path) == []


def test_numbers_that_are_none(tmp_path):
    assert numbers.campaign(2, tmp_path) == []


def test_many_steps(tmp_path: Path):
    assert long.campaign(40, tmp_path) == []
