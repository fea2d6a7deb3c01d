"""Checkpoints: all that a run needs to go on as if it had never stopped.

    <run>/checkpoints/step-00000010/
        weights.safetensors     the parameters that train, by name
        training.safetensors    the optimizer's state, <parameter>:<key>; the random generators of torch
        training.json           progress, schedule, loss scaler, the other random generators
        config.yaml             the run's
        adapter/                the adapter (modules/checkpoint.py); not where every weight trains
    <run>/checkpoints/best-00000008/
        weights.safetensors, config.yaml, adapter/

A directory is filled under another name and renamed, so each is whole. Nothing in it is a pickle. The position in the
data need not be kept: the batches of a step are a function of its number (experiments/data.py).
"""

import json
import random
from dataclasses import asdict
from pathlib import Path

import numpy
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from experiments.config import Config
from experiments.data import Data
from experiments.errors import UserError
from experiments.evaluation import Evaluation
from experiments.files import delete_directory, directory_atomically
from experiments.runs import ADAPTER, base_name, load_trained, read_tensors, save_trained, write_config
from experiments.train import Trained, Trainer
from modules import save_adapter

FOLDER, LATEST = "checkpoints", "latest"
TENSORS, STATE = "training.safetensors", "training.json"


class Checkpoints:
    """Writes the checkpoints of the run in directory `run`, and keeps the newest `trainer.keep_checkpoints` of them."""

    def __init__(self, run: Path, cfg: Config, data: Data):
        self.folder, self.cfg, self.data = run / FOLDER, cfg, data

    def save(self, trainer: Trainer, story: dict) -> None:
        """Write a checkpoint.

        Args:
            story: what the run must remember beside the trainer's state, as JSON.
        """
        tensors, state = _training_state(trainer)
        state |= {
            "tensors": sorted(tensors),
            "data_fingerprint": self.data.fingerprint,
            "dtype": str(trainer.dtype),
            "story": story,
        }
        with directory_atomically(self.folder / f"step-{trainer.trained.steps:08}") as directory:
            self._write_weights(trainer.model, directory)
            save_file(tensors, directory / TENSORS)
            (directory / STATE).write_text(json.dumps(state) + "\n")
        self._prune(trainer.trained.best_step)

    def save_best(self, trainer: Trainer) -> None:
        with directory_atomically(self._best(trainer.trained.best_step)) as directory:
            self._write_weights(trainer.model, directory)
        self._prune(trainer.trained.best_step)

    def restore_best(self, trainer: Trainer) -> None:
        """Give the model the weights that had the best held-out loss."""
        load_trained(trainer.model, self._best(trainer.trained.best_step))

    def restore(self, checkpoint: Path, trainer: Trainer) -> dict:
        """Put `trainer`, its model and the random generators in the state of `checkpoint`; return its story.

        Raises:
            UserError: a file is missing or damaged, or was written for another model, dtype or data.
        """
        state = read_state(checkpoint)
        if state["dtype"] != str(trainer.dtype):
            was, now = (name.removeprefix("torch.") for name in (state["dtype"], str(trainer.dtype)))
            raise UserError(f"{checkpoint} computed in {was}, this run does in {now}: set trainer.dtype={was}")
        if state["data_fingerprint"] != self.data.fingerprint:
            raise UserError(f"{checkpoint} was trained on other data than {self.cfg.data.name} is now")
        tensors = read_tensors(checkpoint / TENSORS)
        if missing := set(state["tensors"]) - tensors.keys():
            raise UserError(f"{checkpoint / TENSORS} lacks {', '.join(sorted(missing)[:3])}")
        load_trained(trainer.model, checkpoint)
        trainer.trained = state["trained"]
        trainer.schedule.load_state_dict(state["schedule"])
        trainer.scaler.load_state_dict(state["scaler"])
        _load_optimizer(trainer, state["optimizer"], tensors)
        _restore_random(state["random"], tensors)
        return state["story"]

    def _write_weights(self, model: nn.Module, directory: Path) -> None:
        save_trained(model, directory)
        write_config(self.cfg, directory)
        if self.cfg.method.adapter != "none":
            save_adapter(model, directory / ADAPTER, base_name(self.cfg, self.folder.parent))

    def _best(self, step: int) -> Path:
        return self.folder / f"best-{step:08}"

    def _prune(self, best_step: int) -> None:
        """Delete old checkpoints, best weights that no remaining one refers to, and what a killed process left."""
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
        raise UserError(f"resume={LATEST}: no run in {folder} has a checkpoint; trainer.checkpoint_every=N makes some")
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
        what = (
            "no such directory" if not path.exists() else "no checkpoint there; trainer.checkpoint_every=N makes some"
        )
        raise UserError(f"resume={resume}: {path}: {what}")
    return checkpoints[-1]


def read_state(checkpoint: Path) -> dict:
    """What training.json holds; "trained" is a `Trained`."""
    try:
        state = json.loads((checkpoint / STATE).read_text())
    except (OSError, ValueError) as error:  # ValueError: not JSON, not text
        raise UserError(f"{checkpoint / STATE} cannot be read: {error}") from error
    trained = Trained(**state["trained"])
    for name in ("evaluation", "best"):
        if value := getattr(trained, name):
            setattr(trained, name, Evaluation(**value))
    return state | {"trained": trained}


def _training_state(trainer: Trainer) -> tuple[dict[str, Tensor], dict]:
    tensors: dict[str, Tensor] = {"random:torch": torch.get_rng_state()}
    if trainer.model.device.type == "cuda":
        tensors["random:cuda"] = torch.cuda.get_rng_state(trainer.model.device)
    optimizer = trainer.optimizer.state_dict()
    numbers: dict[str, dict] = {}
    for name, index in _numbering(trainer).items():
        for key, value in optimizer["state"].get(index, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}:{key}"] = value.contiguous()
            else:
                numbers.setdefault(name, {})[key] = value
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = numpy.random.get_state()
    return tensors, {
        "trained": asdict(trainer.trained),
        "schedule": trainer.schedule.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "optimizer": {"param_groups": optimizer["param_groups"], "numbers": numbers},
        "random": {"python": [version, words, gauss], "numpy": [keys.tolist(), position, has_gauss, cached]},
    }


def _numbering(trainer: Trainer) -> dict[str, int]:
    """The number that the optimizer's state_dict gives each parameter, by the parameter's name."""
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    return {names[id(p)]: number for number, p in enumerate(parameters)}


def _load_optimizer(trainer: Trainer, saved: dict, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict] = {}
    numbering = _numbering(trainer)
    for name, numbers in saved["numbers"].items():
        state.setdefault(numbering[name], {}).update(numbers)
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition(":")
        if name != "random":
            state.setdefault(numbering[name], {})[key] = tensor
    trainer.optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})


def _restore_random(saved: dict, tensors: dict[str, Tensor]) -> None:
    torch.set_rng_state(tensors["random:torch"])
    if "random:cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random:cuda"])
    version, words, gauss = saved["python"]
    random.setstate((version, tuple(words), gauss))
    keys, position, has_gauss, cached = saved["numpy"]
    numpy.random.set_state(("MT19937", numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached))
