"""Small random models with experts, and what they compute with adapters by the formula, for each expert alone."""

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kernels import Weight, quantize_4bit
from modules import adapted_linears
from modules.experts import is_experts
from modules.files.block_formats import parts_of_weight
from modules.linear import weight_of
from tests.survey.small import build

MODELS = ("qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss", "llama4_text", "nemotron_h")
IDS = torch.arange(3, 33).view(2, 15)


def moe_model(kind: str) -> nn.Module:
    """The model in fp32 and in evaluation mode. Its weights are large enough for routers to choose."""
    torch.manual_seed(0)
    model = build(kind).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.1)
    return model


def outputs(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


@torch.no_grad()
def by_formula(plain: nn.Module, adapted: nn.Module) -> nn.Module:
    """A copy of `plain` in float64 whose weights are those of `adapted`, with its update, by the definition."""
    model = copy.deepcopy(plain).double().requires_grad_(True)
    for module in model.modules():
        if hasattr(module, "has_gate"):  # transformers' grouped products have no float64, its loop over experts has
            module.config._experts_implementation = "eager"
    for path, layer in adapted_linears(adapted).items():
        parent, _, name = path.rpartition(".")
        w = weight_of(layer.base).dense(torch.float32).double()
        experts = w if w.dim() == 3 else w[None]
        factors = [factor.double() if w.dim() == 3 else factor.double()[None] for factor in layer.factors()]
        merged = []
        for expert, a, b in zip(experts, *factors):
            v = expert + layer.scaling * b @ a
            if hasattr(layer, "magnitude"):
                rows = layer.whole_magnitude().double().view(len(experts), -1)[len(merged)]
                v = rows[:, None] * v / v.norm(dim=1, keepdim=True)
            merged.append(v)
        module = model.get_submodule(parent)
        if w.dim() == 2:
            module.get_submodule(name).weight.copy_(merged[0])
        else:
            stacked = torch.stack(merged)
            getattr(module, name).copy_(stacked.mT if layer.base.in_out else stacked)
    return model


def gradients_by_formula(adapted: nn.Module, exact: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients of the adapters' parameters, by name, from those of the weights of `by_formula`'s model.

    The norm of DoRA is a constant, as in the paper.
    """
    found = {}
    for path, layer in adapted_linears(adapted).items():
        stacked = is_experts(layer.base)
        dw = exact.get_parameter(path if stacked else f"{path}.weight").grad
        if dw is None:
            continue
        dw = dw.mT if stacked and layer.base.in_out else dw
        lora_A, lora_B = (factor.detach().double() for factor in layer.factors())
        if hasattr(layer, "magnitude"):
            v = weight_of(layer.base).dense(torch.float32).double() + layer.scaling * lora_B @ lora_A
            norm = v.norm(dim=-1, keepdim=True)
            found[f"{path}.magnitude"] = (dw * v / norm).sum(-1)
            dw = layer.whole_magnitude().detach().double()[..., None] / norm * dw
        found[f"{path}.lora_A"] = layer.scaling * lora_B.mT @ dw
        found[f"{path}.lora_B"] = layer.scaling * dw @ lora_A.mT
    return found


def pack_as_shipped(directory: Path) -> dict[str, torch.Tensor]:
    """Have the experts of the gpt-oss in `directory` in MXFP4, as OpenAI ships them; returns the file's tensors."""
    path, config = directory / "model.safetensors", directory / "config.json"
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        codes, scales, _ = parts_of_weight(Weight(*quantize_4bit(tensors.pop(name).mT, quant_type="mxfp4")))
        tensors |= {f"{name}_blocks": codes, f"{name}_scales": scales.view(torch.uint8)}
    save_file(tensors, path, metadata={"format": "pt"})
    how = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": how}))
    return tensors


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The adapted linears of experts, by full name."""
    return {path: layer for path, layer in adapted_linears(model).items() if is_experts(layer.base)}
