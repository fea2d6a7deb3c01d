"""The fingerprint of a base model, by which an adapter knows the one that it was trained on from others of its shapes.

It has the hash of the first values of the embeddings, and that of all decoder linears but experts, or of their codes
and constants. A base in another data type has another hash there, and only what has the same type is compared.
Embeddings are never packed.
"""

from collections.abc import Mapping

import torch
import xxhash
from torch import Tensor, nn

from modules.adapters.targets import decoder_linears
from modules.experts import is_experts
from modules.linear import NF4Linear

VALUES = 2048  # of each tensor


class OtherBase(UserWarning):
    """An adapter was trained on another base."""


@torch.no_grad()
def base_print(model: nn.Module) -> dict[str, str]:
    """Hashes by their part of the model and its type. Empty on the meta device, and for a model without embeddings.

    Args:
        model: without adapters in its tree.
    """
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    linears = [one for one in decoder_linears(model).values() if not is_experts(one)]
    found = {}
    for part, modules in (("embeddings", [embeddings]), ("linears", linears)):
        if not all(isinstance(getattr(one, "weight", None), Tensor) and not one.weight.is_meta for one in modules):
            return {}
        samples = [_sample(one) for one in modules]
        types = sorted({_type(one, sample) for one, sample in zip(modules, samples)})
        digest = xxhash.xxh3_64()
        for sample in samples:
            digest.update(sample.cpu().view(torch.uint8).numpy())
        found[f"{part} in {', '.join(types)}"] = digest.hexdigest()
    return found


def is_other_base(written: Mapping[str, str], here: Mapping[str, str]) -> bool:
    """Whether the fingerprints are those of different models."""
    return any(written[part] != here[part] for part in written.keys() & here.keys())


def _sample(module: nn.Module) -> Tensor:
    """The first values, or the first codes and constants. fp32 that was rounded to bf16 is the same base."""
    if isinstance(module, NF4Linear):
        constants = module.absmax, module.nested_absmax, module.nested_offset
        tensors = [module.weight, *(tensor for tensor in constants if tensor is not None)]
        return torch.cat([tensor.detach().reshape(-1)[:VALUES].view(torch.uint8) for tensor in tensors])
    values = module.weight.detach().reshape(-1)[:VALUES]
    return values.to(torch.bfloat16) if values.dtype in (torch.float32, torch.float64) else values


def _type(module: nn.Module, sample: Tensor) -> str:
    if not isinstance(module, NF4Linear):
        return str(sample.dtype).removeprefix("torch.")
    return f"{module.quant_type} of {module.blocksize} from {module.dtype}"  # rounded weights may have other codes
