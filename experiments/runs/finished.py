"""The model of a finished run, or of a checkpoint, loaded to be used."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiments.config import Config, ModelConfig
from experiments.data.named_templates import set_template
from experiments.errors import UserError
from experiments.models.load import load_base, load_model
from experiments.runs.config_file import read_config
from experiments.runs.model_files import ADAPTER, MODEL, WEIGHTS, load_trained, over_own_base, run_of
from experiments.system import machine
from modules import adapters, dequantize, load_adapter, merge
from modules.adapters.base_print import OtherBase
from modules.adapters.merge import can_merge
from modules.adapters.state import named_adapter


@dataclass(frozen=True)
class FinishedRun:
    """The model of a run or of a checkpoint, trained weights included, in evaluation mode."""

    cfg: Config
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype  # of the weights that are not packed, and to compute in


def load_run(directory: Path, changes: list[str] = (), dense: bool = False) -> FinishedRun:
    """The model of the run in `directory`, on the device that its configuration names.

    Args:
        changes: to the configuration, such as "trainer.device=cpu".
        dense: make dense weights of packed ones and adapters: more memory, faster.

    Raises:
        UserError: no run there, no weights, or weights that do not fit the base model.
    """
    cfg = read_config(directory, changes)
    device, dtype = machine.set_up(cfg.trainer)
    model, tokenizer = _load(cfg, directory, dtype)
    set_template(cfg.data, tokenizer)
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
            with warnings.catch_warnings():
                warnings.simplefilter("error", OtherBase)
                load_adapter(model, directory / ADAPTER)
        except OtherBase as error:
            raise UserError(f"{error}: put that one back") from error
        except ValueError as error:
            raise UserError(str(error)) from error
    else:
        load_trained(model, directory)
    return model, tokenizer


def make_dense(model: nn.Module) -> None:
    """Merge the adapters and unpack the linears of `model`, in place: a plain model that computes the same.

    An adapter that cannot be merged stays, and so do the packed linears under it.
    """
    if adapters(model) and can_merge(named_adapter(model).config):
        merge(model, unload=True, report=False)
    dequantize(model)
