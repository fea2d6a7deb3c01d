"""Checkpoints: all that a run needs to go on as if it had never stopped.

    <run>/checkpoints/step-00000010/
        weights.safetensors     the parameters that train, by name
        training.safetensors    the optimizer's state, <parameter>:<key>; the random generators of torch
        training.json           progress, schedule, loss scaler, the other random generators
        config.yaml             the run's
        adapter/                the adapter (modules/files/peft.py); not where every weight trains
    <run>/checkpoints/best-00000008/
        weights.safetensors, config.yaml, adapter/

A directory is filled under another name and renamed, so each is whole. Nothing in it is a pickle. The position in the
data need not be kept: the batches of a step are a function of its number (experiments/data/samples.py).
"""

import contextlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy
import torch
from torch import Tensor

from experiments.config import Config
from experiments.data.samples import Data
from experiments.errors import UserError
from experiments.runs.config_file import write_config
from experiments.runs.model_files import ADAPTER, base_name, load_trained, read_tensors, save_trained
from experiments.system import parallel
from experiments.system.files import delete_directory, directory_atomically
from experiments.training.evaluation import Evaluation
from experiments.training.loop import Trainer, checkpoints_by_time
from experiments.training.trained import Trained
from modules import save_adapter
from modules.files.checked import Damaged, save_tensors, seal_directory, verify_file

FOLDER, LATEST = "checkpoints", "latest"
KEPT = "a run that has finished keeps some with trainer.checkpoint_every=N"
TENSORS, STATE = "training.safetensors", "training.json"


class Checkpoints:
    """Writes the checkpoints of the run in directory `run`, and keeps the newest `trainer.keep_checkpoints` of them."""

    def __init__(self, run: Path, cfg: Config, data: Data):
        self.folder, self.cfg, self.data = run / FOLDER, cfg, data
        self.wanted = checkpoints_by_time(cfg) or bool(cfg.trainer.checkpoint_every)

    def exist(self) -> bool:
        """Whether the run has one to go on from."""
        return bool(of_run(self.folder.parent))

    def delete(self) -> None:
        """Delete all of them, but for the best weights."""
        for path in of_run(self.folder.parent):
            delete_directory(path)
        with contextlib.suppress(OSError):  # not empty
            self.folder.rmdir()

    def save(self, trainer: Trainer, before_stop: dict) -> None:
        """Write a checkpoint.

        Args:
            before_stop: the run's own state beside the trainer's (before_stop.py), as JSON.
        """
        tensors, state = _training_state(trainer)
        state |= {
            "tensors": sorted(tensors),
            "data_fingerprint": self.data.fingerprint,
            "dtype": str(trainer.dtype),
            "story": before_stop,  # the name in the file
        }

        def write_training(directory: Path) -> None:
            save_tensors(tensors, directory / TENSORS)
            (directory / STATE).write_text(json.dumps(state) + "\n")

        self._write(trainer, self.folder / f"step-{trainer.trained.steps:08}", write_training)

    def save_best(self, trainer: Trainer) -> None:
        self._write(trainer, self._best(trainer.trained.best_step), lambda directory: None)

    def restore_best(self, trainer: Trainer) -> None:
        """Give the model the weights that had the best held-out loss."""
        load_trained(trainer.model, self._best(trainer.trained.best_step), trainer.engine)

    def restore(self, checkpoint: Path, trainer: Trainer) -> dict:
        """Put `trainer`, its model and the random generators in the state of `checkpoint`; return its `before_stop`.

        Raises:
            UserError: a file is missing or damaged, or was written for another model, dtype or data.
        """
        state = read_state(checkpoint)
        with _as_written(checkpoint / STATE):
            if state["dtype"] != str(trainer.dtype):
                was, now = (name.removeprefix("torch.") for name in (state["dtype"], str(trainer.dtype)))
                raise UserError(f"{checkpoint} computed in {was}, this run does in {now}: set trainer.dtype={was}")
            if state["data_fingerprint"] != self.data.fingerprint:
                raise UserError(f"{checkpoint} was trained on other data than {self.cfg.data.name} is now")
            tensors = read_tensors(checkpoint / TENSORS)
            if missing := set(state["tensors"]) - tensors.keys():
                raise UserError(f"{checkpoint / TENSORS} lacks {', '.join(sorted(missing)[:3])}")
            load_trained(trainer.model, checkpoint, trainer.engine)
            trainer.trained = state["trained"]
            trainer.schedule.load_state_dict(state["schedule"])
            trainer.scaler.load_state_dict(state["scaler"])
            _load_optimizer(trainer, state["optimizer"], tensors)
            _restore_random(state["random"], tensors, self.cfg.seed + trainer.trained.steps)
            return state["story"]

    def _write(self, trainer: Trainer, path: Path, write_more: Callable[[Path], None]) -> None:
        """Write the weights and more to `path`, where every process finds them afterwards."""
        model = trainer.model
        with trainer.engine.whole(model):
            if parallel.is_main():
                with directory_atomically(path) as directory:
                    save_trained(model, directory)
                    write_config(self.cfg, directory)
                    if self.cfg.method.adapter != "none":
                        save_adapter(model, directory / ADAPTER, base_name(self.cfg, self.folder.parent))
                    write_more(directory)
                    seal_directory(directory)
                self._prune(trainer.trained.best_step)
        parallel.wait()

    def _best(self, step: int) -> Path:
        return self.folder / f"best-{step:08}"

    def _prune(self, best_step: int) -> None:
        """Delete old checkpoints, best weights that no remaining one refers to, and files of a killed process."""
        checkpoints = of_run(self.folder.parent)
        kept = checkpoints[-self.cfg.trainer.keep_checkpoints :]
        best = {self._best(step) for step in [best_step, *(read_state(path)["trained"].best_step for path in kept)]}
        for path in [*self.folder.glob("step-*"), *self.folder.glob("best-*"), *self.folder.glob(".*.partial")]:
            if path not in kept and path not in best:
                delete_directory(path)


def of_run(run: Path) -> list[Path]:
    """The checkpoints in a run's directory, from old to new."""
    return sorted((run / FOLDER).glob("step-*"))


def newest_run(folder: Path) -> Path:
    """The run in `folder` that wrote a checkpoint last.

    Raises:
        UserError: none did.
    """
    written = sorted(folder.glob(f"*/{FOLDER}/step-*"), key=lambda path: path.stat().st_mtime)
    if not written:
        raise UserError(f"resume={LATEST}: no run in {folder} has a checkpoint; {KEPT}")
    return written[-1].parent.parent


def find(resume: str, output_dir: Path) -> Path:
    """The checkpoint that `resume` means: "latest" (of `output_dir`), a run's directory, or a checkpoint's.

    Raises:
        UserError: there is none.
    """
    path = output_dir if resume == LATEST else Path(resume).expanduser()
    if (path / STATE).is_file():
        return path.absolute()
    checkpoints = of_run(path.absolute())
    if not checkpoints:
        what = f"no checkpoint there; {KEPT}" if path.exists() else "no such directory"
        raise UserError(f"resume={resume}: {path}: {what}")
    return checkpoints[-1]


def read_state(checkpoint: Path) -> dict:
    """The content of training.json; "trained" is a `Trained`.

    Raises:
        UserError: the file is damaged, or not one that this program can have written.
    """
    path = checkpoint / STATE
    try:
        verify_file(path)
        state = json.loads(path.read_text())
    except Damaged as error:
        raise UserError(str(error)) from error
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not JSON, not text
        raise UserError(f"{path} cannot be read: {error}") from error
    with _as_written(path):
        # until there was `evaluated`, a checkpoint came after the evaluation of its step
        trained = Trained(**{"evaluated": state["trained"]["steps"]} | state["trained"])
        for name in ("evaluation", "best"):
            if value := getattr(trained, name):
                setattr(trained, name, Evaluation(**value))
        return state | {"trained": trained}


@contextlib.contextmanager
def _as_written(path: Path) -> Iterator[None]:
    """Inside, a value in `path` that is missing or of another kind than this program writes is a UserError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, OverflowError) as error:
        raise UserError(f"{path} is not as this program writes it: {error!r}") from error


def _training_state(trainer: Trainer) -> tuple[dict[str, Tensor], dict]:
    """The content of training.safetensors and of training.json, in process 0; every process must call it."""
    optimizer = trainer.optimizer.state_dict()
    numbers: dict[str, dict] = {}
    own: dict[str, Tensor] = {}
    parameters = _parameters(trainer)
    for index, name in enumerate(parameters):
        for key, value in optimizer["state"].get(index, {}).items():
            if isinstance(value, Tensor):
                own[f"{name}:{key}"] = value.contiguous()
            else:
                numbers.setdefault(name, {})[key] = value
    tensors = trainer.engine.gather_state(parameters, own)
    for process, states in enumerate(parallel.gather(_random_states(trainer.model.device))):
        tensors |= {_random_name(kind, process): state for kind, state in states.items()}
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = numpy.random.get_state()
    return tensors, {
        "trained": asdict(trainer.trained),
        "schedule": trainer.schedule.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "optimizer": {"param_groups": optimizer["param_groups"], "numbers": numbers},
        "random": {"python": [version, words, gauss], "numpy": [keys.tolist(), position, has_gauss, cached]},
    }


def _random_states(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's random generators, which differ between processes."""
    states = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _random_name(kind: str, process: int) -> str:
    return f"random:{kind}:{process}" if process else f"random:{kind}"


def _parameters(trainer: Trainer) -> dict[str, Tensor]:
    """The optimizer's parameters by name, in the order in which its state_dict numbers them."""
    trainer.engine.settle(trainer.model)
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    return {names[id(p)]: p for group in trainer.optimizer.param_groups for p in group["params"]}


def _load_optimizer(trainer: Trainer, saved: dict, tensors: dict[str, Tensor]) -> None:
    parameters = _parameters(trainer)
    numbering = {name: index for index, name in enumerate(parameters)}
    state: dict[int, dict] = {}
    for name, numbers in saved["numbers"].items():
        state.setdefault(numbering[name], {}).update(numbers)
    whole = {name: tensor for name, tensor in tensors.items() if not name.startswith("random:")}
    for full_name, tensor in trainer.engine.own_state(parameters, whole).items():
        name, _, key = full_name.rpartition(":")
        state.setdefault(numbering[name], {})[key] = tensor
    trainer.optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})


def _restore_random(saved: dict, tensors: dict[str, Tensor], seed: int) -> None:
    """Restore the random generators. `seed` is for a process that the saved run did not have."""
    process = parallel.rank()
    if _random_name("torch", process) in tensors:
        torch.set_rng_state(tensors[_random_name("torch", process)])
    else:
        torch.manual_seed(parallel.seed_of(seed))
    if _random_name("cuda", process) in tensors:
        torch.cuda.set_rng_state(tensors[_random_name("cuda", process)])
    version, words, gauss = saved["python"]
    random.setstate((version, tuple(words), gauss))
    keys, position, has_gauss, cached = saved["numpy"]
    numpy.random.set_state(("MT19937", numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached))
