"""What a planned model is given for packs of samples, above all their masks (training/packing.py).

On a CPU attention computes only the keys between the first and the last that a block of queries sees. So there the
masks have their values, those of samples of one length. Of packs above LARGEST tokens they have none, and attention is
planned as if one sample filled the pack. On a GPU a model has masks if its attention needs more than the kernel for
texts of several lengths.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel

from experiments.plan.allocations import Allocations
from experiments.system.memory import out_of_memory
from experiments.training.packing import PROBE_TOKENS, has_windows, positions_and_masks
from modules.fused import attention

LARGEST = 2**13  # tokens, whose mask has 64 MiB


def pack_inputs(model: PreTrainedModel, tokens: int, longest: int, on_cpu: bool) -> tuple[dict[str, Any], list[Tensor]]:
    """Arguments of `model` for a pack of samples of `longest` tokens each, and stand-ins on the meta device for all
    masks that it has then."""
    positions = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    if not on_cpu and _takes(model, None):
        return {"position_ids": positions}, []
    has_values = on_cpu and tokens <= LARGEST
    masks = _masks(model, *(tokens, longest) if has_values else (2 * PROBE_TOKENS, PROBE_TOKENS))
    like = [
        torch.empty(*mask.shape[:2], tokens, tokens, dtype=mask.dtype, device="meta")
        for mask in tree_leaves(masks)
        if isinstance(mask, Tensor)
    ]
    if not has_values:
        left = iter(like)
        masks = tree_map_only(Tensor, lambda _: next(left), masks)
    if not _takes(model, _masks(model, 2 * PROBE_TOKENS, PROBE_TOKENS)):
        return {"position_ids": positions}, like  # it makes them itself, and here it does not know that it should
    return {"position_ids": positions, "attention_mask": masks}, like


def _masks(model: PreTrainedModel, tokens: int, longest: int) -> Any:
    return positions_and_masks(model, torch.arange(tokens)[None] % longest, None)["attention_mask"]


def _takes(model: PreTrainedModel, masks: Any) -> bool:
    """Whether the model computes with these masks; None: inside samples, without any."""
    if masks is None and not attention.can_do_without_mask(model):
        return False
    ids = torch.zeros(1, 2 * PROBE_TOKENS, dtype=torch.int64, device="meta")
    given = {"input_ids": ids, "position_ids": ids, "use_cache": False}
    try:
        with torch.no_grad(), Allocations():
            if masks is not None:
                model(**given, attention_mask=masks)
                return True
            with attention.packed(model) as windows:
                boundaries = torch.zeros(3, dtype=torch.int32, device="meta")
                model(**given, **attention.boundaries_of(boundaries, PROBE_TOKENS))
                return has_windows(model, windows)
    except Exception as error:  # code of any model, given arguments that it may not know
        if out_of_memory(error):
            raise
        return False
