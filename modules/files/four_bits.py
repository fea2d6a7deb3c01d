"""Load and save a model whose linears are packed in any of the formats that are known here."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from kernels.codebook import BLOCK_FORMATS
from modules.files.bitsandbytes import load_bnb4, save_bnb4
from modules.files.block_formats import load_block_format, save_block_format
from modules.files.packed_model import packed_linears, quantization_of


def load_4bit(directory: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model in a directory, by the writer that its configuration names. See `load_packed`."""
    theirs = (quantization_of(directory) or {}).get("quant_method") == "bitsandbytes"
    return (load_bnb4 if theirs else load_block_format)(directory, dtype)


def save_4bit(model: PreTrainedModel, directory: str | Path) -> None:
    """Write `model` in the format that has its data type. See `save_packed`."""
    in_blocks = any(linear.quant_type in BLOCK_FORMATS for linear in packed_linears(model).values())
    (save_block_format if in_blocks else save_bnb4)(model, directory)
