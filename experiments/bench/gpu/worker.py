"""One side of the comparison on a GPU, in a process of its own: it builds models, then answers requests over a pipe.

`ours` is in ours.py: the steps of `python -m experiments.run` and the decoding of `experiments.generate`. `peft` is
PEFT over bitsandbytes' NF4 with double quantization, as their documentation sets them up; `liger` the same with Liger's
kernels in the model; `unsloth` its own FastLanguageModel, read from a directory.

The file is run by its path with `python -P`, and imports the project for `ours` alone: in the others' processes nothing
of it can be imported, above all not `kernels`, the name of a package that transformers and bitsandbytes look for.
"""

import importlib.util
import json
import logging
import os
import sys
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent


def by_path(path: Path) -> ModuleType:
    """The module in a file of the project that imports nothing of the project."""
    spec = importlib.util.spec_from_file_location(f"bench_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


side = by_path(HERE / "side.py")


class Peft(side.Side):
    def __init__(self, liger: bool = False):
        # bitsandbytes warns that a kernel for evaluation is not installed; nothing here depends on it
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        warnings.simplefilter("ignore", FutureWarning)
        import peft  # noqa: F401  (now: it takes seconds)
        import transformers

        super().__init__()
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        if liger:
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama()

    def _build(self) -> None:
        import peft
        from transformers import AutoConfig, AutoModelForCausalLM

        job, torch = self.job, self.torch
        dtype, device = getattr(torch, job.dtype), torch.device(job.device)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**job.architecture), dtype=dtype)
        model.is_loaded_in_4bit = job.quantized  # PEFT asks
        weights = by_path(HERE.parents[1] / "models" / "random_weights.py")
        weights.fill(model, device, job.seed, self._packing(model, dtype) if job.quantized else None)
        config = peft.LoraConfig(
            r=job.rank,
            lora_alpha=2 * job.rank,
            target_modules="all-linear",
            use_dora=job.adapter == "dora",
            task_type="CAUSAL_LM",
        )
        self.model = peft.get_peft_model(model, config).train()
        if job.checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self._begin()

    def _packing(self, model, dtype):
        import bitsandbytes

        def pack(name: str, module) -> None:
            if type(module) is not self.torch.nn.Linear or module is model.get_output_embeddings():
                return
            packed = bitsandbytes.nn.Linear4bit(
                module.in_features,
                module.out_features,
                module.bias is not None,
                compute_dtype=dtype,
                quant_type="nf4",
                device="meta",
            )
            weight = bitsandbytes.nn.Params4bit(
                module.weight.data, requires_grad=False, quant_type="nf4", module=packed
            )
            packed.weight, packed.bias = weight.to(module.weight.device), module.bias
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, packed)

        return pack

    def _begin(self) -> None:
        by_path(HERE.parent / "worker.py").same_start(self.model, self.job.seed)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = self.torch.optim.AdamW(self.trained, lr=self.job.lr, weight_decay=0.0, fused=True)

    def _step(self, batch: list[list[int]]) -> list[float]:
        ids = self.torch.tensor(batch, device=self.job.device)
        loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.trained, self.job.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return [loss.item()]

    def _decode(self, prompts: list[list[int]], new: int) -> tuple[float, float, list[int]]:
        ids = self.torch.tensor(prompts, device=self.job.device)

        def write(count: int):
            self._wait()
            start = time.perf_counter()
            texts = self.model.generate(
                input_ids=ids,
                attention_mask=self.torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
            self._wait()
            return texts[:, ids.shape[1] :].tolist(), time.perf_counter() - start

        write(2)
        _, first = write(1)
        texts, all_ = write(new)
        return first, (all_ - first) / (new - 1), [row[0] for row in texts]

    def _trace(self) -> ModuleType:
        return by_path(HERE / "trace.py")

    def _forget(self) -> None:
        self.trained = None


class Unsloth(Peft):
    def __init__(self):
        import unsloth  # noqa: F401  (before transformers and PEFT: it changes them)

        side.Side.__init__(self)

    def _build(self) -> None:
        from unsloth import FastLanguageModel

        job = self.job
        if job.adapter != "lora" or not job.quantized:
            raise ValueError(f"unsloth is measured with QLoRA, not {job.method}")
        model, _ = FastLanguageModel.from_pretrained(
            job.directory,
            max_seq_length=max(job.length, 1024),  # decoding writes after 512
            dtype=getattr(self.torch, job.dtype),
            load_in_4bit=True,
        )
        self.model = FastLanguageModel.get_peft_model(
            model,
            r=job.rank,
            lora_alpha=2 * job.rank,
            lora_dropout=0,
            bias="none",
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            use_gradient_checkpointing="unsloth" if job.checkpointing else False,
            random_state=job.seed,
            max_seq_length=max(job.length, 1024),
        )
        self._begin()

    def _decode(self, prompts: list[list[int]], new: int) -> tuple[float, float, list[int]]:
        from unsloth import FastLanguageModel

        FastLanguageModel.for_inference(self.model)
        try:
            return super()._decode(prompts, new)
        finally:
            FastLanguageModel.for_training(self.model)


def side_of(name: str) -> side.Side:
    if name == "ours":
        from experiments.bench.gpu.ours import Ours

        return Ours()
    return Unsloth() if name == "unsloth" else Peft(liger=name == "liger")


def serve(name: str, pipe: Connection) -> None:
    """Answer requests, each the name of a method and its arguments, with (answer, None) or (None, error), until None
    comes. An error costs its own request alone."""
    one = None
    request: tuple = ("versions",)
    while request is not None:
        try:
            one = one or side_of(name)
            method, *arguments = request
            answer = getattr(one, method)(*arguments), None
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            answer = None, f"{type(error).__name__}: {lines[0]}"
            del error
        pipe.send(answer)
        request = pipe.recv()


if __name__ == "__main__":  # python -P worker.py SIDE FILE_DESCRIPTOR
    # A graph that was captured before a profile must be seen in it, and must live on after it
    os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    os.environ |= {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}  # or they wait for a network
    serve(json.loads(sys.argv[1]), Connection(int(sys.argv[2])))
