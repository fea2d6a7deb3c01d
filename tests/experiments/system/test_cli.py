"""How commands end."""

import signal

import pytest
from omegaconf.errors import ConfigAttributeError

from experiments.system.cli import command
from experiments.system.signals import Interrupted


def test_a_signal_that_leaves_a_configuration_half_made_is_no_mistake_of_the_user(capsys):
    """OmegaConf's own code fails on it, and that error came out in place of the signal."""

    def compose() -> None:
        try:
            try:
                raise Interrupted(signal.SIGTERM)
            finally:
                None._invalidate_flags_cache()
        except AttributeError as error:
            raise ConfigAttributeError(str(error)) from error

    with pytest.raises(SystemExit) as end:
        command(compose)()
    assert end.value.code == 128 + signal.SIGTERM and capsys.readouterr().err == "interrupted\n"


def test_a_mistake_in_a_configuration_is_one_line():
    def compose() -> None:
        raise ConfigAttributeError("no such key")

    with pytest.raises(SystemExit) as end:
        command(compose)()
    assert end.value.code == "error: no such key"
