"""A directory belongs to one run, and its results stay unless they may go."""

from experiments import run
from experiments.runs import directory
from experiments.system.files import claim
from tests.experiments.helpers import TINY, records


def test_a_result_is_replaced_only_when_asked(command, tmp_path):
    out = tmp_path / "out"
    assert command("+method=full")[0] == 0
    (out / "notes.txt").write_text("mine")
    written = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    code, text = command("+method=lora")
    assert code == 1 and f"{out / 'result.json'} of an earlier run is there: choose another output_dir, or" in text
    code, text = command("+method=lora", "overwrite=true", "rank=65")  # a mistake that shows when the model is there
    assert code == 1 and "rank 65 is out of range" in text
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == written
    code, text = command("+method=lora", "overwrite=true")
    assert code == 0, text
    assert len([record for record in records(out) if "loss" in record]) == 4
    names = {"config.yaml", "metrics.jsonl", "result.json", "loss.png", "samples.md", "adapter", "spectrum.csv"}
    assert {path.name for path in out.iterdir()} == names | {"notes.txt"}
    assert "overwrite: false" in (out / "config.yaml").read_text(), "read by resume, which must not start anew"


def test_a_directory_belongs_to_one_run(command, tmp_path):
    out = tmp_path / "out"
    with claim(out / directory.LOCK):
        code, text = command("+method=lora")
        assert code == 1 and f"another run is at work in {out}: choose another output_dir" in text
        assert [path.name for path in out.iterdir()] == [directory.LOCK]
    assert command("+method=lora")[0] == 0


def test_runs_that_start_in_the_same_second_have_a_directory_each(terminal, monkeypatch, tmp_path, chats):
    monkeypatch.chdir(tmp_path)
    made = {directory.new_directory(tmp_path / "outputs" / "now").name for _ in range(3)}
    assert made == {"now", "now-2", "now-3"}
    code, text = terminal(run, "+method=lora", *TINY, "data=jsonl", f"data.path={chats}")
    assert code == 0, text
    assert len(list(tmp_path.glob("outputs/*/result.json"))) == 1
