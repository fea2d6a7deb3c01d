"""The parts of a step as CUDA graphs: the host starts thousands of kernels in one call.

The first time, a part runs eagerly. The second time it is captured, which executes nothing, and from then on replayed.
So no step is made twice, and the random numbers are those of eager steps: torch moves its generator on with a replay.
"""

from collections.abc import Callable, Hashable

import torch
from torch import nn

from experiments.config import Config
from experiments.system import parallel
from modules.adapters.model_code import unknown_experts
from modules.experts import ExpertsLinear

MEMORY_SHARE = 0.5  # of the device's memory that was free before the first capture: all graphs together


def cannot_capture(cfg: Config, model: nn.Module) -> str | None:
    """Why the steps of a `StaticStep` cannot be graphs; None if they can."""
    if cfg.optim.paged:
        return "optim.paged=true moves state between host and device in each step"
    if cfg.trainer.offload_activations:
        return "trainer.offload_activations=true moves activations between host and device in each step"
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    for name, module in model.named_modules():
        if module is not model.get_output_embeddings() and any(getattr(module, kind) for kind in hooks):
            return f"{name or 'the model'} has a hook, which a replay would not call"
        if hasattr(module, "_hf_hook"):
            return f"accelerate moves the tensors of {name or 'the model'}"
    again = cfg.trainer.gradient_checkpointing or cfg.trainer.mlp_tokens
    if again and own_dropout(model):
        return f"checkpointing computes the model's own dropout ({own_dropout(model)}) again"
    return _experts_that_wait(model)


def _experts_that_wait(model: nn.Module) -> str | None:
    """Why the experts of `model` make the host wait for the number of tokens that each has; None if they do not."""
    for name, module in model.named_modules():
        if isinstance(module, ExpertsLinear) and module.weight.requires_grad:
            return f"{name} trains whole, and the host asks how many tokens each expert has"
    if unknown := next(iter(unknown_experts(model)), None):
        return f"{unknown} is of experts of a class not known here, whose code may ask how many tokens each has"
    return None


def own_dropout(model: nn.Module) -> str | None:
    """The setting of the model's configuration that draws random numbers in training; None if none does."""
    for name, value in model.config.get_text_config().to_dict().items():
        if ("drop" in name or name == "router_jitter_noise") and isinstance(value, float) and value > 0:
            return f"{name}={value:g}"
    return None


class Eager:
    """Runs the parts as they are."""

    def run(self, key: Hashable, part: Callable[[], None]) -> None:
        part()


class Graphs:
    """Runs a part as the graph that was captured of it."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)  # torch wants the run before a capture on a stream beside
        self.pool = torch.cuda.graph_pool_handle()
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self.seen: set[Hashable] = set()
        self.budget: int | None = None
        self.full = False

    def run(self, key: Hashable, part: Callable[[], None]) -> None:
        """Run `part`, which does the same kernels on the same memory whenever it has this key."""
        if key in self.seen and key not in self.graphs and not self.full:
            self._capture(key, part)
        if key in self.graphs:
            self.graphs[key].replay()
            return
        self.seen.add(key)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            part()
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def _capture(self, key: Hashable, part: Callable[[], None]) -> None:
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(self.device)[0]
        if self.budget is None:
            self.budget = int(free * MEMORY_SHARE)
        graph, reason = torch.cuda.CUDAGraph(), None
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                part()
        except torch.OutOfMemoryError:
            reason = "the device's memory is full"
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
        used = free - torch.cuda.mem_get_info(self.device)[0]
        if reason is None and used > self.budget:
            reason = f"its memory, {used / 1e9:.1f} GB, is more than is left of the budget, {self.budget / 1e9:.1f} GB"
        if reason is None:
            self.budget -= max(0, used)
            self.graphs[key] = graph
            return
        self.full = True  # once it is: a larger batch would meet the same
        del graph
        torch.cuda.empty_cache()
        if parallel.is_main():
            print(f"some steps run eagerly, not in a CUDA graph: {reason}")
