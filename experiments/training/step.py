"""A training step that the host only starts: it looks at no value, so a CUDA graph can have it, and no GPU waits.

Everything that changes from step to step is in tensors of fixed places: the batch in the shape of a bucket, lr and the
count of steps (AdamW's `capturable`), the sum of the losses, and whether one of them or a gradient was not finite.
From then on no step changes weights or state, and the host learns of it when it reads the step's numbers.

A step has three parts, each of which may be a graph: one that begins, a pass for each batch, and the update.
"""

import contextlib
import functools
import math

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from experiments.config import Config
from experiments.data.buckets import Bucket, bucket_of, fill, fill_pack, pack_shape, shape
from experiments.data.chat import IGNORED, Example
from experiments.system import parallel
from experiments.system.memory import out_of_memory
from experiments.training.gradients import autocast_of
from experiments.training.graphs import Eager, Graphs
from experiments.training.loss import LabelLoss
from experiments.training.packing import Packing
from modules import AdamW
from modules.fused.attention import can_do_without_mask, without_mask
from modules.norms import Norms

PROBE = 12  # tokens


def on_gpu(model: PreTrainedModel) -> bool:
    return model.device.type == "cuda"


def needs_the_host(
    cfg: Config, label_loss: LabelLoss, dtype: torch.dtype, packing: Packing | None = None
) -> str | None:
    """Why the host must look at values during a step; None if it need not."""
    if not on_gpu(label_loss.model):
        return "the model is not on a CUDA device"
    if parallel.size() > 1:
        return "several processes agree on each step"
    if dtype == torch.float16:
        return "float16 needs a loss scale, which the host sets"
    if cfg.trainer.compile:
        return "trainer.compile=true makes its own code of the step"
    if packing is not None:
        return f"{type(label_loss.model).__name__} looks for the samples of a pack" if packing.needs_the_host else None
    if not can_do_without_mask(label_loss.model) or not _is_causal(label_loss):
        return f"the attention of {type(label_loss.model).__name__} needs a mask"
    return None


@torch.no_grad()
def _is_causal(label_loss: LabelLoss) -> bool:
    """True if padding on the right changes nothing before it, with no mask to hide it."""
    model = label_loss.model
    ids = torch.arange(PROBE, device=model.device).unsqueeze(0) % model.config.get_text_config().vocab_size
    mask = torch.ones_like(ids)
    mask[:, PROBE // 2 :] = 0
    training = model.training
    model.eval()
    masked = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, : PROBE // 2].float()
    try:
        with without_mask(model):
            plain = model(input_ids=ids, use_cache=False).logits[:, : PROBE // 2].float()
    except Exception as error:  # code of any model, which may ask for an implementation that it knows
        if out_of_memory(error):
            raise
        return False
    finally:
        model.train(training)
    return bool((plain - masked).abs().max() <= 0.05 * masked.abs().max())


def _window(model: PreTrainedModel) -> float:
    """The tokens that attention sees at most; a longer text needs a mask."""
    config = model.config.get_text_config()
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return min((window for window in windows if window is not None), default=math.inf)


class StaticStep:
    """The step of a model on one GPU.

    Args:
        optimizer: capturable.
        graphs: runs the parts.
        norms: of the DoRA layers, where several passes see the same weights.
        packing: batches are packs, which the model gets so.

    Attributes:
        buckets: the shapes of batches. A batch that fits none keeps its own, and runs eagerly.
        numbers: fp64 [2] on the device, the loss and the norm of the gradients of the newest step.
    """

    def __init__(
        self,
        cfg: Config,
        label_loss: LabelLoss,
        optimizer: AdamW,
        dtype: torch.dtype,
        graphs: Graphs | Eager,
        norms: Norms | None,
        packing: Packing | None = None,
    ):
        self.packing = packing
        self.label_loss, self.optimizer, self.graphs, self.norms = label_loss, optimizer, graphs, norms
        self.parameters = [p for p in label_loss.model.parameters() if p.requires_grad]
        self.max_norm = cfg.trainer.max_grad_norm or math.inf
        self.device, self.window = label_loss.model.device, _window(label_loss.model)
        self.buckets: list[Bucket] = []
        self.autocast = functools.partial(autocast_of, label_loss.model, dtype)
        self.numbers = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.total = torch.zeros((), dtype=torch.float64, device=self.device)  # of the losses of this step
        optimizer.found_inf = torch.zeros((), device=self.device)
        self.batches: dict[Bucket, dict[str, Tensor]] = {}  # on the device

    def add_gradients(self, group: list[list[Example]], pad_id: int) -> None:
        """Start to add the gradients of the mean loss over the labelled tokens of a group of batches."""
        labelled = sum(label != IGNORED for batch in group for example in batch for label in example.labels[1:])
        with contextlib.nullcontext() if self.norms is None else self.norms.used():
            self.graphs.run(("begin", len(self.norms.values) if self.norms else 0), self._begin)
            for batch in group:
                own = shape(batch) if self.packing is None else pack_shape(batch)
                bucket = bucket_of(own, self.buckets)
                filled = (fill if self.packing is None else fill_pack)(batch, bucket or own, pad_id)
                tensors = self._to_device(filled, bucket, labelled)
                masked = self.packing is None and (bucket or own).length >= self.window
                runs = Eager() if masked or bucket is None else self.graphs
                with self._attention(masked):
                    runs.run(bucket, functools.partial(self._forward_backward, tensors))

    def _attention(self, masked: bool) -> contextlib.AbstractContextManager:
        if self.packing is not None:
            return self.packing.around()
        return contextlib.nullcontext() if masked else without_mask(self.label_loss.model)

    def update(self) -> None:
        """Start to clip the gradients, to update the weights and to set the gradients to zero."""
        self.optimizer.set_lr()
        trained = sum(p.grad is not None for p in self.parameters)
        self.graphs.run(("update", trained), self._update)
        torch.autograd.graph.increment_version(self.parameters)  # a replay changes them, and no version tells

    def _to_device(self, filled: dict[str, Tensor], bucket: Bucket | None, labelled: int) -> dict:
        """A batch on the device, in the tensors of its bucket if it has one."""
        batch = self._copied(filled, bucket, labelled)
        if self.packing is None:
            return batch
        given = self.packing.inputs(self.label_loss.model, batch["position_ids"], batch["boundaries"])
        if bucket is None:
            return batch | {"given": given}
        kept = batch.setdefault("given", given)
        for old, new in zip(tree_leaves(kept), tree_leaves(given), strict=True):
            if isinstance(old, Tensor) and old is not new:  # masks, which are made anew
                old.copy_(new)
        return batch

    def _copied(self, filled: dict[str, Tensor], bucket: Bucket | None, labelled: int) -> dict:
        filled["labelled"] = torch.tensor(float(labelled))
        if self.device.type == "cuda":  # a copy from other memory would have the host wait
            filled = {name: tensor.pin_memory() for name, tensor in filled.items()}
        if bucket is None:
            return {name: tensor.to(self.device, non_blocking=True) for name, tensor in filled.items()}
        if bucket not in self.batches:
            self.batches[bucket] = {name: torch.empty_like(t, device=self.device) for name, t in filled.items()}
        for name, tensor in filled.items():
            self.batches[bucket][name].copy_(tensor, non_blocking=True)
        return self.batches[bucket]

    def _begin(self) -> None:
        self.total.zero_()
        if self.norms is not None:
            self.norms.refresh()

    def _forward_backward(self, batch: dict[str, Tensor]) -> None:
        """Add the gradients of a batch."""
        with self.autocast():
            loss = self.label_loss.padded(batch) / batch["labelled"]
        self.total += loss.detach()
        loss.backward()

    def _update(self) -> None:
        """Clip and step, unless something is, or was, not finite."""
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        finite = self.total.isfinite() & grad_norm.isfinite()
        torch.maximum(self.optimizer.found_inf, (~finite).float(), out=self.optimizer.found_inf)
        self.optimizer.step()
        self.numbers.copy_(torch.stack([self.total, grad_norm.double()]))
        if isinstance(self.graphs, Eager):
            self.optimizer.zero_grad(set_to_none=True)
        else:  # a graph adds to these tensors
            torch._foreach_zero_([p.grad for p in self.parameters if p.grad is not None])


class Reading:
    """Numbers on their way from the device, which the host waits for when it asks."""

    def __init__(self, tensor: Tensor):
        self.event = None
        if tensor.is_cuda:
            self.values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.values.copy_(tensor, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        else:
            self.values = tensor.clone()

    def get(self) -> list[float]:
        if self.event is not None:
            self.event.synchronize()
        return self.values.tolist()
