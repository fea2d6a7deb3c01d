"""How a command reads its arguments, and how it ends.

A command with a file in conf/ is a `hydra_command`. The others are a `command`; most of them read `read_options`.
"""

import functools
import os
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar, get_origin

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.errors import UserError
from experiments.system import arguments, parallel, signals, unraised
from experiments.system.files import PROJECT_ROOT
from experiments.system.parallel import last_words

CONF = str(PROJECT_ROOT / "conf")
Options = TypeVar("Options")


def composed(*overrides: str, config_name: str = "config") -> DictConfig:
    """The configuration that a Hydra command gets from the arguments `overrides`."""
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        return hydra.compose(config_name, overrides=list(overrides))


def is_given(key: str) -> bool:
    """Whether the command line of a `hydra_command` sets the key."""
    return any(override.startswith(f"{key}=") for override in HydraConfig.get().overrides.task)


def hydra_command(config_name: str, schema: type) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Decorator: a function of a configuration becomes a command with Hydra's grammar, over conf/<config_name>.yaml.

    `--help` prints the docstring of the function's module and the keys of the dataclass `schema`.
    """

    def decorate(main: Callable[[DictConfig], Any]) -> Callable[[], None]:
        @functools.wraps(main)
        def guarded(cfg: DictConfig) -> Any:
            try:
                return main(cfg)
            except (UserError, OSError) as error:  # here, not in `command`: Hydra would print a second message
                sys.exit(last_words(f"error: {error}"))
            except (MemoryError, RuntimeError, SystemError) as error:  # likewise
                if told := _out_of_memory(error):
                    sys.exit(last_words(f"error: {told}"))
                if not parallel.lost_another(error):
                    raise
                sys.exit(parallel.outlived())

        start = hydra.main(version_base="1.3", config_path=CONF, config_name=config_name)(guarded)

        return command(takes_keys(config_name, schema)(start))

    return decorate


def takes_keys(config_name: str, schema: type, more: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
    """Decorator: answer `--help` and a wrong key before the function is called (arguments.py, which reads these
    arguments from the source).

    Args:
        config_name: conf/<config_name>.yaml has the keys of `schema`.
        more: keys beside them.
    """

    def decorate(main: Callable[[], Any]) -> Callable[[], Any]:
        @functools.wraps(main)
        def answered() -> Any:
            arguments.answer(Path(sys.modules[main.__module__].__file__), sys.argv[1:])
            return main()

        return answered

    return decorate


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Decorator: end `main` with one line and exit code 1 after a user's mistake, with 128 + its number after a signal.

    A KeyboardInterrupt may carry lines of its own, which are printed last.
    """

    @functools.wraps(main)
    def run() -> None:
        sys.stdout.reconfigure(line_buffering=True)  # a log file shows each line when it is printed
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra passes exceptions on instead of printing them its own way
        unraised.watch()
        try:
            with signals.handled(signals.interrupt):
                main()
        except UserError as error:
            sys.exit(last_words(f"error: {error}"))
        except OverrideParseException as error:
            key, equals, value = error.override.partition("=")
            how = f"quote it twice, \"{key}='{value}'\"" if equals else "give it as key=value"
            sys.exit(last_words(f"error: {error.override} cannot be read: {how}"))
        except (HydraException, OmegaConfBaseException) as error:
            if (stop := _interruption_before(error)) is not None:
                _end(stop)
            sys.exit(last_words(f"error: {_one_line(error)}"))
        except OSError as error:
            sys.exit(last_words(f"error: {error}"))
        except (MemoryError, RuntimeError, SystemError) as error:
            if not (told := _out_of_memory(error)):
                raise
            sys.exit(last_words(f"error: {told}"))
        except KeyboardInterrupt as stop:
            _end(stop)

    return run


def _out_of_memory(error: Exception) -> str | None:
    from experiments.system.memory import out_of_memory  # here, for `--help` goes without torch

    return out_of_memory(error)


def _end(stop: KeyboardInterrupt) -> None:
    first = isinstance(last_words("interrupted"), str)
    if parallel.is_main() if getattr(stop, "everywhere", False) else first:
        print("\n".join(["interrupted", *map(str, stop.args)]), file=sys.stderr)
    sys.exit(getattr(stop, "exit_code", 130))


def _interruption_before(error: BaseException) -> KeyboardInterrupt | None:
    """The signal that left a configuration half made, so that OmegaConf's own code failed on it."""
    before = error.__context__
    while before is not None and not isinstance(before, KeyboardInterrupt):
        before = before.__context__
    return before


def read_options(schema: type[Options], file: str, changes: tuple[str, ...]) -> tuple[Options, list[str]]:
    """The command line's `key=value` arguments as an instance of the dataclass `schema`.

    They look like Hydra's overrides, but a value is taken as it is: a prompt may hold commas, quotes and braces.
    A key of type list[str] may be given several times. `--help` prints the command's docstring and ends.

    Args:
        file: the command's source.
        changes: beginnings of arguments that are changes to the run's configuration, such as "trainer.".

    Returns:
        The options, and the arguments that are such changes.

    Raises:
        UserError: an unknown or a missing key, or a value of the wrong type.
    """
    arguments.answer(Path(file), sys.argv[1:])
    changed = [argument for argument in sys.argv[1:] if argument.startswith(changes)]
    known = {f.name: f for f in fields(schema)}
    values = OmegaConf.structured(schema)
    given: set[str] = set()
    for argument in sys.argv[1:]:
        if argument in changed:
            continue
        key, equals, value = argument.partition("=")
        if not equals:
            raise UserError(f"{argument}: give it as key=value; --help lists the keys")
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


def _one_line(error: Exception) -> str:
    """The message of a configuration error, without Hydra's indented details and its advice to add unknown keys."""
    lines = f"{error}\n{error.__cause__ or ''}".partition("Config search path")[0].splitlines()
    kept = [line.strip() for line in lines if line.strip() and not line.startswith((" ", "To append"))]
    return " ".join(dict.fromkeys(kept))
