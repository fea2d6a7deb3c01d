"""Bytes in pages of which a few at a time are on the device; the others are in host memory or in a file.

A page has a home, in pinned host memory while that lasts and else in a memory-mapped file, and is resident while it
also has a frame on the device. There are never more frames than the budget holds. On a CPU, whose memory is the
host's, homes are in the file.

A sweep visits pages in order. While the caller works on one page the next is brought in by a thread, on a CUDA stream
of its own, in place of the page that is needed again last: the one before. No choice of pages to evict makes fewer
transfers (Belady 1966): with f frames, f - 2 pages or more stay from sweep to sweep. With one frame nothing overlaps.

The idea is QLoRA's paged optimizer (Dettmers et al. 2023, §3), which uses CUDA's unified memory: there the driver moves
pages when they are touched, one fault after the other. Here nothing is over-subscribed and every transfer is asked for.
"""

import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

PAGE_BYTES = 4 * 2**20  # long enough for a transfer at full speed


@dataclass(frozen=True)
class Paging:
    """Where state may be.

    Attributes:
        budget_bytes: on the device, at most; of two pages or more for transfers to overlap with work.
        directory: where the file is made that holds what host memory does not. It has no name there and vanishes
            with the process.
        host_bytes: pinned host memory, at most; None for as much as it takes. Of no effect on a CPU.
        page_bytes: a multiple of 4096.
    """

    budget_bytes: int
    directory: str | Path
    host_bytes: int | None = None
    page_bytes: int = PAGE_BYTES


class PageStore:
    """Pages of bytes, zero at first.

    Args:
        sizes: bytes of each page, at most `paging.page_bytes`.
        device: where pages are worked on.

    Attributes:
        peak_resident_bytes: the most that was on the device at a time.
        loads: pages brought to the device.

    Raises:
        ValueError: a budget smaller than a page, a page size that is no multiple of 4096.
        OSError: no room for the file.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device, paging: Paging):
        if paging.budget_bytes < paging.page_bytes:
            raise ValueError(f"a budget of {paging.budget_bytes:,} bytes is smaller than a page, {paging.page_bytes:,}")
        if paging.page_bytes % mmap.PAGESIZE:
            raise ValueError(f"page_bytes={paging.page_bytes}: must be a multiple of {mmap.PAGESIZE}")
        self.device, self.page_bytes = device, paging.page_bytes
        self.max_frames = paging.budget_bytes // paging.page_bytes
        self.peak_resident_bytes, self.loads = 0, 0
        self._frames: dict[int, Tensor] = {}  # of resident pages
        self._moving: dict[int, Future] = {}  # pages on their way to the device
        self._cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._cuda else None
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="paging")
        in_host = len(sizes) if paging.host_bytes is None else paging.host_bytes // paging.page_bytes
        self._in_host = min(in_host, len(sizes)) if self._cuda else 0
        self._homes = self._host_homes(sizes[: self._in_host]) + self._file_homes(sizes[self._in_host :], paging)

    def _host_homes(self, sizes: Sequence[int]) -> list[Tensor]:
        return [torch.zeros(size, dtype=torch.uint8, pin_memory=True) for size in sizes]

    def _file_homes(self, sizes: Sequence[int], paging: Paging) -> list[Tensor]:
        if not sizes:
            return []
        n_bytes = len(sizes) * self.page_bytes
        with tempfile.TemporaryFile(dir=paging.directory, prefix=".optimizer-pages-") as file:
            os.posix_fallocate(file.fileno(), 0, n_bytes)  # a full disk is an error here, not a crash later
            self._map = mmap.mmap(file.fileno(), n_bytes)
        if self._cuda:
            self._staging = torch.empty(self.page_bytes, dtype=torch.uint8, pin_memory=True)
        every = torch.frombuffer(self._map, dtype=torch.uint8)
        return [every[i * self.page_bytes :][:size] for i, size in enumerate(sizes)]

    @property
    def resident_bytes(self) -> int:
        """Device memory that frames occupy, those on their way in or out included."""
        return len(self._frames) * self.page_bytes

    def sweep(self, pages: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Visit `pages`, ascending: (page, its bytes on the device), the caller's until it asks for the next."""
        for i, page in enumerate(pages):
            if page not in self._frames:
                self._bring(page, (page,))
            self._arrived(page)
            ahead = pages[i + 1] if i + 1 < len(pages) else page
            if ahead not in self._frames and self.max_frames > 1:
                self._bring(ahead, (page, ahead))
            yield page, self._frames[page][: self._homes[page].numel()]

    def _bring(self, page: int, keep: tuple[int, ...]) -> None:
        """Start to load `page`, in the place of another one if there is no room."""
        leaving = None
        if len(self._frames) == self.max_frames:
            # pages come in a cycle: the one just behind is the last to come again
            leaving = max((p for p in self._frames if p not in keep), key=lambda p: (p - keep[0]) % len(self._homes))
            self._frames[page] = self._frames.pop(leaving)
        else:
            self._frames[page] = torch.empty(self.page_bytes, dtype=torch.uint8, device=self.device)
        self.peak_resident_bytes = max(self.peak_resident_bytes, self.resident_bytes)
        self.loads += 1
        frame, now = self._frames[page], self._now()
        self._moving[page] = self._worker.submit(self._exchange, leaving, page, frame, now)

    def _arrived(self, page: int) -> None:
        """Wait until `page` is on the device."""
        if page in self._moving:
            self._moving.pop(page).result()

    def _now(self) -> torch.cuda.Event | None:
        """The end of what the caller has asked the device to do so far."""
        return torch.cuda.current_stream(self.device).record_event() if self._cuda else None

    # ------------------------------------------------------------------------------------ in the worker's thread

    def _exchange(self, leaving: int | None, page: int, frame: Tensor, after: torch.cuda.Event | None) -> None:
        if leaving is not None:
            self._save(leaving, frame, after)
        self._copy(frame[: self._homes[page].numel()], self._homes[page], page, after)

    def _save(self, page: int, frame: Tensor, after: torch.cuda.Event | None) -> None:
        self._copy(self._homes[page], frame[: self._homes[page].numel()], page, after)

    def _copy(self, target: Tensor, source: Tensor, page: int, after: torch.cuda.Event | None) -> None:
        """Between the frame and the home of `page`; done when this returns."""
        in_file = page >= self._in_host
        if not self._cuda:
            target.copy_(source)
        else:
            with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
                self._stream.wait_event(after)
                if in_file:  # through pinned memory, or the copy would stop the device
                    staging = self._staging[: source.numel()]
                    staging.copy_(source, non_blocking=source.is_cuda)
                    self._stream.synchronize()
                    source = staging
                target.copy_(source, non_blocking=True)
                self._stream.synchronize()
        if in_file:  # let the system have the memory of that part of the file back; what it holds stays
            start = (page - self._in_host) * self.page_bytes
            self._map.madvise(mmap.MADV_DONTNEED, start, self.page_bytes)

    # ------------------------------------------------------------------------------------ between sweeps

    def flush(self) -> None:
        """Bring every home up to date; resident pages stay resident."""
        for page in list(self._frames):
            self._arrived(page)
        for save in [self._worker.submit(self._save, *item, self._now()) for item in self._frames.items()]:
            save.result()

    def evict(self) -> int:
        """Give the device's memory back, all of it; the bytes freed. The next sweep brings pages in again."""
        self.flush()
        freed = self.resident_bytes
        self._frames.clear()
        return freed

    def home(self, page: int) -> Tensor:
        """The bytes of `page` in host memory, uint8: what they are after `flush`, to be written after `evict`."""
        return self._homes[page]
