"""GGUF files, also those that packages carry, as Hugging Face directories in the cache.

A GGUF file is dequantized in full. Reading one takes transformers half a minute for 135M weights, so the result is
kept as a Hugging Face directory in the cache (`.cache/`, or `$QDORA_CACHE`), from which the next load takes a second.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from experiments.errors import UserError
from experiments.system import parallel
from experiments.system.files import cache_dir
from experiments.system.quiet import quiet
from modules.files.checked import seal_directory


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
    with parallel.main_first():
        if not directory.exists():
            _dequantize_gguf(path, directory)
    return directory


def _dequantize_gguf(path: Path, directory: Path) -> None:
    print(f"Reading {path.name} (once: the dequantized weights are kept in {directory.parent})", flush=True)
    with quiet():
        where = {"gguf_file": path.name, "local_files_only": True}
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
        # dequantize=True: transformers would otherwise keep the packed weights of some formats
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32, **where
        )
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        partial = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{path.stem}-"))
        try:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            seal_directory(partial)
            with contextlib.suppress(OSError):  # another process was faster: its directory serves as well
                os.rename(partial, directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
