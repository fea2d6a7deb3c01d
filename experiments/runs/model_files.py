"""The weights of a run on disk.

<run>/adapter/               the adapter (modules/files/peft.py)
<run>/model/                 in its place, where every weight trained: a Hugging Face directory
<run>/base/                  the packed base as bitsandbytes has it, where `init` chose its codes, as qpissa does
<checkpoint>/weights.safetensors    the parameters that train, by name; beside it adapter/
"""

import itertools
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiments.config import Config, ModelConfig
from experiments.errors import UserError
from experiments.system.files import directory_atomically
from experiments.system.quiet import quiet
from experiments.training.engines import Engine
from modules import save_adapter, set_adapter
from modules.adapters.base_print import is_other_base
from modules.adapters.config import changes_base
from modules.adapters.state import DEFAULT, state_of
from modules.files.bitsandbytes import load_bnb4, save_packed
from modules.files.checked import base_of, load_tensors, save_tensors, seal_directory

ADAPTER, MODEL, BASE, WEIGHTS = "adapter", "model", "base", "weights.safetensors"


def save_weights(cfg: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run: Path) -> None:
    """Write the adapter, or the whole model where every weight trained, in place of an earlier one."""
    if cfg.method.adapter == "none":
        with directory_atomically(run / MODEL) as directory, quiet():
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
            seal_directory(directory)
    else:
        with directory_atomically(run / ADAPTER) as directory:
            save_adapter(model, directory, base_name(cfg, run))


def save_base(cfg: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run: Path) -> None:
    """Write the packed base to base/ if `cfg.init` chose its codes: then nothing else is that base. Read it back, for
    without it the trained adapter would be lost.

    Raises:
        UserError: it cannot be written or read.
    """
    if not changes_base(cfg.init):
        return
    set_adapter(model, None)
    with directory_atomically(run / BASE) as directory, quiet():
        directory.rmdir()  # save_packed makes it
        try:
            save_packed(model, directory)
            load_bnb4(directory)
        except ValueError as error:
            raise UserError(f"init={cfg.init} keeps a base of its own, which cannot be done here: {error}") from error
        tokenizer.save_pretrained(directory)
        seal_directory(directory)
    set_adapter(model, DEFAULT)


def base_name(cfg: Config, run: Path) -> str:
    """The base model's name or directory for adapter_config.json of the run in `run`."""
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


def save_trained(model: nn.Module, directory: Path) -> None:
    """Write the parameters that train, and tensors of the adapter that they depend on, to weights.safetensors."""
    tensors = {name: p.detach().contiguous() for name, p in _trained(model).items()}
    save_tensors(tensors, directory / WEIGHTS, _base_print(model))


@torch.no_grad()
def load_trained(model: nn.Module, directory: Path, engine: Engine | None = None) -> None:
    """Give `model` the values in weights.safetensors.

    Args:
        engine: the engine that has placed the model; None: none has.

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
    if is_other_base(base_of(path), _base_print(model)):
        raise UserError(f"{path} was trained on another base model of the same shapes: put that one back")
    for name, parameter in parameters.items():
        engine.set(parameter, tensors[name])


def _base_print(model: nn.Module) -> dict[str, str]:
    state = state_of(model)
    return {} if state is None else state.base_print


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return load_tensors(path)
    except ValueError as error:
        raise UserError(str(error)) from error


def _trained(model: nn.Module) -> dict[str, Tensor]:
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    frozen = (".lora_A", ".init_A", ".init_B")  # a frozen A, and where PiSSA and OLoRA began
    return {name: tensor for name, tensor in tensors if tensor.requires_grad or name.endswith(frozen)}
