"""A run whose base model was exchanged for another one of the same shapes."""

from pathlib import Path

import pytest
import torch

from experiments import generate, run
from experiments.runs.checkpoints import of_run
from tests.experiments.helpers import CHECKPOINTS, SMALL, TINY, tiny


@pytest.mark.parametrize("method", ["qdora", "bitfit"])
def test_neither_its_adapter_nor_its_checkpoints_are_used(terminal, chats, tmp_path: Path, method):
    model, tokenizer = tiny()
    for directory in (tmp_path / "model", tmp_path / "other"):
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.mul_(-1)
    begin = [one for one in TINY if one != "model=tiny"] + ["model=hf", f"model.path={tmp_path / 'model'}"]
    data = ["data=jsonl", f"data.path={chats}", f"output_dir={tmp_path / 'out'}"]
    code, text = terminal(run, *begin, *data, f"+method={method}", *CHECKPOINTS, *SMALL)
    assert code == 0, text
    (tmp_path / "model").rename(tmp_path / "kept")
    (tmp_path / "other").rename(tmp_path / "model")
    told = "was trained on another base model of the same shapes: put that one back"
    for command, *arguments in (
        (run, f"resume={of_run(tmp_path / 'out')[0]}"),
        (generate, f"run={tmp_path / 'out'}", "prompt=a", "max_new_tokens=2"),
        (generate, f"run={of_run(tmp_path / 'out')[0]}", "prompt=a", "max_new_tokens=2"),
    ):
        code, text = terminal(command, *arguments)
        assert code == 1 and told in text and "Traceback" not in text, text
