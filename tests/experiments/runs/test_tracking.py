"""Weights & Biases for real, offline, and TensorBoard: the run's file exists and holds the metrics."""

import json
import struct
import sys
from pathlib import Path

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from tests.experiments.helpers import records

BLOCK = 32768  # a .wandb file is a LevelDB log: a 7-byte file header, then records that do not cross blocks unsplit


def wandb_files(directory: Path) -> list[Path]:
    """A run's, from old to new: each process writes one. They are whole when W&B's own process has ended."""
    wandb.teardown()
    return sorted(directory.glob("wandb/offline-run-*/run-*.wandb"))


def wandb_records(path: Path) -> list[wandb_internal_pb2.Record]:
    content = path.read_bytes()
    records, message, at = [], b"", 7
    while at + 7 <= len(content):
        if BLOCK - at % BLOCK < 7:  # a block's last bytes are padding
            at += BLOCK - at % BLOCK
            continue
        _checksum, length, kind = struct.unpack_from("<IHB", content, at)
        message += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(wandb_internal_pb2.Record.FromString(message))
            message = b""
    return records


def history(records) -> list[dict]:
    rows = [record.history for record in records if record.WhichOneof("record_type") == "history"]
    return [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in row.item} for row in rows]


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def test_an_offline_run_holds_the_metrics_and_the_summary(offline, command, tmp_path):
    code, text = command("+method=qdora", "tracking=wandb", "tracking.group=g", "tracking.tags=[a,b]")
    assert code == 0, text
    [path] = wandb_files(tmp_path / "out")
    records = wandb_records(path)
    rows = history(records)
    ours = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    for key in ("loss", "lr", "heldout_loss"):
        assert [row[key] for row in rows if key in row] == [record[key] for record in ours if key in record], key
    [run] = [record.run for record in records if record.WhichOneof("record_type") == "run"][:1]
    assert run.project == "qdora" and run.run_group == "g" and list(run.tags) == ["a", "b"]
    summary = {item.key: item.value_json for r in records for item in r.summary.update}
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert json.loads(summary["loss_after"]) == result["loss_after"]
    assert [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"] == [0]


def test_without_a_key_a_run_says_what_to_do(command, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # where `wandb login` keeps one
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    wandb.teardown()  # which has read the variables, and keeps them
    code, text = command("+method=lora", "tracking=wandb")
    wandb.teardown()
    assert code == 1 and "Traceback" not in text
    [line] = [line for line in text.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: tracking=wandb: ") and "set WANDB_API_KEY; WANDB_MODE=offline keeps" in line


def test_a_run_that_fails_is_finished_all_the_same(offline, command, tmp_path):
    code, text = command("+method=lora", "tracking=wandb", "lr=1e38", "trainer.max_grad_norm=0", "trainer.warmup=0")
    assert code == 1 and "loss became nan" in text
    [path] = wandb_files(tmp_path / "out")
    records = wandb_records(path)
    assert [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"] == [1]


def test_a_resumed_run_goes_on_as_the_same_one(offline, command, tmp_path):
    settings = ["+method=lora", "tracking=wandb", "trainer.checkpoint_every=2", "trainer.samples=0"]
    for more in (["trainer.steps=3"], ["trainer.steps=5", "resume=latest"]):
        code, text = command(*settings, *more)
        assert code == 0, text
    files = wandb_files(tmp_path / "out")
    assert len(files) == 2 and len({path.name for path in files}) == 1, "one id: `wandb sync` puts them together"
    parts = [wandb_records(path) for path in files]
    [one], [other] = ({r.run.run_id for r in part if r.WhichOneof("record_type") == "run"} for part in parts)
    assert one == other
    steps = [[row["_step"] for row in history(part) if "loss" in row] for part in parts]
    assert steps == [[1, 2, 3], [4, 5]]


def test_samples_are_a_table_and_the_adapter_an_artifact(offline, command, tmp_path):
    code, text = command("+method=lora", "tracking=wandb", "trainer.samples=2", "trainer.sample_tokens=4")
    assert code == 0, text
    [path] = wandb_files(tmp_path / "out")
    records = wandb_records(path)
    artifacts = {
        record.artifact.type: record.artifact for record in records if record.WhichOneof("record_type") == "artifact"
    }
    kept = {content.path: Path(content.local_path) for content in artifacts["adapter"].manifest.contents}
    adapter = tmp_path / "out" / "adapter"
    assert kept == {
        name: adapter / name for name in ("adapter_config.json", "adapter_model.safetensors", "checksums.json")
    }
    [table] = path.parent.glob("files/media/table/samples_*.table.json")
    shown = json.loads(table.read_text())
    assert shown["columns"] == ["prompt", "reference", "before", "after"] and len(shown["data"]) == 2
    samples = (tmp_path / "out" / "samples.md").read_text()
    assert all(prompt.strip() in samples and reference in samples for prompt, reference, *_ in shown["data"])


def tensorboard_events(directory: Path):
    """What TensorBoard itself reads of a run."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    return events


def test_tensorboard_reads_the_metrics_of_a_resumed_run(command, tmp_path):
    pytest.importorskip("tensorboard")
    settings = ["+method=lora", "tracking=tensorboard", "trainer.checkpoint_every=2", "trainer.samples=1"]
    for more in (
        ["trainer.steps=3"],
        ["trainer.steps=5", f"resume={tmp_path / 'out' / 'checkpoints' / 'step-00000002'}"],
    ):
        code, text = command(*settings, *more)
        assert code == 0, text
    events = tensorboard_events(tmp_path / "out")
    for key in ("loss", "heldout_loss"):
        ours = {record["step"]: record[key] for record in records(tmp_path / "out") if key in record}
        assert {event.step: event.value for event in events.Scalars(key)} == pytest.approx(ours, rel=1e-6)
        assert len(events.Scalars(key)) == len(ours), "step 3 of the first part is not there twice"
    assert "samples/1/text_summary" in events.Tags()["tensors"]
    code, text = command(*settings, "trainer.steps=2", "overwrite=true")
    assert code == 0 and [event.step for event in tensorboard_events(tmp_path / "out").Scalars("loss")] == [1, 2]


def test_without_tensorboard_a_run_says_what_to_do(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    code, text = command("+method=lora", "tracking=tensorboard")
    assert code == 1 and "error: tracking=tensorboard needs TensorBoard: pip install tensorboard" in text
    assert "Traceback" not in text
