"""A limit of time for chat templates, which are programs of strangers: loops in loops can run for years."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from experiments.errors import UserError

SECONDS = 10  # of the processor's time for one conversation; a long one takes a hundredth of it


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Inside, a template may be rendered. Only a main thread can be interrupted; in others there is no limit.

    Raises:
        UserError: it took longer.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(number: int, frame: FrameType | None) -> None:
        raise UserError(
            f"the tokenizer's chat template takes more than {SECONDS} s for one conversation: use another one, "
            "data.chat_template=FILE"
        )

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
