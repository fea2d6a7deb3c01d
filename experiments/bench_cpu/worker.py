"""One side of the comparison in a process of its own: it builds a model, then answers requests over a pipe.

`ours` is what `python -m experiments.run` trains. `peft` is PEFT's LoRA or DoRA on a transformers model, for QLoRA and
QDoRA over bitsandbytes' NF4 with double quantization, as their documentation sets them up. Both read the base from the
same file; each lora_A is drawn from a seed made of its layer's name, each lora_B is zero.
"""

import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from experiments import lean, machine
from experiments.config import TrainerConfig
from experiments.loss import LabelLoss
from experiments.models import quiet, release_file
from modules import attach, decoder_linears, quantize


@dataclass(frozen=True)
class Job:
    """What a worker builds from the Hugging Face directory `model_dir`; dtype is "float32" or "bfloat16"."""

    side: str  # ours | peft
    method: str  # lora | qlora | dora | qdora
    rank: int
    model_dir: str
    dtype: str
    threads: int
    lr: float = 1e-3

    @property
    def quantized(self) -> bool:
        return self.method.startswith("q")

    @property
    def adapter(self) -> str:
        return self.method.removeprefix("q")


def serve(job: Job, pipe: Connection) -> None:
    """Answer requests, each the name of a method of `Worker` and its arguments, until None comes."""
    try:
        worker = Worker(job)
        pipe.send(None)
        while (request := pipe.recv()) is not None:
            name, *arguments = request
            pipe.send(getattr(worker, name)(*arguments))
    except Exception as error:  # the driver raises it
        pipe.send(error)


class Worker:
    def __init__(self, job: Job):
        torch.set_num_threads(job.threads)
        dtype = getattr(torch, job.dtype)
        with quiet():
            self.model, self.loss = (_ours if job.side == "ours" else _peft)(job, dtype)
        _same_start(self.model)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=job.lr, weight_decay=0.0, fused=True)
        self.model.train()

    def step(self, input_ids: Tensor) -> tuple[float, float]:
        """(loss, seconds) of an optimizer step."""
        start = time.perf_counter()
        loss = self.loss(input_ids)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item(), time.perf_counter() - start

    def products(self, tokens: int) -> float:
        """Seconds of the step's products with frozen weights alone: the floor of any implementation."""
        head = self.model.get_output_embeddings()
        linears = [*decoder_linears(self.model).values(), head]
        seconds = 0.0
        for shape in {(linear.in_features, linear.out_features) for linear in linears}:
            count = sum((linear.in_features, linear.out_features) == shape for linear in linears)
            dtype = head.weight.dtype
            x, w, dy = (torch.randn(size).to(dtype) for size in ((tokens, shape[0]), shape[::-1], (tokens, shape[1])))
            for product in (lambda x=x, w=w: x @ w.t(), lambda dy=dy, w=w: dy @ w):
                product()
                start = time.perf_counter()
                for _ in range(3):
                    product()
                seconds += count * (time.perf_counter() - start) / 3
        return seconds

    def generate(self, prompt: Tensor, tokens: int) -> tuple[list[int], float]:
        """(greedy tokens, seconds)"""
        self.model.eval()
        start = time.perf_counter()
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
            )
        seconds = time.perf_counter() - start
        self.model.train()
        return output[0, prompt.shape[1] :].tolist(), seconds

    def memory(self) -> int:
        """Peak resident bytes of this process since its start."""
        return machine.peak_memory_bytes(torch.device("cpu"))


def _ours(job: Job, dtype: torch.dtype) -> tuple[PreTrainedModel, Callable[[Tensor], Tensor]]:
    machine.set_up_cpu(TrainerConfig(threads=job.threads))
    model = AutoModelForCausalLM.from_pretrained(job.model_dir, dtype=dtype, local_files_only=True)
    lean.use_on_cpu(model)
    if job.quantized:
        quantize(model)
        release_file(model)
    attach(model, job.adapter, job.rank, 2 * job.rank)
    label_loss = LabelLoss(model)

    def loss(input_ids: Tensor) -> Tensor:
        batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": input_ids}
        return label_loss(batch) / input_ids[:, 1:].numel()

    return model, loss


def _peft(job: Job, dtype: torch.dtype) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    import peft

    options = {}
    if job.quantized:
        options["device_map"] = "cpu"
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(job.model_dir, dtype=dtype, local_files_only=True, **options)
    config = peft.LoraConfig(
        r=job.rank,
        lora_alpha=2 * job.rank,
        target_modules="all-linear",
        use_dora=job.adapter == "dora",
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(model, config)
    return model, lambda input_ids: model(input_ids=input_ids, labels=input_ids).loss


@torch.no_grad()
def _same_start(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            layer = name.removeprefix("base_model.model.").partition(".lora_A")[0]
            generator = torch.Generator().manual_seed(zlib.crc32(layer.encode()))
            uniform = 2 * torch.rand(parameter.shape, generator=generator) - 1
            parameter.copy_(uniform * parameter.shape[1] ** -0.5)
