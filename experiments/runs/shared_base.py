"""The packed base of a sweep: quantized once, and kept on disk for the jobs that begin with the same one.

Such a job maps the file into its memory; no dense weights are read and packed. It computes the same bit for bit. Its
peak memory is without packing, which result.json says (`shared_base`) and a report over both kinds points out.
"""

import contextlib
import json
import secrets
import shutil
import signal
import weakref
from collections.abc import Iterator
from dataclasses import asdict
from multiprocessing.context import ForkServerContext
from pathlib import Path

from experiments.config import Config
from experiments.errors import UserError
from experiments.models.directory import is_packed, model_directory
from experiments.models.load import load_base
from experiments.system import machine, signals
from experiments.system.files import cache_dir, claim, is_free
from experiments.system.quiet import quiet
from modules.adapters.config import quantized_start
from modules.files.bitsandbytes import load_bnb4, save_packed

PREFIX, LOCKS = ".base-", ".locks"  # in the cache


class SharedBase:
    """The base of the newest job that has a packed one, in a temporary directory: one at a time, for a sweep of block
    sizes has many. The directory ends with this object or its process; those of processes that were killed, whose locks
    the system has released, with the next sweep or the next object that makes one."""

    def __init__(self):
        self.key: str | None = None
        self.directory: Path | None = None
        self.held = contextlib.ExitStack()
        weakref.finalize(self, self.held.close)

    def of(self, cfg: Config, context: ForkServerContext) -> Path | None:
        """The directory of the packed base of `cfg`, in bitsandbytes' format. It is packed now if it differs from the
        last one. None: nothing can be shared.

        Args:
            context: makes the process that packs.
        """
        if cfg.quant.name == "none" or quantized_start(cfg.init):  # which packs for its adapters
            return None
        seed = cfg.seed if cfg.model.source == "tiny" or cfg.model.weights else None
        parts = [asdict(cfg.model), asdict(cfg.quant), cfg.trainer.dtype, cfg.trainer.device, seed]
        key = json.dumps(parts, sort_keys=True)
        if key != self.key:
            self.held.close()
            self.key, self.directory = key, self.held.enter_context(_temporary_directory())
            process = context.Process(target=_pack, args=(cfg, self.directory), daemon=True)
            process.start()
            process.join()
        packed = self.directory / "packed"
        return packed if packed.exists() else None


def delete_left() -> None:
    """Delete the directories that processes which were killed have left."""
    for left in cache_dir().glob(f"{PREFIX}*"):
        lock = cache_dir() / LOCKS / left.name
        if is_free(lock):
            shutil.rmtree(left, ignore_errors=True)
            lock.unlink(missing_ok=True)


@contextlib.contextmanager
def _temporary_directory() -> Iterator[Path]:
    """A directory in the cache until the block ends."""
    delete_left()
    name = f"{PREFIX}{secrets.token_hex(4)}"
    with claim(cache_dir() / LOCKS / name):
        directory = cache_dir() / name
        directory.mkdir()
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def _pack(cfg: Config, directory: Path) -> None:
    """Write `packed` into `directory`. Write nothing where the base is packed already, is wrong, or cannot be read
    back: the job itself will say so, or pack for itself."""
    signals.end_with_parent(signal.SIGKILL)
    with contextlib.suppress(UserError, OSError, ValueError):
        if (
            cfg.model.source == "hf"
            and cfg.model.weights is None
            and cfg.model.path is not None
            and is_packed(model_directory(cfg.model, weights=False))
        ):
            return
        _, dtype = machine.set_up(cfg.trainer)
        model, tokenizer = load_base(cfg, dtype)
        with quiet():
            save_packed(model, directory / "partial")
            load_bnb4(directory / "partial")  # or all jobs would fail
            tokenizer.save_pretrained(directory / "partial")
        (directory / "partial").rename(directory / "packed")
