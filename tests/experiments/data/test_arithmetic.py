"""The arithmetic problems: right answers, and no calculation in both parts."""

import re

import pytest
import torch

from experiments.config import ModelConfig, resolve
from experiments.data.arithmetic import LEVELS, PROBLEMS, problems
from experiments.data.samples import load_data
from experiments.models.load import load_model
from experiments.system.cli import composed


@pytest.mark.parametrize("level", LEVELS)
def test_answers_are_right_and_numbers_are_in_the_question(level):
    found = problems(level)
    assert len({problem.question for problem in found}) == PROBLEMS == len(found)
    for problem in found:
        assert eval(problem.calculation) == problem.answer >= 0, problem
        numbers = sorted(map(int, re.findall(r"\d+", problem.calculation)))
        assert sorted(map(int, re.findall(r"\d+", problem.question))) == numbers, problem
        if expression := re.search(r"[\d(]+ ?[+*-][\d+*() -]*\d", problem.question):  # in numbers
            assert eval(expression[0]) == problem.answer, problem
    assert {problem.level for problem in found} == {level}


def test_no_calculation_is_in_both_parts():
    cfg = resolve(composed("+method=lora", "data=arithmetic", "data.max_heldout=null", "data.max_train=400")).data
    _, tokenizer = load_model(ModelConfig(name="tiny", source="tiny"), torch.float32, 0)
    data = load_data(cfg, tokenizer)
    calculation = {problem.question: problem.calculation for level in LEVELS for problem in problems(level)}

    def calculations(part):
        texts = [tokenizer.decode(example.prompt_ids) for example in part]
        return {calculation[re.search(r"user\n(.*?)<", text, re.S)[1]] for text in texts}

    assert 0.08 < len(data.heldout) / (PROBLEMS * len(LEVELS)) < 0.12
    assert calculations(data.train).isdisjoint(calculations(data.heldout))
    assert {example.level for example in data.heldout} == {example.level for example in data.train} == set(LEVELS)
