"""Runs that can be compared: what sets them apart, and how its values are shown."""

from experiments.runs.groups import shown
from tests.experiments.made_up_results import LOSSES, groups_of


def test_settings_are_told_apart_by_what_a_user_varied(results):
    [one] = groups_of(results)
    assert one.varied == ["method.name", "rank"]  # lora_alpha, lr, quant.name and the adapter follow
    assert set(one.settings()) == {"full", *(f"{m} rank={r}" for m, r in LOSSES)}
    assert [run.seed for run in one.settings()["lora rank=4"]] == [0, 1, 2]


def test_values_are_shown_as_on_the_command_line():
    values = [["q_proj", "v_proj"], True, None, 1e-4, 3, "all-linear", {"a": 1}]
    assert [shown(v) for v in values] == ["[q_proj,v_proj]", "true", "null", "0.0001", "3", "all-linear", '{"a": 1}']
