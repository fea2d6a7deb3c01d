"""How a model is told to train on packs: samples laid end to end that must not see one another
(experiments/data/packing.py).

Most models of transformers see from positions that restart where a sample begins, and mask their attention by that.
Some have to be given the masks. In others samples change one another whatever they are given: attention that masks
itself, convolutions and states that run on from token to token. No list of architectures tells. A probe does.
"""

import contextlib
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from experiments.data.chat import Example
from experiments.data.packing import collate_pack, share
from experiments.errors import UserError
from experiments.system import parallel
from experiments.system.memory import out_of_memory
from experiments.training.evaluation import to_device
from modules.fused import attention

PROBE_TOKENS = 24  # of each of two samples
SHARE = 0.25  # of the change that a sample's place makes. Rounding stays far below it.

Inputs = dict[str, Tensor | dict[str, Tensor] | int]


def _positions(model: PreTrainedModel, position_ids: Tensor, boundaries: Tensor) -> Inputs:
    return {"position_ids": position_ids}


def positions_and_masks(model: PreTrainedModel, position_ids: Tensor, boundaries: Tensor | None) -> Inputs:
    weight = model.get_input_embeddings().weight
    one = torch.empty(1, dtype=weight.dtype, device=position_ids.device)
    embedded = one.expand(*position_ids.shape, weight.shape[-1])  # of which shape and dtype are used
    masks = create_masks_for_generate(model.config.get_text_config(), embedded, None, None, position_ids)
    return {"position_ids": position_ids, "attention_mask": masks}


def _positions_and_boundaries(model: PreTrainedModel, position_ids: Tensor, boundaries: Tensor) -> Inputs:
    return {"position_ids": position_ids, **attention.boundaries_of(boundaries, position_ids.shape[1])}


ON_HOST, ON_GPU = (_positions, positions_and_masks), (_positions_and_boundaries, positions_and_masks, _positions)


class Packing:
    """How a model gets packs.

    Args:
        tokens: of a pack.
        on_gpu: the model is on a GPU, where a kernel may do without masks, and nothing should have the host wait.

    Attributes:
        inputs: gives for (model, position_ids [1, T], boundaries) the arguments that keep samples apart.

    Raises:
        UserError: samples would change one another in it.
    """

    def __init__(self, model: PreTrainedModel, tokens: int, on_gpu: bool = False):
        self.model, self.tokens = model, tokens
        self.inputs = packing_of(model, ON_GPU if on_gpu else ON_HOST)
        self.needs_the_host = self.inputs is _positions  # transformers looks where positions begin anew

    def batch(self, pack: list[Example], pad_id: int) -> Inputs:
        """The batch for `LabelLoss` of this process' share of a pack, on the model's device.

        One process has packs of one shape. Of several, each has its own samples without padding.
        """
        own, tokens = pack, self.tokens
        if parallel.size() > 1:
            own = share(pack, parallel.rank(), parallel.size()) or [min(pack, key=_length).unlabelled()]
            tokens = sum(map(_length, own))
        batch = to_device(collate_pack(own, tokens, pad_id), self.model.device)
        boundaries = torch.tensor([0, *accumulate(map(_length, own)), tokens], dtype=torch.int32)
        return batch | self.inputs(self.model, batch["position_ids"], boundaries.to(self.model.device))

    def around(self) -> contextlib.AbstractContextManager:
        """Around forward and backward passes with these arguments."""
        return _around(self.model, self.inputs)


def _length(example: Example) -> int:
    return len(example.input_ids)


def _around(model: PreTrainedModel, inputs: Callable) -> contextlib.AbstractContextManager:
    return attention.packed(model) if inputs is _positions_and_boundaries else contextlib.nullcontext()


def packing_of(model: PreTrainedModel, ways: tuple[Callable, ...] = ON_HOST) -> Callable[..., Inputs]:
    """The first of `ways` that keeps the model's samples apart.

    Raises:
        UserError: none does.
    """
    training = model.training
    model.eval()
    try:
        for inputs in ways:
            if _keeps_apart(model, inputs):
                return inputs
    finally:
        model.train(training)
    raise UserError(
        f"data.packing=true: samples laid end to end change one another in {type(model).__name__}, whose attention, "
        "state or positions do not begin anew at each: leave packing out"
    )


def _keeps_apart(model: PreTrainedModel, inputs: Callable[[PreTrainedModel, Tensor], Inputs]) -> bool:
    """Whether two samples in a pack keep apart.

    The second's logits must not depend on the first: their derivative by its embeddings is exactly 0, whatever the
    dtype. And they must be those that the second has alone, not those that it has as the continuation of the first.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    both = torch.randint(vocabulary, (1, 2 * PROBE_TOKENS), generator=generator).to(model.device)
    places = torch.arange(PROBE_TOKENS, device=model.device).repeat(2)[None]
    boundaries = torch.tensor([0, PROBE_TOKENS, 2 * PROBE_TOKENS], dtype=torch.int32, device=model.device)
    if inputs is _positions_and_boundaries and not attention.can_do_without_mask(model):
        return False
    try:
        with _around(model, inputs) as windows:
            packed, leak = _logits_and_leak(model, both, inputs(model, places, boundaries))
            if windows is not None and not has_windows(model, windows):
                return False
    except Exception as error:  # code of any model, given arguments that it may not know
        if out_of_memory(error):
            raise
        return False
    with torch.no_grad():
        alone = _logits(model, both[:, PROBE_TOKENS:])
        continued = _logits(model, both)[:, PROBE_TOKENS:]
    return not leak and bool((packed - alone).norm() <= SHARE * (continued - alone).norm())


def has_windows(model: PreTrainedModel, seen: set[int | None]) -> bool:
    """Whether the layers told of a window that the configuration has. The probe is shorter than most."""
    config = model.config.get_text_config()
    return getattr(config, "sliding_window", None) in {None, *seen} and not getattr(config, "attention_chunk_size", 0)


def _logits(model: PreTrainedModel, input_ids: Tensor, inputs: Inputs | None = None) -> Tensor:
    return model(input_ids=input_ids, use_cache=False, **inputs or {}).logits.float()


def _logits_and_leak(model: PreTrainedModel, both: Tensor, inputs: Inputs) -> tuple[Tensor, bool]:
    """(the second sample's logits, whether they depend on the first sample)"""
    embedded = []

    def keep(module: torch.nn.Module, args: tuple, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()  # some models scale it in place

    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        logits = _logits(model, both, inputs)[:, PROBE_TOKENS:]
    finally:
        hook.remove()
    weights = torch.linspace(-1, 1, logits.numel(), device=logits.device).view_as(logits)
    gradients = torch.autograd.grad(logits, embedded, weights, allow_unused=True)
    leak = any(gradient is not None and bool(gradient[:, :PROBE_TOKENS].any()) for gradient in gradients)
    return logits.detach(), leak
