"""Cross-entropy of the labelled tokens, without logits [tokens, vocabulary] in memory.

    loss = Σ_t (logsumexp_v h_t·w_v - h_t·w_target(t))          h [n, hidden], w [vocabulary, hidden]
    dh_t = Σ_v (softmax_v - [v = target]) w_v                   dw likewise, if the output embeddings train

A chunk of tokens goes through forward and backward at once, and nothing of its logits is kept. Products run in the
compute dtype, softmax and sums in fp32.
"""

import os
import shutil

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from experiments.errors import UserError
from experiments.system.files import cache_dir
from experiments.training.evaluation import label_logits, label_positions, label_starts
from kernels import cpu
from modules.adapters.prefix import prompt_lengths

CHUNK_BYTES = 2**26  # of logits: enough tokens for a product that reads the whole of w
FP32_BYTES = 2**22  # of fp32 softmax: it stays in a CPU's cache


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        needs_dh, needs_dw, needs_db, _ = ctx.needs_input_grad
        dhidden = torch.empty_like(hidden) if needs_dh else None
        dweight = torch.zeros_like(weight) if needs_dw else None
        dbias = torch.zeros_like(bias) if needs_db else None
        precise = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=precise, device=hidden.device)
        most = max(1, CHUNK_BYTES // (hidden.element_size() * weight.shape[0]))
        rows = -(-len(hidden) // max(1, -(-len(hidden) // most))) or 1  # chunks of one size
        for start in range(0, hidden.shape[0], rows):
            h = hidden[start : start + rows]
            dlogits = F.linear(h, weight, bias)  # the logits, until their gradient takes their place
            loss += _cross_entropy(dlogits, targets[start : start + rows], precise)
            if needs_dh:
                dhidden[start : start + rows] = dlogits @ weight.to(dlogits.dtype)
            if needs_dw:
                dweight += dlogits.t() @ h.to(dlogits.dtype)
            if needs_db:
                dbias += dlogits.sum(0)
        ctx.gradients = dhidden, dweight, dbias
        return loss

    @staticmethod
    def backward(ctx, dloss: Tensor):
        return *(None if gradient is None else gradient * dloss for gradient in ctx.gradients), None


def _cross_entropy(logits: Tensor, targets: Tensor, precise: torch.dtype) -> Tensor:
    """Σ cross-entropy of logits [n, vocabulary], in `precise`; they become their gradient."""
    if cpu.takes(logits):
        return cpu.softmax.cross_entropy(logits, targets).sum()
    loss = torch.zeros((), dtype=precise, device=logits.device)
    rows = max(1, FP32_BYTES // (4 * logits.shape[1]) if logits.is_cpu else len(logits))
    for part, target in zip(logits.split(rows), targets.unsqueeze(1).split(rows)):
        x = part.to(precise)
        p = torch.softmax(x, 1)
        logsumexp = x.amax(1) - p.amax(1).log()
        loss += (logsumexp - x.gather(1, target).squeeze(1)).sum()
        part.copy_(p.scatter_add_(1, target, p.new_full(target.shape, -1.0)))
    return loss


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Σ cross-entropy of logits = hidden · weightᵀ + bias.

    Args:
        hidden: [n, hidden]. weight: [vocabulary, hidden]. bias: [vocabulary] or None. targets: int64 [n].

    Returns:
        fp32 [] (fp64 for fp64), in nats. Differentiable once, in hidden, weight and bias.
    """
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets)


@torch.no_grad()
def has_plain_head(model: PreTrainedModel) -> bool:
    """True if the model's logits are what its output embeddings give, without a softcap or scale behind. Also of a
    model without weights, on the meta device."""
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        return False
    given = []
    hook = head.register_forward_hook(lambda _, args, output: given.append((output, output._version)))
    try:
        some = torch.arange(8, device=model.device).unsqueeze(0)
        logits = model(input_ids=some, use_cache=False).logits
    finally:
        hook.remove()
    output, version = given[0]
    return logits is output and output._version == version  # the version tells of changes in place


class LabelLoss:
    """Σ cross-entropy over the labelled tokens of a batch (input_ids, attention_mask, labels: each [B, T]).

    Args:
        compiled: run the model through torch.compile, whose code is kept in the cache.

    Raises:
        UserError: there is no C++ compiler for a CPU's code.
    """

    def __init__(self, model: PreTrainedModel, compiled: bool = False):
        self.model, self.forward = model, model
        self.plain_head = has_plain_head(model)  # without one the logits are materialised
        self.labelled: Tensor | None = None  # of the batch whose loss is computed
        self.hidden: Tensor | None = None  # what the output embeddings got at these places
        if self.plain_head:  # registered once: torch.compile would begin anew for another hook
            model.get_output_embeddings().register_forward_pre_hook(self._keep_labelled)
        if compiled:
            compiler = os.environ.get("CXX", "g++")
            if model.device.type == "cpu" and not shutil.which(compiler):
                raise UserError(
                    f"trainer.compile=true needs a C++ compiler, and {compiler} is not there: set CXX to one"
                )
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "inductor"))
            self.forward = torch.compile(model)

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        if not self.plain_head:
            logits, targets = label_logits(self.model, batch, self.forward)
            return F.cross_entropy(logits.float(), targets, reduction="sum")
        targets, self.labelled = label_positions(batch)
        head = self.model.get_output_embeddings()
        try:
            with prompt_lengths(self.model, label_starts(batch)):
                self.forward(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
            return linear_cross_entropy(self.hidden, head.weight, head.bias, targets)
        finally:
            self.labelled = self.hidden = None

    def _keep_labelled(self, head: torch.nn.Module, args: tuple) -> tuple:
        if self.labelled is None:
            return args
        self.hidden = args[0][self.labelled]
        return self.hidden[:1], *args[1:]  # what the head makes of it is not used
