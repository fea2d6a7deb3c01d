"""Sweeps: a failure stops nobody, nothing is done twice, two processes do not take one run."""

import errno
import json
import os

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from experiments import run
from experiments.config import resolve
from experiments.runs import identity, sweep
from experiments.runs.shared_base import SharedBase
from experiments.system.cli import composed
from experiments.system.files import PROJECT_ROOT, claim
from tests.experiments.helpers import TINY, VARYING


def test_failures_are_listed_and_only_what_is_missing_is_done_again(command, tmp_path):
    jobs = ["-m", "+method=full,lora", "rank=2,650", "trainer.steps=1", "trainer.samples=0"]
    code, text = command(*jobs)
    assert code == 1, text
    assert f"4 runs in {tmp_path / 'out'}: 2 done, 1 done before, 1 failed" in text  # full has no rank
    failed = [line for line in text.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 1 and " rank=650 " in failed[0] and " +method=lora " in failed[0]
    assert failed[0].endswith("rank 650 is out of range: model.layers.0.self_attn.q_proj can have 1 to 64")

    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("method=*/*")}
    methods = sorted(json.loads(path.read_text())["method"] for path in written if path.name == "result.json")
    assert methods == ["full", "lora"]
    [lora] = (tmp_path / "out").glob("*method=lora*rank=2*/result.json")
    lora.write_text(lora.read_text()[:40])  # as after a full disk
    code, text = command(*jobs)
    assert code == 1 and "1 done, 2 done before, 1 failed" in text
    assert json.loads(lora.read_text())["rank"] == 2
    again = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("method=*/*")}
    assert {path for path in again if again[path] != written.get(path)} <= set(lora.parent.iterdir())


def test_a_run_that_another_process_has_is_left_to_it(command, tmp_path, chats):
    where = [*TINY, "data=jsonl", f"data.path={chats}"]
    run_hash = identity.config_hash(resolve(composed("+method=lora", *where)))
    with claim(tmp_path / "out" / ".locks" / run_hash) as claimed:
        assert claimed
        code, text = command("-m", "+method=lora", "seed=0")
    assert code == 0 and "1 runs in" in text and "1 being done by another process" in text
    assert not list((tmp_path / "out").glob("*/result.json"))
    with claim(tmp_path / "out" / ".locks" / run_hash) as claimed:
        assert claimed


def test_a_process_that_dies_is_a_failure(monkeypatch, tmp_path):
    monkeypatch.setattr(sweep, "_work", _die)
    cfg = resolve(composed("+method=lora", "model=tiny", "trainer=debug", f"output_dir={tmp_path}"))
    assert sweep.job(cfg, "name") == sweep.Outcome(
        "failed", "its process ended with signal 9; 9 is often a lack of memory"
    )
    assert cfg.tracking.group == tmp_path.name, "W&B shows a sweep as a group"


def _die(*_):
    os.kill(os.getpid(), 9)


class Inline:
    """Stands in for multiprocessing's context: its processes run where they are started."""

    def __init__(self, target, args, daemon=False):
        self.start, self.join = lambda: target(*args), lambda: None

    Process = classmethod(lambda cls, **kwargs: cls(**kwargs))


def test_a_shared_base_gives_the_same_run_bit_for_bit(tmp_path, chats):
    shared = SharedBase()
    written = {}
    for way in ("own", "shared"):
        where = ["data=jsonl", f"data.path={chats}", f"output_dir={tmp_path / way}"]
        cfg = resolve(composed("+method=qdora", "model=tiny", "trainer=debug", "rank=4", "dropout=0.1", *where))
        base = shared.of(cfg, Inline) if way == "shared" else None
        assert (base is None) == (way == "own")
        result = run.run(cfg, base)
        assert result.pop("shared_base") == (way == "shared")
        curve = [json.loads(line) for line in (tmp_path / way / "metrics.jsonl").read_text().splitlines()]
        weights = (tmp_path / way / "adapter" / "adapter_model.safetensors").read_bytes()
        timed = VARYING | {"seconds", "cpu_energy_joules"}
        written[way] = [
            *({key: value for key, value in record.items() if key not in timed} for record in (*curve, result)),
            weights,
            (tmp_path / way / "samples.md").read_text(),
        ]
    assert written["own"] == written["shared"]


def test_the_base_of_a_killed_sweep_goes_with_one_that_has_nothing_to_do(command, monkeypatch, tmp_path):
    monkeypatch.setenv("QDORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sweep, "job", lambda *_: sweep.Outcome("done before"))
    for name in (".base-killed", ".base-running"):
        (tmp_path / "cache" / name).mkdir(parents=True)
    with claim(tmp_path / "cache" / ".locks" / ".base-running"):
        assert command("-m", "+method=qlora", "seed=0")[0] == 0
        assert [path.name for path in (tmp_path / "cache").glob(".base*")] == [".base-running"]


def test_a_base_is_packed_once_for_the_jobs_that_begin_with_it(packed_tiny):
    shared = SharedBase()

    def base(*overrides):
        return shared.of(resolve(composed(*overrides, "output_dir=unused")), Inline)

    first = base("model=tiny", "+method=qlora", "rank=2")
    assert first.is_dir() and base("model=tiny", "+method=qdora", "rank=4", "lr=1") == first
    assert base("model=tiny", "+method=lora") is None and base("model=tiny", "+method=qlora", "init=loftq") is None
    other = base("model=tiny", "+method=qlora", "quant.blocksize=128")
    assert other.is_dir() and not first.exists(), "one at a time"
    assert base("model=tiny", "+method=qlora", "seed=1") not in (other, None), "tiny's weights come from the seed"
    assert base("model=hf", f"model.path={packed_tiny}", "+method=qlora") is None, "it is packed already"
    assert base("model=hf", "model.path=nowhere", "+method=qlora") is None, "the job says what is wrong"


@pytest.mark.parametrize(("launcher", "rank", "told"), [("joblib", 2, "1 done"), ("submitit", 650, "1 failed")])
def test_launchers(command, tmp_path, launcher, rank, told):
    """One job each: every process that they start imports torch."""
    short = ["trainer.steps=1", "trainer.samples=0", "data.max_heldout=2"]
    code, text = command("-m", f"launcher={launcher}", "+method=qlora", f"rank={rank}", *short)
    assert code == (told == "1 failed") and f" runs in {tmp_path / 'out'}: {told}\n" in text, text
    assert ("rank 650 is out of range" in text) == (told == "1 failed")
    assert len(list((tmp_path / "out").glob("method=qlora*/result.json"))) == (told == "1 done")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("foo=1,2", "error: no such key: foo; --help lists them"),
        ("rank=x,y", "error: rank=x,y: choose a whole number"),
        ("+foo=1,2", "error: no such key: foo; --help lists them"),
    ],
)
def test_a_sweep_over_what_is_not_there_says_so(terminal, tmp_path, wrong, message):
    code, text = terminal(run, "-m", "+method=lora", *TINY, f"output_dir={tmp_path / 'out'}", wrong)
    assert code == 1 and message in f"{text}\n" and "Traceback" not in text, text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fails", ["write_atomically", "Counter"])  # of one job, and of them all
def test_an_outcome_that_cannot_be_noted_ends_the_sweep_in_one_line(command, monkeypatch, tmp_path, fails):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "noted")

    monkeypatch.setattr(sweep, "job", lambda *_: sweep.Outcome("failed", "as if"))
    monkeypatch.setattr(sweep, fails, full)
    code, text = command("-m", "+method=lora", "seed=0,1")
    assert code == 1 and text.endswith("error: [Errno 28] No space left on device: 'noted'"), text
    assert text.count("error: ") == 1 and "Traceback" not in text


def test_slurm_is_missed_in_one_line(command, monkeypatch):
    monkeypatch.setenv("PATH", "")
    code, text = command("-m", "launcher=slurm", "+method=lora", "seed=0,1")
    assert code == 1 and text.count("error: ") == 1 and "Traceback" not in text
    assert text.endswith("error: no srun here: launcher=slurm is for a machine that submits jobs to SLURM")


def test_the_hash_is_of_what_a_run_computes(monkeypatch):
    def hashed(*overrides):
        return identity.config_hash(resolve(composed(*overrides, "output_dir=unused")))

    assert hashed("+method=full", "rank=4") == hashed("+method=full", "rank=64", "dropout=0.5")
    assert hashed("+method=lora", "quant.blocksize=128") == hashed("+method=lora")
    assert hashed("+method=qlora", "quant.blocksize=128") != hashed("+method=qlora")
    lora = hashed("+method=lora", "rank=4", "tracking=wandb")
    assert lora == hashed("+method=lora", "rank=4") != hashed("+method=lora", "rank=8")
    monkeypatch.setattr(identity, "VERSION", identity.VERSION + 1)
    assert hashed("+method=lora", "rank=4") != lora


@pytest.mark.parametrize("name", [path.stem for path in (PROJECT_ROOT / "conf" / "sweep").glob("*.yaml")])
def test_every_ready_sweep_has_jobs_that_resolve(name):
    with initialize_config_dir(str(PROJECT_ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=[f"sweep={name}"], return_hydra_config=True)
    assert cfg.hydra.mode.name == "MULTIRUN"
    params = [f"{key}={value}" for key, value in cfg.hydra.sweeper.params.items()]
    choices = [
        [f"{override.key_or_group}={value}" for value in override.sweep_string_iterator()]
        if override.is_sweep_override()
        else [f"{override.key_or_group}={override.get_value_element_as_str()}"]
        for override in OverridesParser.create().parse_overrides(params)
    ]
    first = [f"+{values[0]}" if values[0].startswith("method=") else values[0] for values in choices]
    hashes = set()
    for position, values in enumerate(choices):
        for value in values:
            job = [*first[:position], f"+{value}" if value.startswith("method=") else value, *first[position + 1 :]]
            hashes.add(identity.config_hash(resolve(composed(f"sweep={name}", *job, "output_dir=unused"))))
    assert len(hashes) == 1 + sum(len(values) - 1 for values in choices)
