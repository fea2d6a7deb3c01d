"""The evaluate command against the run's own numbers; lm-evaluation-harness where it is installed."""

import importlib.util
import json
import re
from types import SimpleNamespace

import pytest

from experiments import evaluate
from experiments.errors import UserError
from experiments.models.generation import decode, generate
from experiments.models.sampling import Sampling
from experiments.runs import checkpoints, lm_eval_harness
from experiments.runs.finished import load_run
from experiments.training.evaluation import evaluate as measure
from tests.experiments.helpers import write_chats


@pytest.fixture
def command(terminal, finished_once):
    return lambda *arguments: terminal(evaluate, f"run={finished_once}", *arguments)


def figures(text: str) -> list[float]:
    return [float(re.search(rf"{name} +([\d.]+)", text)[1]) for name in ("loss", "perplexity", "token accuracy")]


def test_the_run_s_own_numbers_come_back(command, terminal, finished_once):
    result = json.loads((finished_once / "result.json").read_text())
    expected = [result["loss_after"], result["perplexity_after"], 100 * result["token_accuracy_after"]]
    for merge in ("false", "true"):
        code, text = command(f"merge={merge}")
        assert code == 0 and "4 samples of" in text, text
        assert figures(text) == pytest.approx(expected, abs=0.06)
        assert figures(text)[0] == pytest.approx(expected[0], abs=6e-4)
    first = checkpoints.of_run(finished_once)[0]
    code, text = terminal(evaluate, f"run={first}")
    heldout = [json.loads(line) for line in (finished_once / "metrics.jsonl").read_text().splitlines()]
    [at_first] = [r["heldout_loss"] for r in heldout if r["step"] == 4 and "heldout_loss" in r]
    assert code == 0 and figures(text)[0] == pytest.approx(at_first, abs=6e-4)


def test_every_sample_of_a_file(command, finished_once, tmp_path):
    chats = write_chats(tmp_path)
    for arguments in (["data=jsonl", f"data.path={chats}"], [f"data.path={chats}"]):
        code, text = command(*arguments, "data.max_heldout=null")
        assert code == 0 and f"40 samples of {chats}" in text, text
    code, text = command("data.max_heldout=2", "trainer.eval_batch_size=1")
    assert code == 0 and "2 samples of" in text


BAD = {
    "no such file": (["data=jsonl", "data.path=/nowhere.jsonl"], "/nowhere.jsonl: cannot read this file"),
    "no path": (["data=jsonl"], "data=jsonl needs data.path=FILE"),
    "unknown data": (["data=csv"], "data=csv: no such data; there are arithmetic"),
    "unknown data key": (["data.pth=x"], "no such key: data.pth; did you mean data.path or data.part?"),
    "packing": (["data.packing=true"], "data.packing=true is about training, and nothing trains on this data"),
    "limit of no task": (["limit=3"], "limit=… and include_path=… are for tasks=…"),
    "limit": (["tasks=arc_easy", "limit=0"], "limit=0: choose 1 or more"),
    "data of tasks": (["tasks=arc_easy", "data=docstrings"], "data=docstrings: tasks bring their own data"),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD)
def test_bad_input_is_one_line(command, arguments, message):
    code, text = command(*arguments)
    assert code == 1 and message in text and "Traceback" not in text, text


def test_without_the_harness_it_says_how_to_install_it(command, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else find(name, *a))
    code, text = command("tasks=arc_easy")
    assert code == 1 and "tasks=… needs lm-evaluation-harness: pip install lm-eval" in text


def test_the_harness_refuses_infix_tokens(monkeypatch):
    monkeypatch.setattr(lm_eval_harness, "virtual_tokens", lambda model: (0, 3))
    with pytest.raises(UserError, match=r"Infix tokens need that: measure with data="):
        lm_eval_harness.measure(SimpleNamespace(model=None), ["arc_easy"], None, None)


def test_the_harness_measures_our_model_object(command, finished_once, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (pip install lm-eval)")
    rows = [{"question": f"{n} plus {n} is", "choices": [" right", " wrong"], "answer": n % 2} for n in range(6)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "own_sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "sums.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "target_delimiter": "",
    }
    (tmp_path / "own_sums.yaml").write_text(json.dumps(task))
    code, text = command("tasks=own_sums", f"include_path={tmp_path}")
    assert code == 0, text
    from experiments.data.chat import IGNORED, Example

    loaded = load_run(finished_once)
    encode = loaded.tokenizer.encode

    def loss(row, choice):
        prompt, rest = encode(row["question"]), encode(choice)
        example = Example(prompt + rest, [IGNORED] * len(prompt) + rest)
        return measure(loaded.model, [example], 1, loaded.tokenizer.pad_token_id).loss * len(rest)

    hits = [min((0, 1), key=lambda c: loss(row, row["choices"][c])) == row["answer"] for row in rows]
    found = float(re.search(r"\|acc +\|[^|]*\| *([\d.]+)\|", text)[1])
    assert found == pytest.approx(sum(hits) / 6, abs=1e-3)
    code, text = command("tasks=own_sum", f"include_path={tmp_path}")
    assert code == 1 and "no such task; did you mean own_sums" in text


def test_the_harness_writes_with_our_decoding(command, finished_once, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (pip install lm-eval)")
    rows = [{"question": "say " * (n + 1), "answer": "x"} for n in range(3)]
    loaded = load_run(finished_once)
    prompts = [loaded.tokenizer.encode(row["question"].strip()) for row in rows]
    for row, ids in zip(rows, generate(loaded.model, loaded.tokenizer, prompts, Sampling(6)).ids):
        row["answer"] = decode(loaded.tokenizer, ids).strip()
    (tmp_path / "say.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "own_say",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "say.jsonl")}},
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{question.strip()}}",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ["\x00"], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match"}],
        "filter_list": [
            {"name": "stripped", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}
        ],
    }
    (tmp_path / "own_say.yaml").write_text(json.dumps(task))
    calls = []
    monkeypatch.setattr(
        lm_eval_harness, "generate", lambda *args, **more: calls.append(args[2]) or generate(*args, **more)
    )
    code, text = command("tasks=own_say", f"include_path={tmp_path}")
    assert code == 0, text
    assert sorted(len(prompt) for batch in calls for prompt in batch) == sorted(map(len, prompts))
    assert re.search(r"\|exact_match *\|[^|]*\| *1\b", text), text
