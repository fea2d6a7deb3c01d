"""Loss of power: a file has its name only once its bytes are on the disk, and its directory knows the name.

os.fsync, os.rename and os.replace are watched during a run, an export and a sweep's base. A name that a partial
directory or file gets must stand for bytes that were synced since they changed, and its directory must be synced after.
"""

import os
from pathlib import Path

import pytest

from experiments import export
from tests.experiments.helpers import CHECKPOINTS, SMALL


class Disk:
    """The files and directories that were synced as they are, and the names given since their directory was."""

    def __init__(self):
        self.synced: dict[int, tuple[int, int]] = {}
        self.unsynced_names: dict[str, str] = {}
        self.wrong: list[str] = []

    def sync(self, descriptor: int) -> None:
        stat = os.fstat(descriptor)
        self.synced[stat.st_ino] = (stat.st_size, stat.st_mtime_ns)
        folder = os.readlink(f"/proc/self/fd/{descriptor}")
        self.unsynced_names = {path: parent for path, parent in self.unsynced_names.items() if parent != folder}

    def name(self, source: Path, target: Path) -> None:
        if "partial" in str(target):  # of a directory that gets its own name later, or that is to be deleted
            return
        for path in [source, *source.rglob("*")]:
            stat = path.stat()
            if self.synced.get(stat.st_ino) != (stat.st_size, stat.st_mtime_ns):
                self.wrong.append(f"{path} got the name {target} before it was synced")
        self.unsynced_names[str(target)] = str(target.parent)


@pytest.fixture
def disk(monkeypatch) -> Disk:
    disk = Disk()
    fsync = os.fsync

    def synced(descriptor):
        fsync(descriptor if isinstance(descriptor, int) else descriptor.fileno())
        disk.sync(descriptor if isinstance(descriptor, int) else descriptor.fileno())

    monkeypatch.setattr(os, "fsync", synced)
    for name in ("rename", "replace"):
        whole = getattr(os, name)

        def renamed(source, target, whole=whole):
            disk.name(Path(source), Path(target))
            whole(source, target)

        monkeypatch.setattr(os, name, renamed)
    return disk


@pytest.mark.parametrize("method", ["qdora", "full"])
def test_a_run_syncs_before_it_names(command, terminal, tmp_path, disk, method):
    init = ["init=qpissa"] if method == "qdora" else []
    code, text = command(f"+method={method}", *init, *CHECKPOINTS, *SMALL, "trainer.keep_best=true")
    assert code == 0, text
    code, text = terminal(export, f"run={tmp_path / 'out'}", "to=merged")
    assert code == 0, text
    assert {"result.json", "config.yaml"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert not disk.wrong and not disk.unsynced_names


def test_metrics_are_on_the_disk_before_a_checkpoint_goes_on_after_them(command, tmp_path, disk, monkeypatch):
    lines: list[int] = []
    sync = disk.sync

    def counted(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("metrics.jsonl"):
            lines.append(os.fstat(descriptor).st_size)
        sync(descriptor)

    monkeypatch.setattr(disk, "sync", counted)
    assert command("+method=lora", *CHECKPOINTS, *SMALL)[0] == 0
    assert len(lines) == 3 and lines == sorted(set(lines))
