"""How a model is told to train on packs: samples laid end to end that must not see one another
(experiments/data/packing.py).

Most models of transformers see from positions that restart where a sample begins, and mask their attention by that.
Some have to be given the masks. In others samples change one another whatever they are given: attention that masks
itself, convolutions and states that run on from token to token. No list of architectures tells. A probe does.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from experiments.errors import UserError

PROBE_TOKENS = 24  # of each of two samples
SHARE = 0.25  # of the change that a sample's place makes. Rounding stays far below it.

Inputs = dict[str, Tensor | dict[str, Tensor]]


def _positions(model: PreTrainedModel, position_ids: Tensor) -> Inputs:
    return {"position_ids": position_ids}


def _positions_and_masks(model: PreTrainedModel, position_ids: Tensor) -> Inputs:
    weight = model.get_input_embeddings().weight
    embedded = weight.new_empty(1).expand(*position_ids.shape, weight.shape[-1])  # of which shape and dtype are used
    masks = create_masks_for_generate(model.config.get_text_config(), embedded, None, None, position_ids)
    return {"position_ids": position_ids, "attention_mask": masks}


def packing_of(model: PreTrainedModel) -> Callable[[PreTrainedModel, Tensor], Inputs]:
    """A function that gives, for (model, position_ids [1, T]), the arguments that keep the model's samples apart.

    Raises:
        UserError: none does.
    """
    training = model.training
    model.eval()
    try:
        for inputs in (_positions, _positions_and_masks):
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
    try:
        packed, leak = _logits_and_leak(model, both, inputs(model, places))
    except Exception:  # code of any model, given arguments that it may not know
        return False
    with torch.no_grad():
        alone = _logits(model, both[:, PROBE_TOKENS:])
        continued = _logits(model, both)[:, PROBE_TOKENS:]
    return not leak and bool((packed - alone).norm() <= SHARE * (continued - alone).norm())


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
