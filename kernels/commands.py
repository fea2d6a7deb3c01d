"""How `python -m kernels.bench` and the other commands of this folder begin and end.

Importing this package loads torch, which takes seconds. `--help`, a typo, a Python without torch and Ctrl-C are
answered before that (`before_imports`, called in kernels/__init__.py).
"""

import importlib
import importlib.util
import os
import signal
import sys
from collections.abc import Callable

COMMANDS = {  # and the file of each one's options
    "kernels.aot": "kernels.aot.arguments",
    "kernels.bench": "kernels.bench.arguments",
    "kernels.bench.card": "kernels.bench.card_arguments",
}


def before_imports() -> None:
    """While a command begins: end with an answer, or let Ctrl-C end it in one line until `run` does so."""
    asked = [name for name in sys.orig_argv if name in COMMANDS]
    if sys.argv[0] != "-m" or not asked:  # "-m" until the module is found
        return
    if importlib.util.find_spec("torch") is None:
        sys.exit(
            f"error: {sys.executable} has no torch: `source .venv/bin/activate` first; `make setup` makes .venv if it "
            "is not there"
        )
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # under nohup it is ignored
        signal.signal(signal.SIGINT, _interrupted)
    importlib.import_module(COMMANDS[asked[0]]).parse(sys.argv[1:])


def _interrupted(*_) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)  # an exception would pass through imports, of which some take it for another


def run(main: Callable[[list[str]], int]) -> None:
    """End the process with the exit code of `main`, or in one line after Ctrl-C."""
    if signal.getsignal(signal.SIGINT) is _interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
