"""How every command ends: well, or with one line on stderr that says what to do."""

import os
import sys
from collections.abc import Callable

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from experiments.errors import UserError


def run_command(main: Callable[[], None]) -> None:
    """Call `main`; a mistake of the user's ends it with one line and exit code 1, Ctrl-C with 130."""
    sys.stdout.reconfigure(line_buffering=True)  # a log file shows each line when it is printed
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra passes exceptions on instead of printing them its own way
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {_one_line(error)}")
    except OSError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _one_line(error: Exception) -> str:
    """What a configuration error says, without Hydra's indented details and its advice to add unknown keys."""
    lines = f"{error}\n{error.__cause__ or ''}".partition("Config search path")[0].splitlines()
    kept = [line.strip() for line in lines if line.strip() and not line.startswith((" ", "To append"))]
    return " ".join(dict.fromkeys(kept))
