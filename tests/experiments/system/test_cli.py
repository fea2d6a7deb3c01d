"""How commands end."""

import signal

import pytest
import torch
from omegaconf.errors import ConfigAttributeError

from experiments.system import memory
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


OURS = "error: out of memory{}: free some, or take less with a smaller trainer.batch_size or data.max_length, or "
GPU = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.1 GiB"


@pytest.mark.parametrize(
    ("fails", "more"),
    [
        (lambda: torch.empty(2**58), ", 1152921504606846976 bytes more were asked for"),
        (lambda: (_ for _ in ()).throw(torch.OutOfMemoryError(GPU)), ", 2.50 GiB more were asked for"),
        (lambda: bytearray(2**60), ""),
    ],
    ids=["cpu", "gpu", "python"],
)
def test_out_of_memory_is_one_line(fails, more):
    with pytest.raises(SystemExit) as end:
        command(lambda: [*fails()])()
    assert end.value.code.startswith(OURS.format(more)) and "\n" not in end.value.code


def test_another_error_of_torch_is_none_of_memory():
    with pytest.raises(RuntimeError, match="size of tensor"):
        command(lambda: torch.zeros(2) + torch.zeros(3))()


def test_a_library_that_cannot_begin_lacks_memory_if_little_is_left(monkeypatch):
    def fails() -> None:
        raise RuntimeError("could not create a primitive")  # oneDNN

    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**6)
    with pytest.raises(SystemExit) as end:
        command(fails)()
    assert end.value.code.startswith(OURS.format(""))
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**10)
    with pytest.raises(RuntimeError, match="could not create a primitive"):
        command(fails)()
