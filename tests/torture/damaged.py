"""Damaged files: each is refused in one line that names it, or used with the very same result.

A subject is a directory as a command leaves it, the same of another seed, and the code that reads it. Every second
time the checksums are gone, as in a file from elsewhere. Then a flipped bit cannot show, but whoever reads it must
still end in a result or in one line.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from experiments import search
from experiments.blocks.quant_map import QuantMap, blocksizes, write_map
from experiments.config import QuantConfig, resolve
from experiments.data import samples
from experiments.data.docstrings import docstring_pairs
from experiments.data.samples import load_data
from experiments.errors import UserError
from experiments.models.directory import load_directory
from experiments.models.load import prepare_model
from experiments.runs import one_run
from experiments.runs.before_stop import BeforeStop
from experiments.runs.checkpoints import Checkpoints, of_run
from experiments.runs.config_file import read_config
from experiments.runs.groups import group, read_runs
from experiments.runs.output_files import OutputFiles
from experiments.runs.start import checkpoint_of
from experiments.system.cli import composed
from experiments.training.loop import Trainer
from modules import detach, load_adapter, quantize
from modules.files.bitsandbytes import save_bnb4
from modules.files.checked import COUNT, ENTRY, SUMS, seal_directory
from modules.files.peft import adapter_state
from tests.experiments.helpers import CHECKPOINTS, SMALL, TINY, tiny, write_chats
from tests.torture.damage import WAYS, retyped

REFUSALS = (UserError, ValueError, OSError)  # that a command shows as one line


@dataclass
class Subject:
    """
    Attributes:
        whole, other: a directory, and one of the same kind with other contents.
        files: those that are damaged.
        use: reads a directory; returns anything that can be compared.
        remade: whether a damaged file is made again, so that nothing may be refused.
    """

    name: str
    whole: Path
    other: Path
    files: list[str]
    use: Callable[[Path], Any]
    remade: bool = False


def campaign(count: int, folder: Path, seed: int = 0) -> list[str]:
    """Damage `count` files; a line for each that was neither refused well nor used with the same result."""
    findings = []
    search.optuna.logging.set_verbosity(search.optuna.logging.WARNING)
    with quiet():
        made = subjects(folder)
        expected = {subject.name: subject.use(_copy(subject.whole, folder)) for subject in made}
    for number in range(count):
        rng = Random(f"{seed} {number}")
        subject = made[number % len(made)]
        with quiet():
            if found := _once(subject, expected[subject.name], folder, rng):
                findings.append(f"damaged {number} ({subject.name}): {found}")
    return findings


def _once(subject: Subject, expected: Any, folder: Path, rng: Random) -> str | None:
    directory = _copy(subject.whole, folder)
    name = rng.choice(subject.files)
    path = directory / name
    is_sealed = subject.remade or path.name == SUMS or rng.random() < 0.7
    if not is_sealed:
        strip(directory)
    whole, other = path.read_bytes(), (subject.other / name).read_bytes()
    way = rng.choice([*WAYS, retyped, retyped] if name.endswith((".json", ".jsonl")) else WAYS)
    content = way(whole, other, rng)
    path.write_bytes(content)
    told = f"{name} {way.__name__}, {'with' if is_sealed else 'without'} checksums"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = subject.use(directory)
    except REFUSALS as error:
        if subject.remade:
            return f"{told}: not made again: {error}"
        if "\n" in str(error):
            return f"{told}: more than one line: {error!r}"
        if is_sealed and path.name not in str(error) and SUMS not in str(error):
            return f"{told}: refused without its name: {error}"
        return None
    except Exception as error:
        return f"{told}: traceback: {shown(error)}"
    if is_sealed and content != whole and result != expected:
        return f"{told}: used with another result"
    return None


def shown(error: Exception) -> str:
    """The error, and the line that raised it."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({where.filename}:{where.lineno})"


def _copy(whole: Path, folder: Path) -> Path:
    """A copy under one name always: messages and results name paths."""
    target = folder / "subject"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(whole, target)
    return target


def strip(directory: Path) -> None:
    """Take the checksums away, as in files of others."""
    for path in directory.rglob("*"):
        if path.name == SUMS:
            path.unlink()
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                kept = {key: value for key, value in (file.metadata() or {}).items() if key not in (ENTRY, COUNT)}
            tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
            save_file(tensors, path, metadata=kept)
        elif path.suffix in (".yaml", ".json") and path.read_bytes().startswith(b"# checksum"):
            path.write_bytes(path.read_bytes().partition(b"\n")[2])


@contextlib.contextmanager
def quiet():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def digest(tensors: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def names_in(directory: Path) -> list[str]:
    return [str(path.relative_to(directory)) for path in sorted(directory.rglob("*")) if path.is_file()]


def subjects(folder: Path) -> list[Subject]:
    """All kinds of files that the project writes and reads again."""
    one, other = (_run(folder, seed) for seed in (0, 1))
    made = [_checkpoint(one, other), _metrics(one, other), _adapter(one, other), _config(one, other)]
    made += [_report(one, other), _map(folder), _study(folder), _tokens(folder), _docstrings(folder)]
    return made + [_model(folder, packed) for packed in (True, False)]


def _run(folder: Path, seed: int) -> Path:
    """A run of six steps with checkpoints, as its command leaves it."""
    path = folder / f"run-{seed}" / "subject"
    where = ["data=jsonl", f"data.path={write_chats(folder)}", f"output_dir={folder / 'subject'}", f"seed={seed}"]
    one_run.run(resolve(composed("+method=qdora", *TINY, *CHECKPOINTS, *SMALL, "lr=1e-2", *where)))
    path.parent.mkdir()
    (folder / "subject").rename(path)
    return path


def _checkpoint(one: Path, other: Path) -> Subject:
    """Go on from a checkpoint: weights, state of the optimizer, progress, random generators."""
    cfg = read_config(one)
    model, tokenizer = prepare_model(cfg, torch.device("cpu"), torch.float32, None)
    data = load_data(cfg.data, tokenizer)
    trainer = Trainer(model, cfg, torch.float32, tokenizer.pad_token_id)
    step = of_run(one)[-1].name

    def use(run: Path) -> Any:
        cfg.resume, cfg.trainer.steps = str(run), 8
        checkpoint = checkpoint_of(cfg)
        told = Checkpoints(run, cfg, data).restore(checkpoint, trainer)
        before = BeforeStop.of_checkpoint(told)
        state = trainer.optimizer.state_dict()
        tensors = {f"{i} {key}": torch.as_tensor(v) for i, s in state["state"].items() for key, v in s.items()}
        random = digest({"torch": torch.get_rng_state()})
        return (
            digest(tensors | adapter_state(model)),
            state["param_groups"],
            repr(trainer.trained),
            repr(before),
            random,
        )

    names = [f"checkpoints/{step}/{name}" for name in ("weights.safetensors", "training.safetensors")]
    names += [f"checkpoints/{step}/{name}" for name in ("training.json", "config.yaml", SUMS)]
    return Subject("checkpoint", one, other, names, use)


def _metrics(one: Path, other: Path) -> Subject:
    def use(run: Path) -> Any:
        cfg, files = read_config(run), OutputFiles(run)
        story = json.loads((of_run(run)[-1] / "training.json").read_text())["story"]
        files.rewind(cfg, 6, story["metrics"])
        return files.records

    return Subject("metrics", one, other, ["metrics.jsonl"], use)


def _adapter(one: Path, other: Path) -> Subject:
    base, _ = tiny()
    quantize(base)

    def use(run: Path) -> Any:
        load_adapter(base, run / "adapter")
        found = digest(adapter_state(base))
        detach(base)
        return found

    return Subject("adapter", one, other, [f"adapter/{name}" for name in names_in(one / "adapter")], use)


def _config(one: Path, other: Path) -> Subject:
    return Subject("config", one, other, ["config.yaml", SUMS], lambda run: repr(read_config(run)))


def _report(one: Path, other: Path) -> Subject:
    """The report leaves a run out that it cannot read, in a line that names it."""

    def use(run: Path) -> Any:
        runs, problems = read_runs(run)
        if problems:
            raise UserError("; ".join(problems))
        return repr(group(runs))

    return Subject("report", one, other, ["result.json", "metrics.jsonl", "spectrum.csv", SUMS], use)


def _map(folder: Path) -> Subject:
    """A map of block sizes; the other one is of another model."""
    shapes = {}
    for name, out in (("map-0", 64), ("map-1", 128)):
        (folder / name).mkdir()
        shapes[name] = {f"model.layers.{i}.mlp.up_proj": (out, 64) for i in range(9)}
        write_map(folder / name / "map.yaml", QuantMap(True, shapes[name], dict.fromkeys(shapes[name], 64)), "made up")

    def use(directory: Path) -> Any:
        return blocksizes(QuantConfig(name="tuned", map=str(directory / "map.yaml"), double=True), shapes["map-0"])

    return Subject("map", folder / "map-0", folder / "map-1", ["map.yaml"], use)


def _study(folder: Path) -> Subject:
    """A study of eight trials, as a search leaves it."""
    space = {
        "lr": search._range("lr=log(1e-4,1e-1)", True, ["1e-4", "1e-1"]),
        "rank": search._choice("rank", ["2", "4"]),
    }
    for number in range(2):
        path = folder / f"study-{number}"
        path.mkdir()
        study = search.open_study(path, [f"seed={number}", "rank=2,4", search.PART])
        for _ in range(8):
            trial = study.ask()
            for draw in space.values():
                draw(trial)
            search._keep_checksum(study, trial.number)
            trial.report(1.0 + number, 2)
            study.tell(trial, 0.5 + number + trial.number / 10)
            search._keep_checksum(study, trial.number)

    def use(directory: Path) -> Any:
        study = search.open_study(directory, ["seed=0", "rank=2,4", search.PART])
        return [(t.number, t.params, t.values, t.intermediate_values, t.state, t.user_attrs) for t in study.trials]

    return Subject("study", folder / "study-0", folder / "study-1", ["study.db"], use)


def _tokens(folder: Path) -> Subject:
    """Tokens in the cache: made again where they are damaged."""
    _, tokenizer = tiny()
    cfg = resolve(composed("+method=lora", *TINY, "data=jsonl", f"data.path={folder / 'chats.jsonl'}")).data

    def use(cache: Path) -> Any:
        with _cache(cache), patched(samples, "LARGE", 1):
            data = load_data(cfg, tokenizer)
            return data.fingerprint, data.note, [e.reference for e in data.heldout]

    for number in range(2):
        use(folder / f"tokens-{number}")
    [where] = (folder / "tokens-0").glob("data-*")
    ours = [f"{where.name}/{name}" for name in names_in(where)]
    return Subject("tokens", folder / "tokens-0", folder / "tokens-1", ours, use, remade=True)


def _docstrings(folder: Path) -> Subject:
    library = folder / "library"
    library.mkdir()
    (library / "module.py").write_text(
        'def one(x):\n    """Return x and one more."""\n    y = x + 1\n    return y\n' * 3
    )

    def use(cache: Path) -> Any:
        with _cache(cache):
            return docstring_pairs(library)

    for number in range(2):
        use(folder / f"pairs-{number}")
    return Subject("docstrings", *(folder / f"pairs-{n}" for n in range(2)), names_in(folder / "pairs-0"), use, True)


def _model(folder: Path, packed: bool) -> Subject:
    """A model directory as an export or a GGUF cache has it."""
    name = "packed" if packed else "dense"
    for number in range(2):
        model, tokenizer = tiny()
        path = folder / f"{name}-{number}"
        if number:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.5)
        if packed:
            quantize(model)
            save_bnb4(model, path)
        else:
            model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        seal_directory(path)

    def use(directory: Path) -> Any:
        model, tokenizer = load_directory(directory, torch.float32)
        ids = tokenizer("def a b c")["input_ids"]
        return digest(model.state_dict()), ids, tokenizer.chat_template, repr(model.config)

    files = [file for file in names_in(folder / f"{name}-0") if file != "README.md"]
    return Subject(name, folder / f"{name}-0", folder / f"{name}-1", files, use)


@contextlib.contextmanager
def patched(owner: Any, name: str, value: Any):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def _cache(directory: Path):
    before = os.environ.get("QDORA_CACHE")
    os.environ["QDORA_CACHE"] = str(directory)
    try:
        yield
    finally:
        if before is None:
            del os.environ["QDORA_CACHE"]
        else:
            os.environ["QDORA_CACHE"] = before
