"""A directory belongs to one run, and its results stay unless they may go: those of `run` and of the studies."""

import pytest

from experiments import decompose_study, extract, quant_study, run, try_maps, tune_blocks
from experiments.plan import __main__ as plan
from experiments.system import directory
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
    (out / ".adapter.12.partial").mkdir()  # of processes that were killed
    (out / ".result.json.12.partial").touch()
    code, text = command("+method=lora", "overwrite=true")
    assert code == 0, text
    assert len([record for record in records(out) if "loss" in record]) == 4
    names = {"config.yaml", "metrics.jsonl", "result.json", "loss.png", "samples.md", "adapter", "spectrum.csv"}
    names |= {"heldout.csv"}
    assert {path.name for path in out.iterdir()} == names | {"checksums.json", "notes.txt"}
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


QUICK = {  # a command, what makes it quick on the tiny model, and the files that it writes
    "extract": (extract, ["base=tiny", "tuned=tiny", "rank=2"], {"adapter", "extract.json"}),
    "quant_study": (
        quant_study,
        ["model=tiny", "quant_types=[nf4]", "blocksizes=[64]", "loss=false", "values=1000"],
        {"study.csv", "errors.png"},
    ),
    "decompose_study": (
        decompose_study,
        ["base=tiny", "ranks=[2]", "every=14"],
        {"decompose.csv", "starts.csv", "decompose.png"},
    ),
    "tune_blocks": (
        tune_blocks,
        ["model=tiny", "profile={profile}", "candidates=[32,64]", "bits=4.2"],
        {"map.yaml"},
    ),
    "try_maps": (
        try_maps,
        ["model=tiny", "profile={profile}", "candidates=[64]", "data.max_heldout=1"],
        {"map_as_64.yaml", "map_budget.yaml", "trials.csv", "trials.png"},
    ),
    "plan": (plan, ["model=tiny", "+method=lora", "rank=4", "seq=16", "plot=true"], {"tiny-lora.png"}),
}


@pytest.fixture
def quick(terminal, chats, profile_file, monkeypatch):
    """quick(name, *arguments) calls the command of QUICK; returns (exit code, what it printed)."""
    monkeypatch.setattr("experiments.plan.plot.SIZES", ("tiny",))
    monkeypatch.setattr("experiments.plan.plot.LENGTHS", (16,))
    files = {"profile": profile_file / "profile.csv"}
    data = ["data=jsonl", f"data.path={chats}", "dtype=float32"]

    def start(name: str, *arguments: str) -> tuple[int, str]:
        module, given, _ = QUICK[name]
        has = {"extract": data[:2], "quant_study": data[:2], "tune_blocks": data, "try_maps": data}.get(name, [])
        return terminal(module, *has, *(argument.format(**files) for argument in given), *arguments)

    return start


@pytest.mark.parametrize("name", QUICK)
def test_results_of_a_study_are_replaced_only_when_asked(quick, tmp_path, name):
    out, files = tmp_path / "out", QUICK[name][2]
    code, text = quick(name, f"output_dir={out}")
    assert code == 0, text
    assert {path.name for path in out.iterdir()} == files
    (out / "notes.txt").write_text("mine")
    written = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    code, text = quick(name, f"output_dir={out}")
    assert code == 1 and "of an earlier run is there: choose another output_dir, or" in text
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == written
    with claim(out / directory.LOCK):
        code, text = quick(name, f"output_dir={out}", "overwrite=true")
        assert code == 1 and f"another run is at work in {out}: choose another output_dir" in text
    (out / "loss.png").touch()  # as of an earlier quant_study with a loss
    code, text = quick(name, f"output_dir={out}", "overwrite=true")
    assert code == 0, text
    stale = set() if name == "quant_study" else {"loss.png"}
    assert {path.name for path in out.iterdir()} == files | {"notes.txt"} | stale


@pytest.mark.parametrize("name", ["quant_study", "plan"])
def test_a_study_without_a_directory_gets_one_of_its_own(quick, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert quick(name)[0] == 0
    assert len(list(tmp_path.glob("outputs/*"))) == 2
