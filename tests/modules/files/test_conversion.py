"""Packed models whose files name, join or split tensors otherwise than memory does: read by us and by transformers."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from modules import decoder_linears, quantize
from modules.adapters.state import replace_module
from modules.experts import NF4Experts
from modules.files.bitsandbytes import by_definition, load_bnb4, save_bnb4
from modules.files.checked import SUMS
from modules.mixtures import give_back_experts
from tests.survey.small import build

IDS = torch.arange(3, 23).unsqueeze(0)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def pack_but_experts(model):
    """bitsandbytes packs no experts."""
    quantize(model)
    for name, linear in decoder_linears(model).items():
        if isinstance(linear, NF4Experts):
            replace_module(model, name, linear.dequantize())
    give_back_experts(model)


@pytest.mark.parametrize(
    "model_type, other_name",
    [("qwen3_moe", ".experts.0.gate_proj."), ("gpt_neox", "embed_out"), ("gemma3", "language_model.model.")],
)
def test_of_our_own(tmp_path, model_type, other_name):
    model = build(model_type)
    pack_but_experts(model)
    save_bnb4(model, tmp_path / "packed")
    assert any(other_name in name for name in load_file(tmp_path / "packed" / "model.safetensors"))
    assert torch.equal(logits(load_bnb4(tmp_path / "packed")), logits(model))
    theirs = by_definition(AutoModelForCausalLM.from_pretrained(tmp_path / "packed"))
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-4)


def test_of_transformers(tmp_path):
    build("qwen3_moe").save_pretrained(tmp_path / "dense")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "packed")
    ours = load_bnb4(tmp_path / "packed")
    torch.testing.assert_close(logits(ours), logits(by_definition(theirs)), rtol=1e-4, atol=1e-4)


def test_an_expert_that_is_missing_is_named(tmp_path):
    model = build("qwen3_moe")
    pack_but_experts(model)
    save_bnb4(model, tmp_path / "packed")
    path = tmp_path / "packed" / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if "layers.1.mlp.experts.3.down_proj" not in name}
    save_file(kept, path, metadata={"format": "pt"})
    (tmp_path / "packed" / SUMS).unlink()
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts.down_proj is float32 \[3, 64, 32\]; the model needs"):
        load_bnb4(tmp_path / "packed")
