"""Bytes in pages. A few pages at a time are on the device; the others are in host memory or in a file.

Each page has a home: in pinned host memory as long as there is room, else in a memory-mapped file. A page is resident
while it also has a frame on the device. The budget limits the number of frames. On a CPU the device's memory is the
host's, so all homes are in the file.

A sweep visits pages in order. While the caller works on one page, a thread loads the next, on a CUDA stream of its own.
It evicts the page whose next use is furthest away, which is the page before the current one. No other choice makes
fewer transfers (Belady 1966): with f frames, at least f - 2 pages stay from sweep to sweep. With one frame, transfers
and work do not overlap.

The idea is QLoRA's paged optimizer (Dettmers et al. 2023, §3), which uses CUDA's unified memory. There the driver moves
pages when they are touched, one page fault after the other. Here every transfer is explicit and planned.
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
    """The memory that paged state may use.

    Attributes:
        budget_bytes: at most so much on the device. From two pages on, transfers overlap with work.
        directory: for the file that holds the pages without a place in host memory. The file has no name and
            disappears with the process.
        host_bytes: at most so much pinned host memory; None: no limit. It has no effect on a CPU.
        page_bytes: a multiple of 4096.
    """

    budget_bytes: int
    directory: str | Path
    host_bytes: int | None = None
    page_bytes: int = PAGE_BYTES


class PageStore:
    """Pages of bytes, which are zero at first.

    Args:
        sizes: the bytes of each page, at most `paging.page_bytes`.
        device: the device on which pages are used.

    Attributes:
        peak_resident_bytes: the largest number of bytes that were on the device at one time.
        loads: how many pages were loaded to the device.

    Raises:
        ValueError: the budget is smaller than a page, or the page size is not a multiple of 4096.
        OSError: the disk has no room for the file.
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
            os.posix_fallocate(file.fileno(), 0, n_bytes)  # so that a full disk is an error now, not a crash later
            self._map = mmap.mmap(file.fileno(), n_bytes)
        if self._cuda:
            self._staging = torch.empty(self.page_bytes, dtype=torch.uint8, pin_memory=True)
        every = torch.frombuffer(self._map, dtype=torch.uint8)
        return [every[i * self.page_bytes :][:size] for i, size in enumerate(sizes)]

    @property
    def resident_bytes(self) -> int:
        """The device memory of all frames, with those that are being loaded or saved."""
        return len(self._frames) * self.page_bytes

    def sweep(self, pages: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Visit `pages`, in ascending order: (page, its bytes on the device, uint8).

        The caller may read and write the bytes until it asks for the next page.
        """
        for i, page in enumerate(pages):
            if page not in self._frames:
                self._bring(page, (page,))
            self._arrived(page)
            ahead = pages[i + 1] if i + 1 < len(pages) else page
            if ahead not in self._frames and self.max_frames > 1:
                self._bring(ahead, (page, ahead))
            yield page, self._frames[page][: self._homes[page].numel()]

    def _bring(self, page: int, keep: tuple[int, ...]) -> None:
        """Start to load `page`. If there is no room, evict a page that is not in `keep`."""
        leaving = None
        if len(self._frames) == self.max_frames:
            # pages are visited in a cycle: the one just before the current page has the longest time to its next visit
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
        """An event behind all work that the caller has given to the device so far; None on a CPU."""
        return torch.cuda.current_stream(self.device).record_event() if self._cuda else None

    # ------------------------------------------------------------------------------------ in the worker's thread

    def _exchange(self, leaving: int | None, page: int, frame: Tensor, after: torch.cuda.Event | None) -> None:
        if leaving is not None:
            self._save(leaving, frame, after)
        self._copy(frame[: self._homes[page].numel()], self._homes[page], page, after)

    def _save(self, page: int, frame: Tensor, after: torch.cuda.Event | None) -> None:
        self._copy(self._homes[page], frame[: self._homes[page].numel()], page, after)

    def _copy(self, target: Tensor, source: Tensor, page: int, after: torch.cuda.Event | None) -> None:
        """Copy between the frame and the home of `page`, and wait until the copy is complete."""
        in_file = page >= self._in_host
        if not self._cuda:
            target.copy_(source)
        else:
            with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
                self._stream.wait_event(after)
                if in_file:  # through pinned memory; otherwise the copy would stall the device
                    staging = self._staging[: source.numel()]
                    staging.copy_(source, non_blocking=source.is_cuda)
                    self._stream.synchronize()
                    source = staging
                target.copy_(source, non_blocking=True)
                self._stream.synchronize()
        if in_file:  # give the memory of this part of the file back to the system; the file keeps the bytes
            start = (page - self._in_host) * self.page_bytes
            self._map.madvise(mmap.MADV_DONTNEED, start, self.page_bytes)

    # ------------------------------------------------------------------------------------ between sweeps

    def flush(self) -> None:
        """Copy every resident page to its home. Resident pages stay resident."""
        for page in list(self._frames):
            self._arrived(page)
        for save in [self._worker.submit(self._save, *item, self._now()) for item in self._frames.items()]:
            save.result()

    def evict(self) -> int:
        """Free all frames, and return how many bytes that freed. The next sweep loads pages again."""
        self.flush()
        freed = self.resident_bytes
        self._frames.clear()
        return freed

    def home(self, page: int) -> Tensor:
        """The bytes of `page` in its home, uint8. They are current after `flush`, and may be written after `evict`."""
        return self._homes[page]
