"""`save_pretrained` of a transformers model with an adapter: it writes the adapter, as PEFT's models do.

transformers' own would write the tensors of the adapted linears under names that no model class has, and would load the
directory with random linears in their place.
"""

from collections.abc import Callable
from pathlib import Path
from types import MethodType

from torch import nn

from modules.adapters.state import state_of

_write: list[Callable] = []  # save_adapter of modules/files/peft.py, which imports modules/adapters and not vice versa


def saves_adapters(save_adapter: Callable) -> Callable:
    """Decorator of the function (model, directory, base_model_name) that writes the active adapter."""
    _write[:] = [save_adapter]
    return save_adapter


def save_as_adapter(model: nn.Module) -> None:
    """Until `forget`, `model.save_pretrained` writes the active adapter, or the model if none is in the tree."""
    if hasattr(type(model), "save_pretrained"):
        model.save_pretrained = MethodType(_save_pretrained, model)


def _save_pretrained(model: nn.Module, save_directory: str | Path, is_main_process: bool = True, **options) -> None:
    state = state_of(model)
    if state is None or state.active is None or state.merged:
        type(model).save_pretrained(model, save_directory, is_main_process, **options)
        return
    if options.get("push_to_hub"):
        raise ValueError("push_to_hub: a model with an adapter is written to disk only; upload that directory")
    if is_main_process:
        _write[0](model, save_directory, base_model_name=model.config._name_or_path or None)
