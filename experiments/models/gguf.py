"""GGUF files, also those that packages carry, as Hugging Face directories in the cache.

A GGUF file is dequantized in full. Reading one takes transformers half a minute for 135M weights, so the result is
kept as a Hugging Face directory in the cache (`.cache/`, or `$QDORA_CACHE`), from which the next load takes a second.
"""

import hashlib
import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from gguf import GGUFReader, ReaderTensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from experiments.errors import UserError
from experiments.models.gguf_header import check_header
from experiments.models.whole import check_whole, first_three
from experiments.system import parallel
from experiments.system.files import alone, cache_dir, delete_directory, delete_partials, directory_atomically
from experiments.system.quiet import quiet
from modules.files.checked import Damaged, seal_directory, verify_directory


def wheel_directory(package: str) -> Path:
    """The model that an installed package carries, as a Hugging Face directory in the cache."""
    return gguf_as_directory(wheel_gguf(package))


def wheel_gguf(package: str) -> Path:
    """The GGUF file that an installed package carries.

    Raises:
        UserError: the package or the file is missing.
    """
    spec = importlib.util.find_spec(package)  # finds the file without importing the package
    if spec is None:
        raise UserError(f"the model's package {package} is not installed: run `make setup`")
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise UserError(f"the package {package} carries no GGUF file: delete .venv and run `make setup`")
    return files[0]


def gguf_as_directory(path: Path) -> Path:
    """The model in a GGUF file as a Hugging Face directory in the cache, made the first time."""
    stat = path.stat()
    identity = json.dumps([str(path.resolve()), stat.st_size, stat.st_mtime_ns, transformers.__version__])
    directory = cache_dir() / f"{path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    with parallel.main_first(), alone(directory.with_name(f".{directory.name}.lock")) as is_alone:
        if is_alone:
            delete_partials(directory)
        if directory.exists():
            try:
                verify_directory(directory)
            except Damaged as error:
                print(f"note: {error}: it is made again", file=sys.stderr)
                delete_directory(directory)
        if not directory.exists():
            _dequantize_gguf(path, directory)
    return directory


def _dequantize_gguf(path: Path, directory: Path) -> None:
    print(f"Reading {path.name} (once: the dequantized weights are kept in {directory.parent})", flush=True)
    with quiet():
        model, tokenizer = _read(path)
        with directory_atomically(directory) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            seal_directory(partial)


def _read(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in fp32 and its tokenizer. UserError: the file is damaged, or transformers does not read all of it."""
    check_header(path)
    where = {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
        tokenizer("a")  # as load_tokenizer
        # dequantize=True: transformers would otherwise keep the packed weights of some formats
        model, report = AutoModelForCausalLM.from_pretrained(
            path.parent,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # check_whole says which
            output_loading_info=True,
            **where,
        )
        tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    except Exception as error:  # a damaged file ends in any error
        told = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{path} cannot be read as a language model: {told}") from error
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    check_whole(path, model, report)
    if "rope_freqs.weight" in tensors:
        _scale_rotary(path, model.config, tensors["rope_freqs.weight"].data)
    _check_all_is_read(path, model, tensors)
    return model, tokenizer


def _scale_rotary(path: Path, config: PreTrainedConfig, divisors: np.ndarray) -> None:
    """Let `config` divide the rotary frequencies as the file says, which transformers does not read.

    llama.cpp writes the divisors [head_dim/2] of Llama 3.1 and its successors, not the settings that they come from.
    Of these only the largest divisor varies between models.
    """
    if (divisors == 1).all():
        return
    plain = config.rope_parameters
    scaled = plain | {"rope_type": "llama3", "factor": float(divisors.max()), "low_freq_factor": 1.0}
    scaled |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config.rope_parameters = scaled
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    exponents = torch.arange(0, 2 * len(divisors), 2) / (2 * len(divisors))
    expected = plain["rope_theta"] ** -exponents / torch.from_numpy(divisors.copy())
    if frequencies.shape != expected.shape or not torch.allclose(frequencies, expected, rtol=1e-3, atol=0):
        raise UserError(f"{path}: rope_freqs.weight is not Llama 3's, and no other is understood: take model=hf")


def _check_all_is_read(path: Path, model: PreTrainedModel, tensors: dict[str, ReaderTensor]) -> None:
    """Raise UserError if the file holds more weights than the model: transformers leaves out others without a word."""
    beyond = re.compile(rf"blk\.(?!({'|'.join(map(str, range(model.config.get_text_config().num_hidden_layers)))})\.)")
    ours = {name: t for name, t in tensors.items() if name != "rope_freqs.weight" and not beyond.match(name)}
    held = sum(int(tensor.n_elements) for tensor in ours.values())
    read = sum(parameter.numel() for parameter in model.parameters())  # of tied ones once, as in the file
    if held > read:
        odd = [name for name in ours if name.endswith(".bias") or not re.match(r"(blk|output|token_embd)[._]", name)]
        names = f", maybe {first_three(odd)}" if odd else ""
        kind = type(model).__name__
        raise UserError(f"{path} holds {held - read:,} values that {kind} does not read{names}: take model=hf")
