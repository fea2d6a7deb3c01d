"""The requests that a side of the comparison on a GPU answers, and the job that it is given.

This file imports nothing of the project: it runs in the processes of others too.
"""

import contextlib
import gc
import importlib.metadata
import time
from dataclasses import dataclass

PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "liger_kernel", "unsloth")


@dataclass(frozen=True)
class Job:
    """A model to build, and how to train it; dtype is a name of torch's.

    Attributes:
        architecture: the content of config.json.
        directory: where unsloth finds the model.
    """

    method: str  # lora | qlora | dora | qdora
    rank: int
    architecture: dict
    batch: int
    length: int
    checkpointing: bool
    dtype: str
    device: str
    directory: str | None = None
    lr: float = 1e-3
    seed: int = 0
    max_norm: float = 1.0

    @property
    def quantized(self) -> bool:
        return self.method.startswith("q")

    @property
    def adapter(self) -> str:
        return self.method.removeprefix("q")


class Side:
    """The requests that the driver makes. `model` is what `build` has made."""

    def __init__(self):
        import torch

        self.torch, self.on_gpu = torch, False
        self.model = self.job = self.optimizer = None

    def versions(self) -> dict[str, str]:
        found = {}
        for name in PACKAGES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[name] = importlib.metadata.version(name)
        return found

    def build(self, job: dict) -> bool:
        self.job = Job(**job)
        self.on_gpu = self.job.device == "cuda"
        self._build()
        if self.on_gpu:
            self.torch.cuda.synchronize()
            self.torch.cuda.reset_peak_memory_stats()
        return True

    def steps(self, batch: list[list[int]], count: int) -> tuple[list[float], list[float]]:
        """(losses, seconds) of `count` optimizer steps on `batch`. The GPU is done when a step's time ends."""
        losses, seconds = [], []
        for _ in range(count):
            start = time.perf_counter()
            losses += self._step(batch)
            self._wait()
            seconds.append(time.perf_counter() - start)
        return losses + self._late(), seconds

    def busy(self, batch: list[list[int]]) -> dict | None:
        """trace.Busy of one step; None without a GPU."""
        if not self.on_gpu:
            return None
        return self._trace().of_step(lambda: self._step(batch))

    def peak(self) -> int:
        """Most bytes allocated since the model was there; 0 without a GPU."""
        return self.torch.cuda.max_memory_allocated() if self.on_gpu else 0

    def decode(self, prompts: list[list[int]], new: int) -> tuple[float, float, list[int]]:
        """(seconds to read the prompts, seconds of a token for all rows, the first token of each row). Not the first
        time: then kernels are compiled, and a graph is captured."""
        self.model.eval()
        with self.torch.inference_mode():
            found = self._decode(prompts, new)
        self.model.train()
        return found

    def free(self) -> None:
        self.model = self.job = self.optimizer = None
        self._forget()
        gc.collect()
        if self.torch.cuda.is_available():
            self.torch.cuda.empty_cache()

    def _wait(self) -> None:
        if self.on_gpu:
            self.torch.cuda.synchronize()

    def _late(self) -> list[float]:
        """Losses that `_step` has not told yet."""
        return []

    def _forget(self) -> None:
        """Drop all that holds the model."""
