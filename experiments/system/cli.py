"""What every command shares: how it reads its arguments, and how it ends."""

import os
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import TypeVar, get_origin

from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.errors import UserError
from experiments.system.parallel import last_words

Options = TypeVar("Options")


def read_options(schema: type[Options], help: str, changes: tuple[str, ...]) -> tuple[Options, list[str]]:
    """The command line's `key=value` arguments as an instance of the dataclass `schema`.

    They look like Hydra's overrides, but a value is taken as it is: a prompt may hold commas, quotes and braces.
    A key of type list[str] may be given several times. `--help` prints `help` and ends.

    Args:
        changes: beginnings of arguments that are changes to the run's configuration, such as "trainer.".

    Returns:
        The options, and the arguments that are such changes.

    Raises:
        UserError: an unknown or a missing key, or a value of the wrong type.
    """
    if {"-h", "--help"} & set(sys.argv):
        print(help.strip())
        sys.exit(0)
    changed = [argument for argument in sys.argv[1:] if argument.startswith(changes)]
    known = {f.name: f for f in fields(schema)}
    values = OmegaConf.structured(schema)
    given: set[str] = set()
    for argument in sys.argv[1:]:
        if argument in changed:
            continue
        key, equals, value = argument.partition("=")
        if not equals or key not in known:
            keys = [*(f"{name}=" for name in known), *(f"{beginning}…" for beginning in changes)]
            raise UserError(f"{argument}: not one of {', '.join(keys)}; --help explains them")
        if get_origin(known[key].type) is list:
            values[key] = [*values[key], value]
        elif key in given:
            raise UserError(f"{key}= is there twice")
        else:
            values[key] = value
        given.add(key)
    required = [name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in required if name not in given]:
        raise UserError(f"{missing[0]}= is missing; --help explains it")
    return OmegaConf.to_object(values), changed


def run_command(main: Callable[[], None]) -> None:
    """Call `main`; a mistake of the user's ends it with one line and exit code 1, Ctrl-C with 130."""
    sys.stdout.reconfigure(line_buffering=True)  # a log file shows each line when it is printed
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra passes exceptions on instead of printing them its own way
    try:
        main()
    except UserError as error:
        sys.exit(last_words(f"error: {error}"))
    except OverrideParseException as error:
        key, equals, value = error.override.partition("=")
        how = f"quote it twice, \"{key}='{value}'\"" if equals else "give it as key=value"
        sys.exit(last_words(f"error: {error.override} cannot be read: {how}"))
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(last_words(f"error: {_one_line(error)}"))
    except OSError as error:
        sys.exit(last_words(f"error: {error}"))
    except KeyboardInterrupt:
        if isinstance(last_words("interrupted"), str):
            print("interrupted", file=sys.stderr)
        sys.exit(130)


def _one_line(error: Exception) -> str:
    """What a configuration error says, without Hydra's indented details and its advice to add unknown keys."""
    lines = f"{error}\n{error.__cause__ or ''}".partition("Config search path")[0].splitlines()
    kept = [line.strip() for line in lines if line.strip() and not line.startswith((" ", "To append"))]
    return " ".join(dict.fromkeys(kept))
