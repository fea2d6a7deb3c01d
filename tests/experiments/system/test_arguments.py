"""Keys that are read from source against those that Python has; help, typos and the Tab key, without torch."""

import dataclasses
import importlib
import os
import signal
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from experiments import run
from experiments.errors import UserError
from experiments.system import arguments, keys
from experiments.system.cli import composed
from experiments.system.files import PROJECT_ROOT

HYDRA = {
    "run": "Config",
    "search": "Config",
    "plan": "PlanConfig",
    "extract": "ExtractConfig",
    "params": "ParamsConfig",
    "quant_study": "StudyConfig",
    "decompose_study": "DecomposeConfig",
    "tune_blocks": "TuneConfig",
    "try_maps": "TrialConfig",
}
OPTIONS = ("generate", "evaluate", "export")
RUN = keys.keys_of(PROJECT_ROOT / "experiments" / "run.py")


def names(schema: type, prefix: str = "") -> set[str]:
    """The full names of a dataclass' fields, by Python itself."""
    hints = typing.get_type_hints(schema)
    found = set()
    for field in dataclasses.fields(schema):
        kind = hints[field.name]
        inside = dataclasses.is_dataclass(kind)
        found |= names(kind, f"{prefix}{field.name}.") if inside else {prefix + field.name}
    return found


@pytest.mark.parametrize("command", [*HYDRA, *OPTIONS])
def test_keys_are_those_of_the_schema_and_each_has_a_meaning(command):
    source = keys.source_of(f"experiments.{command}")
    module = importlib.import_module(f"experiments.{command}" + ".__main__" * (source.name == "__main__.py"))
    found = keys.keys_of(source)
    own = {name for name in found.keys if command in HYDRA or "." not in name}
    assert own == names(getattr(module, HYDRA.get(command, "Options")))
    if command in HYDRA:
        assert [key.name for key in found.keys.values() if not key.meaning and not key.name.endswith(".name")] == []


def test_values_are_those_that_hydra_composes():
    cfg = composed("output_dir=unused")
    for name, key in RUN.keys.items():
        if name not in ("lr", "output_dir") and not name.startswith("method."):
            value = OmegaConf.select(cfg, name)
            assert OmegaConf.create([value]) == OmegaConf.create(f"[{key.default}]"), name


@pytest.mark.parametrize(
    "given, message",
    {
        "rnak=8": "no such key: rnak; did you mean rank?",
        "steps=3": "no such key: steps; did you mean trainer.steps?",
        "trainer.bach_size=3": "no such key: trainer.bach_size; did you mean trainer.batch_size",
        "xyz=3": "no such key: xyz; --help lists them",
        "method=qdora": "method=qdora: give it with a plus, +method=qdora",
        "+method=qlorra": "+method=qlorra: no such method; did you mean qlora? there are adapter",
        "+method=lora,doar": "+method=lora,doar: no such method; did you mean dora?",
        "model=smollm": "model=smollm: no such model; did you mean smollm2?",
        "data@second=docstring": "no such data@second; did you mean docstrings?",
        "rank=ten": "rank=ten: choose a whole number",
        "lr=1e-4,fast": "lr=1e-4,fast: choose a number",
        "trainer.compile=maybe": "trainer.compile=maybe: choose true or false",
    }.items(),
)
def test_a_wrong_argument_is_answered_with_the_one_that_was_meant(given, message):
    with pytest.raises(UserError) as error:
        arguments.check_keys(RUN, ["output_dir=x", given])
    assert message in str(error.value)


@pytest.mark.parametrize(
    "given",
    [
        *("rank=4,8", "rank=range(1,9)", "lr='1e-3'", "lr=${method.lr}", "lr=nan", "trainer.threads=null"),
        *("+method=qlora,dora", "++rank=3", "~tracking", "-m", "--cfg", "hydra/launcher=joblib", "sweep=rank"),
        *("rank_pattern={q_proj:8}", "rank_pattern.q_proj=8", "trainer.keep_best=True", "target_modules='.*[01].*'"),
        *(
            "hydra.verbose=true",
            "data.path=a=b.jsonl",
            "model.architecture={}",
            "model.architecture.vocab_size=8",
            "second.path=x",
        ),
    ],
)
def test_what_hydra_reads_is_left_to_it(given):
    arguments.check_keys(RUN, [given])


def without_torch(tmp_path: Path, *given: str) -> subprocess.CompletedProcess:
    """`python -m` with a torch, a transformers and a hydra that end the process."""
    for name in ("torch", "transformers", "hydra"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('imported')")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    return subprocess.run(
        [sys.executable, "-m", *given], cwd=PROJECT_ROOT, env=env, capture_output=True, text=True, timeout=120
    )


def test_a_typo_is_answered_before_torch_is_loaded(tmp_path):
    done = without_torch(tmp_path, "experiments.run", "+method=qdora", "rnak=8")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: no such key: rnak; did you mean rank?\n")
    done = without_torch(tmp_path, "experiments.run", "+method=qdora", "rank=8")
    assert "imported" in done.stderr, "the command itself needs torch"


COMMANDS = sorted(
    ".".join(path.relative_to(PROJECT_ROOT).with_suffix("").parts).removesuffix(".__main__")
    for folder in ("experiments", "kernels")
    for path in (PROJECT_ROOT / folder).rglob("*.py")
    if '\nif __name__ == "__main__":' in path.read_text() and path.stem != "worker"  # a process of bench
)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_needs_no_torch(tmp_path, command):
    done = without_torch(tmp_path, command, "--help")
    assert done.returncode == 0 and not done.stderr and done.stdout.strip()
    if command.startswith("experiments.") and keys.keys_of(keys.source_of(command)):
        assert len(done.stdout.splitlines()) > 10
    of_runs = ("experiments.run", "experiments.search", "experiments.plan")
    assert ("trainer.steps=20" in done.stdout) == (command in of_runs)


@pytest.mark.parametrize(
    "given, message",
    {
        "experiments.report /nowhere": "error: /nowhere: no such folder",
        "experiments.report --too x": "unrecognized arguments: --too",
        "experiments.bench qdoar": "error: nothing matches qdoar: there are SmolLM2-135M qdora",
        "experiments.bench.curves --steps 3": "--steps 3: at least 20",
        "kernels.bench nf4_dequantise": "error: no benchmark 'nf4_dequantise': choose from nf4_quantize",
        "kernels.aot --targets sm_13": "unknown target sm_13; choose from sm_75",
    }.items(),
)
def test_options_are_checked_before_torch_is_loaded(tmp_path, given, message):
    done = without_torch(tmp_path, *given.split())
    assert done.returncode in (1, 2) and message in done.stderr and "imported" not in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_during_the_imports_ends_in_one_line(tmp_path, command):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import time; print('begun', flush=True); time.sleep(60)")
    process = [sys.executable, "-m", command, *["."] * (command == "experiments.report")]  # it asks for a folder
    environment = {"cwd": PROJECT_ROOT, "env": os.environ | {"PYTHONPATH": str(tmp_path)}}
    environment["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background ignores it
    begun = subprocess.Popen(process, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **environment)
    assert begun.stdout.readline() == "begun\n"
    begun.send_signal(signal.SIGINT)
    _, error = begun.communicate(timeout=60)
    assert (begun.returncode, error) == (130, "interrupted\n")


@pytest.mark.parametrize("command", ["experiments.run", "kernels.bench"])
def test_a_python_without_torch_says_what_to_do(command):
    done = subprocess.run([sys.executable, "-S", "-m", command], cwd=PROJECT_ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "has no torch: `source .venv/bin/activate` first" in done.stderr


@pytest.mark.parametrize(
    "word, found",
    {
        "trainer.st": {"trainer.steps="},
        "+met": {"+method="},
        "+method=qd": {"+method=qdora"},
        "data@second=a": {"data@second=arithmetic"},
        "trainer.compile=t": {"trainer.compile=true"},
        "zzz": set(),
    }.items(),
)
def test_the_tab_key_in_bash(tmp_path, word, found):
    line = f"python -m experiments.run rank=8 {word}"
    script = (
        f'eval "$({sys.executable} -m experiments.run -sc install=bash)"\n'
        f"python() {{ {sys.executable} \"$@\"; }}\nCOMP_LINE='{line}'; COMP_POINT={len(line)}\n"
        'complete -p python >&2; _qdora_complete; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", script], cwd=PROJECT_ROOT, capture_output=True, text=True)
    assert set(done.stdout.split()) == found and "-F _qdora_complete python" in done.stderr, done.stderr


def test_help_inside_the_process(terminal):
    code, text = terminal(run, "--help")
    assert code == 0 and "trainer.steps=20" in text
