"""Two models of one architecture: a base, and the model that fine-tuning made of it."""

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiments.config import ModelConfig
from experiments.errors import UserError
from experiments.models.load import load_model
from experiments.models.named import model_names, named_model
from experiments.runs.model_files import MODEL


def model_config(where: str) -> ModelConfig:
    """The model that `where` names: a name in conf/model, a Hugging Face directory or a GGUF file.

    Raises:
        UserError: nothing of that name.
    """
    if where in model_names():
        return named_model(where)
    path = Path(where).expanduser()
    if not path.exists():
        names = ", ".join(model_names())
        raise UserError(f"{where}: no such directory or file, and no model of that name; there are {names}")
    if path.is_dir() and (path / MODEL).is_dir():  # a run's directory
        path = path / MODEL
    return ModelConfig(name=path.name, source="hf" if path.is_dir() else "gguf", path=str(path))


def load_pair(base: str, tuned: str) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """Two models of one architecture, dense in fp32 on the CPU, and the tokenizer of the first.

    Raises:
        UserError: one is not there, or they differ in names or shapes of parameters.
    """
    first, tokenizer = load_model(model_config(base), torch.float32, seed=0)
    second, _ = load_model(model_config(tuned), torch.float32, seed=0)
    shapes = [{name: tuple(p.shape) for name, p in model.named_parameters()} for model in (first, second)]
    if wrong := sorted(dict(shapes[0].items() ^ shapes[1].items())):
        name = wrong[0]
        raise UserError(
            f"{tuned} is not a fine-tuned {base}: {name} is {shapes[1].get(name, 'missing')} there, "
            f"not {shapes[0].get(name, 'missing')}"
        )
    return first, second, tokenizer
