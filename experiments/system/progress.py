"""A progress bar in a terminal; elsewhere a plain line now and then, and nothing for work of seconds."""

import functools
import operator
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType

from tqdm import tqdm

from experiments.system import parallel

PLAIN_LINES = 10  # of training, in a log file
PLAIN_SECONDS = 30  # between the lines of other work


def bar(title: str) -> Callable[[Iterable], Iterable]:
    """Wraps an iterable of known length in a bar that goes away when done; in a log file in a line now and then."""
    if _terminal():
        return functools.partial(tqdm, desc=title, leave=False, dynamic_ncols=True)
    return functools.partial(_plain, title)


def _plain(title: str, items: Iterable) -> Iterator:
    total, start = operator.length_hint(items), time.perf_counter()
    said = start
    for done, item in enumerate(items, start=1):
        yield item
        now = time.perf_counter()
        if now - said >= PLAIN_SECONDS and parallel.is_main():
            said = now
            left = (now - start) / done * (total - done)
            print(f"{title} {done}/{total}  {left:.0f} s left", file=sys.stderr, flush=True)


class Count:
    """Counts many small things up to `total`, if that is known. In a terminal a bar, in a log file a line now and then.

    Use as a context manager; `advance(n)` after n of them.
    """

    def __init__(self, title: str, unit: str, total: int | None = None):
        self.title, self.unit, self.total, self.done = title, unit, total, 0
        self.start = self.said = time.perf_counter()
        shown = {"desc": title, "unit": f" {unit}", "leave": False, "dynamic_ncols": True}
        self.bar = tqdm(total=total, **shown) if _terminal() else None

    def __enter__(self) -> "Count":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()

    def advance(self, n: int) -> None:
        self.done += n
        if self.bar is not None:
            self.bar.update(n)
            return
        now = time.perf_counter()
        if now - self.said >= PLAIN_SECONDS and parallel.is_main():
            self.said = now
            of = left = ""
            if self.total:
                of = f" of {self.total:,}"
                left = f"  {(now - self.start) / self.done * (self.total - self.done):.0f} s left"
            print(f"{self.title} {self.done:,}{of} {self.unit}{left}", file=sys.stderr, flush=True)


def _terminal() -> bool:
    return sys.stderr.isatty() and parallel.is_main()


class Progress:
    """Counts from `done` to `total`. In a terminal a bar with the time left; otherwise about ten lines.

    Use as a context manager, `advance(loss=…, tokens_per_s=…)` once a step.
    """

    def __init__(self, total: int, title: str, done: int = 0):
        self.total, self.title, self.done, self.done_before = total, title, done, done
        self.start = time.perf_counter()
        shown = {"desc": title, "leave": False, "dynamic_ncols": True}
        self.bar = tqdm(total=total, initial=done, **shown) if _terminal() else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()

    def advance(self, loss: float, tokens_per_s: float) -> None:
        self.done += 1
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_s:,.0f} tokens/s", refresh=False)
            self.bar.update()
            return
        every = max(1, self.total // PLAIN_LINES)
        if self.done % every == 0 or self.done == self.total:
            seconds_a_step = (time.perf_counter() - self.start) / (self.done - self.done_before)
            left = seconds_a_step * (self.total - self.done)
            speed = f"{tokens_per_s:,.0f} tokens/s"
            print(f"{self.title} {self.done}/{self.total}  loss {loss:.3f}  {speed}  {left:.0f} s left", flush=True)
