"""The numbers in result.json, and the table of them that ends a run."""

import math
from collections.abc import Iterable

from torch import Tensor, nn

from experiments.training.evaluation import Evaluation
from modules import NF4Linear, adapters, decoder_linears
from modules.adapters.model_code import unknown_experts
from modules.linear import weight_shape


def storage(model: nn.Module) -> dict[str, float | int]:
    """The size of the model: parameters, bytes of base and adapter, bits a weight of the decoder's linears."""
    parameters = dict(model.named_parameters())  # a tied weight counts once
    names = _adapter_names(parameters) if adapters(model) else set()
    base = [p for name, p in parameters.items() if name not in names]
    adapter = [p for name, p in parameters.items() if name in names]
    linears = decoder_linears(model).values()
    packed = [linear for linear in linears if isinstance(linear, NF4Linear)]
    constants_and_codes = sum(nbytes(linear.buffers()) for linear in packed)
    dense = nbytes(linear.weight for linear in linears if linear not in packed)
    unknown = sum(unknown_experts(model).values())
    return ({"experts_left_out": unknown} if unknown and adapters(model) else {}) | {
        "trainable_params": sum(p.numel() for p in parameters.values() if p.requires_grad),
        "total_params": sum(p.numel() for p in parameters.values()) + _weights(packed),
        "bits_per_weight": 8 * (constants_and_codes + dense) / _weights(linears),
        "base_bytes": nbytes(base) + constants_and_codes,
        "adapter_bytes": nbytes(adapter),
    }


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _weights(linears) -> int:
    return sum(math.prod(weight_shape(linear)) for linear in linears)


def _adapter_names(parameters: dict[str, nn.Parameter]) -> set[str]:
    """The names of parameters that are not the base's: those that train, and a frozen A."""
    return {name for name, p in parameters.items() if p.requires_grad or name.endswith(".lora_A")}


def compare(before: Evaluation, after: Evaluation) -> dict[str, float]:
    return {
        f"{name}_{when}": getattr(evaluation, name)
        for name in ("loss", "perplexity", "token_accuracy")
        for when, evaluation in (("before", before), ("after", after))
    }


def before_and_after(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """The measures of experiments/runs/measures.py under their names in result.json."""
    return {
        f"{name}_{when}": found[name]
        for name in after
        for when, found in (("before", before), ("after", after))
        if name in found
    }


def table(result: dict) -> str:
    """The result as the terminal shows it at the end of a run."""
    names = [key.removesuffix("_after") for key in result if key.endswith("_after")]
    width = max(18, *map(len, names))
    lines = [f"{'held out':<{width}}{'before':>10}{'after':>10}"]
    for name in names:
        form = "10.3f" if name.endswith("loss") else "10.2f" if name == "perplexity" else "10.1%"
        before, after = (f"{result[f'{name}_{when}']:>{form}}" for when in ("before", "after"))
        lines.append(f"{name.replace('_', ' '):<{width}}{before}{after}")
    if "expert_imbalance" in result:
        lines += [
            "",
            f"experts: the busiest of a layer has {result['expert_imbalance']:.1f} times its even share of tokens; "
            f"{result['experts_without_tokens']} have none",
        ]
    if left_out := result.get("experts_left_out"):
        lines.append(f"{left_out:,} weights of experts stayed dense and untrained: they are of a class not known here")
    lines += [
        "",
        f"trained {result['trainable_params']:,} of {result['total_params']:,} parameters; "
        f"base {result['base_bytes'] / 1e6:.1f} MB, {result['bits_per_weight']:.3f} bits a weight in its linears",
        f"{result['train_seconds']:.0f} s of training at {result['tokens_per_s']:,.0f} tokens/s, "
        f"{result['total_seconds']:.0f} s in all, peak memory {result['peak_memory_bytes'] / 1e9:.2f} GB",
    ]
    return "\n".join(lines)
