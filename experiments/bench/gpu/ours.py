"""This project's side of the comparison on a GPU: training as experiments.run does it, decoding as generate does."""

import contextlib
import statistics
import time
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from torch.nn import functional as F

from experiments.bench.gpu import trace
from experiments.bench.gpu.side import Side
from experiments.bench.worker import same_start
from experiments.config import Config, DataConfig, MethodConfig, ModelConfig, QuantConfig, TrainerConfig
from experiments.data.buckets import shape
from experiments.data.chat import Example
from experiments.models import decoding
from experiments.models.load import prepare_model
from experiments.models.random_model import random_model
from experiments.training.loop import Trainer
from modules import attach, decoder_linears

REPEATED = 10  # products and eager calls in one timing
ROUNDS = 5


class Ours(Side):
    trainer: Trainer | None = None

    def _build(self) -> None:
        job = self.job
        cfg = Config(
            model=ModelConfig(name="bench", source="preset", architecture=job.architecture, weights="random"),
            quant=QuantConfig(name="nf4" if job.quantized else "none"),
            method=MethodConfig(name=job.method, adapter=job.adapter, lr=job.lr),
            data=DataConfig(name="bench", source="bench", max_length=job.length),
            trainer=TrainerConfig(
                name="bench",
                steps=10**6,
                batch_size=job.batch,
                gradient_checkpointing=job.checkpointing,
                warmup=0.0,
                schedule="constant",
                max_grad_norm=job.max_norm,
                dtype=job.dtype,
            ),
            rank=job.rank,
            lora_alpha=2.0 * job.rank,
            lr=job.lr,
            seed=job.seed,
        )
        dtype = getattr(torch, job.dtype)
        torch.manual_seed(job.seed)
        with contextlib.redirect_stdout(None):  # it says what the driver has said
            self.model, tokenizer = prepare_model(cfg, torch.device(job.device), dtype)
        same_start(self.model, job.seed)
        self.trainer = Trainer(self.model.train(), cfg, dtype, tokenizer.pad_token_id)

    def _step(self, batch: list[list[int]]) -> list[float]:
        group = [[Example(ids, ids) for ids in batch]]
        if self.trainer.static is not None:
            self.trainer.static.buckets = [shape(group[0])]
        return [record["loss"] for record in self.trainer.step(group)]

    def _late(self) -> list[float]:
        return [record["loss"] for record in self.trainer.settle()]

    def _trace(self) -> ModuleType:
        return trace

    def _forget(self) -> None:
        self.trainer = None

    def _decode(self, prompts: list[list[int]], new: int) -> tuple[float, float, list[int]]:
        if not decoding.bytes_per_column(self.model):
            raise ValueError("this model cannot be decoded with a static cache")
        length = decoding.rounded_up(len(prompts[0]) + new)
        rows = decoding.Rows(self.model, len(prompts), length, decoding.chooser(0, 1, 0), decoding.Ends((), 0))
        rows.read(prompts)
        list(decoding.written(rows, 3))  # captures the graph that `rows` keeps
        self._wait()
        start = time.perf_counter()
        rows.read(prompts)
        self._wait()
        read = time.perf_counter()
        texts = list(decoding.written(rows, new))
        self._wait()
        return read - start, (time.perf_counter() - read) / (new - 1), texts[0]

    def products(self, tokens: int) -> float:
        """Seconds of the step's products with frozen weights alone: the floor of any implementation."""
        head = self.model.get_output_embeddings()
        linears = [*decoder_linears(self.model).values(), head]
        sizes = [(linear.in_features, linear.out_features) for linear in linears]
        dtype, device, seconds = getattr(torch, self.job.dtype), self.job.device, 0.0
        for n_in, n_out in set(sizes):
            x, w = torch.randn(tokens, n_in, device=device).to(dtype), torch.randn(n_out, n_in, device=device).to(dtype)
            dy = torch.randn(tokens, n_out, device=device).to(dtype)
            for product in (lambda x=x, w=w: x @ w.t(), lambda dy=dy, w=w: dy @ w):
                seconds += sizes.count((n_in, n_out)) * self._repeated(product)
        return seconds

    def _repeated(self, call) -> float:
        """Seconds of a call, with the device done after each REPEATED: the median of rounds after a first one."""
        samples = []
        for _ in range(ROUNDS + 1):
            self._wait()
            start = time.perf_counter()
            for _ in range(REPEATED):
                call()
            self._wait()
            samples.append((time.perf_counter() - start) / REPEATED)
        return statistics.median(samples[1:])

    def eager_linear(self, device: str, size: int, rank: int) -> tuple[list[float], list[float]]:
        """Seconds of a forward and backward pass of a linear with LoRA: (this project's, plain torch's), in turn. It is
        so small that the host's time is all of it."""
        self.on_gpu = device == "cuda"
        dtype = torch.bfloat16 if self.on_gpu else torch.float32
        model = nn.Sequential(nn.Linear(size, size, bias=False, dtype=dtype)).to(device)
        weight = model[0].weight.detach()
        attach(model, "lora", rank=rank, target_modules="all-linear")
        a = torch.randn(rank, size, device=device, requires_grad=True)
        b = torch.zeros(size, rank, device=device, requires_grad=True)
        x = torch.randn(16, size, device=device, dtype=dtype, requires_grad=True)

        def plain() -> None:
            y = F.linear(x, weight) + 2 * F.linear(F.linear(x, a.to(dtype)), b.to(dtype))
            y.sum().backward()

        def ours() -> None:
            model(x).sum().backward()

        samples: tuple[list[float], list[float]] = ([], [])
        for _ in range(2 * ROUNDS):
            for call, sample in zip((ours, plain), samples):
                sample.append(self._repeated(call))
        return samples

    def save(self, job: dict, directory: str) -> None:
        """Write the model of a job, dense, for unsloth, which reads from disk alone."""
        cfg = ModelConfig(name="bench", source="preset", architecture=job["architecture"], weights="random")
        device = torch.device(job["device"])
        with contextlib.redirect_stdout(None):
            model, tokenizer = random_model(cfg, getattr(torch, job["dtype"]), job["seed"], device)
        model.save_pretrained(Path(directory))
        tokenizer.save_pretrained(Path(directory))
