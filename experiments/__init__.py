"""Experiments on the modules. At this level are the commands, config.py and errors.py; libraries are in folders.

Each may import from those to its left, and commands do not import commands (tests/test_imports.py):
errors, config, system, data, training, blocks, models, runs, commands.
"""

# ruff: noqa: E402  Ctrl-C ends a command in one line from here on, and the imports below take time
import os
import signal
import sys


def _interrupted(*_) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)  # an exception would pass through imports, of which some take it for another


# argv is so while Python looks for the module of `python -m experiments.…`; under nohup the signal is ignored
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _interrupted)  # until the command has its own handler

import importlib.metadata
import importlib.util

# torch reads it at its first allocation: large CPU tensors in huge pages, 512 times fewer page faults
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# and this one when it is loaded: torch's DDP warns of settings that are on purpose (engines.py)
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _refuse_another_python() -> None:
    if importlib.util.find_spec("torch") is None:
        sys.exit(
            f"error: {sys.executable} has no torch: `source .venv/bin/activate` first; `make setup` makes .venv if it "
            "is not there"
        )


def _refuse_a_clash_of_names() -> None:
    """Hugging Face's PyPI package `kernels` has the name of this project's folder. transformers uses the package in
    some versions, finds the folder in its place and cannot be imported: say so instead of a traceback from inside."""
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return
    try:
        import transformers.integrations.hub_kernels  # noqa: F401
    except ImportError:
        sys.exit(
            f"error: the PyPI package `kernels` ({version}) is installed and transformers takes this project's folder "
            "kernels/ for it: run `pip uninstall kernels` (transformers works without it)"
        )


_refuse_another_python()
from experiments.system.arguments import before_imports  # which needs what the line above looks for

before_imports()
_refuse_a_clash_of_names()
