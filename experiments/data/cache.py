"""Tokens of large data, kept in the cache (`.cache/`, or `$QDORA_CACHE`): one folder for each content and settings.

    data-<key>/
        ids.bin … rows.bin          the samples, as store.py has them
        train.bin, heldout.bin      the places of both parts
        about.json                  size and SHA-256 of each of these, the shares of sources, the note

The key is a hash of the files' bytes, the tokenizer with its chat template, and the settings. A folder is filled under
another name and renamed, so each is whole; one that is damaged is made again.
"""

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import tokenizers
import transformers
from numpy import ndarray
from transformers import PreTrainedTokenizerBase

from experiments.config import DataConfig
from experiments.data.store import DTYPES, Examples, Samples, Writer, mapped, read_array, write_array
from experiments.system import parallel
from experiments.system.files import alone, cache_dir, delete_partials, directory_atomically
from modules.files.checked import read_checked, with_checksum

VERSION = 1  # raise it when a change to experiments/data/ changes the tokens of some data
ABOUT, PLACES = "about.json", ("train", "heldout")
NOT_OF_TOKENS = ("path", "sources", "heldout_path", "answer_tokens", "packing")  # keys that change no token

Made = tuple[Samples, dict[str, ndarray], list[tuple[int, int]] | None, str]  # samples, places, shares, note
Loaded = tuple[Examples, Examples, str]  # training, held out, note


def examples_of(made: Made) -> Loaded:
    samples, places, shares, note = made
    return Examples(samples, places["train"], shares), Examples(samples, places["heldout"]), note


def cached(
    cfg: DataConfig, tokenizer: PreTrainedTokenizerBase, files: list[tuple], make: Callable[[Writer], Made]
) -> Loaded:
    """What `make` makes of the files, from the cache if it is there.

    Args:
        files: all that are read, each with what is said of its source.
    """
    folder = cache_dir() / f"data-{_key(cfg, tokenizer, files)}"
    with _alone(folder.with_name(f".{folder.name}.lock")) as is_alone:
        if is_alone:
            delete_partials(folder)
        if not _is_whole(folder):
            if folder.exists():
                print(f"note: {folder} is damaged, so it is made again", file=sys.stderr)
            if parallel.is_main():
                print(f"tokenizing once; the tokens are kept in {folder}", flush=True)
            with directory_atomically(folder) as partial:
                _write(partial, make(Writer(partial)))
    about = json.loads(read_checked(folder / ABOUT))
    places = {name: read_array(folder, name, "int64") for name in PLACES}
    shares = about["shares"] and [tuple(share) for share in about["shares"]]
    return examples_of((mapped(folder), places, shares, about["note"]))


def _write(folder: Path, made: Made) -> None:
    _, places, shares, note = made
    for name, array in places.items():
        write_array(folder, name, array)
    files = {name: _digest(folder / f"{name}.bin") for name in (*DTYPES, *PLACES)}
    (folder / ABOUT).write_text(with_checksum(json.dumps({"files": files, "shares": shares, "note": note}) + "\n"))


def _is_whole(folder: Path) -> bool:
    try:
        files = json.loads(read_checked(folder / ABOUT))["files"]
        return all(_digest(folder / f"{name}.bin") == files[name] for name in (*DTYPES, *PLACES))
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _key(cfg: DataConfig, tokenizer: PreTrainedTokenizerBase, files: list[tuple]) -> str:
    settings = {key: value for key, value in asdict(cfg).items() if key not in NOT_OF_TOKENS}
    contents = [[_digest(Path(name).expanduser()), Path(name).suffixes, *about] for name, *about in files]
    about = [VERSION, tokenizers.__version__, transformers.__version__, settings, contents]
    about += [tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(tokenizer)]
    about += [tokenizer.special_tokens_map, str(tokenizer.chat_template)]
    about += [getattr(tokenizer, "chat_template_kwargs", None), getattr(tokenizer, "known_tokens", None)]
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[bool]:
    """Inside, no other process is: the first one makes the tokens that the others find. Of the processes of one run
    this is process 0, which shows its progress. False: the file system has no locks, so each makes its own."""
    if not parallel.is_main():
        parallel.wait()
    with alone(lock) as locked:
        if parallel.is_main():
            parallel.wait()
        yield locked
