"""A run's configuration and model, written to its directory and read back from it.

A run's directory holds config.yaml and adapter/ (modules/files/peft.py) or, where every weight trained, model/, a
Hugging Face directory. A checkpoint's holds config.yaml, weights.safetensors with the parameters that train, and
adapter/ too. Where `init` chose the codes of the packed base, as qpissa does, the run's directory has it in base/, as
bitsandbytes has it.
"""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiments.config import Config, ModelConfig, resolve
from experiments.errors import UserError
from experiments.models.load import load_base, load_model
from experiments.system import machine
from experiments.system.files import directory_atomically, write_atomically
from experiments.system.quiet import quiet
from experiments.training.engines import Engine
from modules import adapters, dequantize, load_adapter, merge, save_adapter, set_adapter
from modules.adapters.config import changes_base
from modules.adapters.merge import can_merge
from modules.adapters.state import DEFAULT, named_adapter
from modules.files.bitsandbytes import save_bnb4

CONFIG, ADAPTER, MODEL, BASE, WEIGHTS = "config.yaml", "adapter", "model", "base", "weights.safetensors"


def write_config(cfg: Config, directory: Path) -> None:
    """Write config.yaml. `resume` is left out: it is how a run was started, not what it is."""
    values = OmegaConf.structured(cfg)
    values.resume = None
    write_atomically(directory / CONFIG, OmegaConf.to_yaml(values))


def read_config(directory: Path, changes: list[str] = ()) -> Config:
    """What config.yaml says, with `changes` ("key=value") made; keys that it lacks have the schema's defaults.

    Raises:
        UserError: no such file, or not one that this program can have written.
    """
    path = directory / CONFIG
    try:
        values = OmegaConf.load(path)
        merged = OmegaConf.merge(OmegaConf.structured(Config), values, OmegaConf.from_dotlist(list(changes)))
        return resolve(merged)
    except FileNotFoundError as error:
        what = "no config.yaml there, so this is no run's directory" if directory.is_dir() else "no such directory"
        raise UserError(f"{directory}: {what}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error


def save_weights(cfg: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run: Path) -> None:
    """Write the adapter, or, where every weight trained, the whole model, in place of what was there."""
    if cfg.method.adapter == "none":
        with directory_atomically(run / MODEL) as directory, quiet():
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
    else:
        with directory_atomically(run / ADAPTER) as directory:
            save_adapter(model, directory, base_name(cfg, run))


def save_base(cfg: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run: Path) -> None:
    """Write the packed base to base/ if `cfg.init` chose its codes: then nothing else is that base."""
    if not changes_base(cfg.init):
        return
    set_adapter(model, None)
    with directory_atomically(run / BASE) as directory, quiet():
        directory.rmdir()  # save_bnb4 makes it
        save_bnb4(model, directory)
        tokenizer.save_pretrained(directory)
    set_adapter(model, DEFAULT)


def base_name(cfg: Config, run: Path) -> str:
    """What the adapter of the run in `run` is over, for its adapter_config.json."""
    return str((run / BASE).absolute()) if changes_base(cfg.init) else cfg.model.path or cfg.model.name


def run_of(directory: Path) -> Path:
    """The run's directory: `directory`, or, if that is a checkpoint's, the one that the checkpoint is in."""
    return directory.absolute().parent.parent if (directory / WEIGHTS).is_file() else directory


def over_own_base(cfg: Config, run: Path) -> Config:
    """`cfg`, but over the base that the run in `run` wrote, if its `init` chose one.

    Raises:
        UserError: it is not there.
    """
    if not changes_base(cfg.init):
        return cfg
    if not (run / BASE).is_dir():
        raise UserError(f"{run / BASE} is missing: the adapter of init={cfg.init} is nothing without its base")
    return replace(cfg, model=ModelConfig(name=cfg.model.name, source="hf", path=str(run / BASE)), init="default")


@dataclass(frozen=True)
class FinishedRun:
    """What a run or a checkpoint of it comes back as: the model has what it learned and is in evaluation mode."""

    cfg: Config
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype  # of the weights that are not packed, and to compute in


def load_run(directory: Path, changes: list[str] = (), dense: bool = False) -> FinishedRun:
    """The model of the run in `directory`, where its configuration says that it computes.

    Args:
        changes: to the configuration, such as "trainer.device=cpu".
        dense: make dense weights of packed ones and adapters: more memory, faster.

    Raises:
        UserError: no run there, no weights, or weights that do not fit the base model.
    """
    cfg = read_config(directory, changes)
    device = machine.pick_device(cfg.trainer)
    if device.type == "cpu":
        machine.set_up_cpu(cfg.trainer)
    dtype = machine.pick_dtype(cfg.trainer, device)
    model, tokenizer = _load(cfg, directory, dtype)
    if dense:
        make_dense(model)
    if device.type == "cpu":
        machine.keep_freed_memory()
    return FinishedRun(cfg, model.to(device).eval(), tokenizer, dtype)


def _load(cfg: Config, directory: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if (directory / MODEL).is_dir():
        return load_model(ModelConfig(name=MODEL, source="hf", path=str(directory / MODEL)), dtype, cfg.seed)
    if not (directory / ADAPTER).is_dir() and not (directory / WEIGHTS).is_file():
        raise UserError(f"{directory}: neither adapter/ nor model/ there: the run has not saved weights yet")
    model, tokenizer = load_base(over_own_base(cfg, run_of(directory)), dtype)
    if (directory / ADAPTER).is_dir():
        try:
            load_adapter(model, directory / ADAPTER)
        except ValueError as error:
            raise UserError(str(error)) from error
    else:
        load_trained(model, directory)
    return model, tokenizer


def make_dense(model: nn.Module) -> None:
    """Merge the adapters and unpack the linears of `model`, in place: a plain model that computes the same.

    An adapter that no dense layers amount to stays, and so do packed linears that it is on.
    """
    if adapters(model) and can_merge(named_adapter(model).config):
        merge(model, unload=True, report=False)
    dequantize(model)


def save_trained(model: nn.Module, directory: Path) -> None:
    """Write the parameters that train, and what else of an adapter they depend on, to weights.safetensors, by name."""
    save_file({name: p.detach().contiguous() for name, p in _trained(model).items()}, directory / WEIGHTS)


@torch.no_grad()
def load_trained(model: nn.Module, directory: Path, engine: Engine | None = None) -> None:
    """Give `model` the values in weights.safetensors.

    Args:
        engine: what has placed the model; None: nothing has.

    Raises:
        UserError: the file is missing or damaged, or has other names or shapes.
    """
    engine = engine or Engine(torch.device("cpu"))
    engine.settle(model)
    path = directory / WEIGHTS
    tensors, parameters = read_tensors(path), _trained(model)
    wrong = sorted(tensors.keys() ^ parameters.keys()) or [
        name for name in parameters if tensors[name].shape != parameters[name].shape
    ]
    if wrong:
        raise UserError(f"{path} was written for another model; it differs in {', '.join(wrong[:3])}")
    for name, parameter in parameters.items():
        engine.set(parameter, tensors[name])


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _trained(model: nn.Module) -> dict[str, Tensor]:
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    frozen = (".lora_A", ".init_A", ".init_B")  # a frozen A, and where PiSSA and OLoRA began
    return {name: tensor for name, tensor in tensors if tensor.requires_grad or name.endswith(frozen)}
