"""One side of the comparison in a process of its own: it builds a model, then answers requests over a pipe.

`ours` is the model that `python -m experiments.run` trains, with all imports of such a process. `peft` is PEFT's LoRA
or DoRA on a transformers model, for QLoRA and QDoRA over bitsandbytes' NF4 with double quantization, as their
documentation sets them up. Both read the base from the same file; each lora_A is drawn from a seed made of its layer's
name, each lora_B is zero.

The file is run by its path with `python -P`, and imports the project for `ours` alone: in the peer's process nothing of
it can be imported, above all not `kernels`, the name of a package that transformers and bitsandbytes look for.
"""

import json
import logging
import resource
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
from torch import Tensor, nn

PEER_NOTE = (
    "PEFT's own text is another one in evaluation mode: on processors with AVX-512 bf16 bitsandbytes then repacks its "
    "weights, and PEFT's DoRA norm reads them as if it had not. Its texts are compared in training mode, without "
    "dropout; its speed is that of evaluation mode, which is higher."
)


@dataclass(frozen=True)
class Job:
    """The model that a worker builds from the Hugging Face directory `model_dir`; dtype is "float32" or "bfloat16"."""

    side: str  # ours | peft
    method: str  # lora | qlora | dora | qdora
    rank: int
    model_dir: str
    dtype: str
    threads: int
    lr: float = 1e-3
    seed: int = 0  # of each lora_A

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
        self.job = job
        self.model, self.loss, self.optimizer = (_ours if job.side == "ours" else _peft)(job)
        same_start(self.model, job.seed)
        self.model.train()

    def step(self, input_ids: list[list[int]]) -> tuple[float, float]:
        """(loss, seconds) of an optimizer step."""
        input_ids = torch.tensor(input_ids)
        start = time.perf_counter()
        loss = self.loss(input_ids)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item(), time.perf_counter() - start

    def products(self, tokens: int) -> float:
        """Seconds of the step's products with frozen weights alone: the floor of any implementation."""
        from modules import decoder_linears

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

    def generate(self, prompt: list[int], tokens: int, training: bool = False) -> tuple[list[int], float]:
        """(greedy tokens, seconds), in evaluation mode unless `training`."""
        self.model.train(training)
        write = self._decode if self.job.side == "ours" else self._by_transformers
        start = time.perf_counter()
        with torch.inference_mode():
            new = write(prompt, tokens)
        return new, time.perf_counter() - start

    def _decode(self, prompt: list[int], tokens: int) -> list[int]:
        from experiments.models import decoding

        length, no_ends = decoding.rounded_up(len(prompt) + tokens), decoding.Ends((), 0)
        rows = decoding.Rows(self.model, 1, length, decoding.chooser(0, 1, 0), no_ends)
        rows.read([prompt])
        return [token for [token] in decoding.written(rows, tokens)]

    def _by_transformers(self, prompt: list[int], tokens: int) -> list[int]:
        most = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        output = self.model.generate(input_ids=torch.tensor([prompt]), do_sample=False, pad_token_id=0, **most)
        return output[0, len(prompt) :].tolist()

    def logits(self, input_ids: list[int]) -> list[float]:
        """Of the token after `input_ids`, in the mode of the last `generate`."""
        with torch.inference_mode():
            return self.model(input_ids=torch.tensor([input_ids])).logits[0, -1].tolist()

    def memory(self) -> int:
        """Peak resident bytes of this process since its start."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _ours(job: Job) -> tuple[nn.Module, Callable[[Tensor], Tensor], torch.optim.Optimizer]:
    import experiments.runs.sweep  # noqa: F401  (the imports of a run count as its memory)
    from experiments.config import Config, MethodConfig, ModelConfig, QuantConfig, TrainerConfig
    from experiments.models.load import prepare_model
    from experiments.system import machine
    from experiments.system.quiet import quiet
    from experiments.training.loss import LabelLoss
    from experiments.training.optim import make_optimizer
    from modules import parameter_groups

    cfg = Config(
        model=ModelConfig(name="bench", source="hf", path=job.model_dir),
        quant=QuantConfig(name="nf4" if job.quantized else "none"),
        method=MethodConfig(name=job.method, adapter=job.adapter, lr=job.lr),
        trainer=TrainerConfig(name="bench", threads=job.threads),
        rank=job.rank,
        lora_alpha=2.0 * job.rank,
        lr=job.lr,
    )
    machine.set_up_cpu(cfg.trainer)
    with quiet():
        model, _ = prepare_model(cfg, torch.device("cpu"), getattr(torch, job.dtype))
    machine.keep_freed_memory()
    label_loss = LabelLoss(model)

    def loss(input_ids: Tensor) -> Tensor:
        batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": input_ids}
        return label_loss(batch) / input_ids[:, 1:].numel()

    return model, loss, make_optimizer(cfg, parameter_groups(model, job.lr, 1.0))


def _peft(job: Job) -> tuple[nn.Module, Callable[[Tensor], Tensor], torch.optim.Optimizer]:
    # bitsandbytes warns that a kernel for evaluation is not installed; nothing here depends on it
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)
    import peft
    import transformers

    torch.set_num_threads(job.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    dtype = getattr(torch, job.dtype)
    options = {}
    if job.quantized:
        options["device_map"] = "cpu"
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job.model_dir, dtype=dtype, local_files_only=True, **options
    )
    config = peft.LoraConfig(
        r=job.rank,
        lora_alpha=2 * job.rank,
        target_modules="all-linear",
        use_dora=job.adapter == "dora",
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(model, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job.lr, weight_decay=0.0, fused=True)
    return model, lambda input_ids: model(input_ids=input_ids, labels=input_ids).loss, optimizer


@torch.no_grad()
def same_start(model: nn.Module, seed: int) -> None:
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            layer = name.removeprefix("base_model.model.").partition(".lora_A")[0]
            generator = torch.Generator().manual_seed(zlib.crc32(layer.encode()) + seed)
            uniform = 2 * torch.rand(parameter.shape, generator=generator) - 1
            parameter.copy_(uniform * parameter.shape[1] ** -0.5)


if __name__ == "__main__":  # python -P worker.py JOB FILE_DESCRIPTOR
    serve(Job(**json.loads(sys.argv[1])), Connection(int(sys.argv[2])))
