"""A vision-language model: adapters on its language part, its vision part, both, beside PEFT's."""

import copy
import functools

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from modules import adapted_linears, attach, detach, load_adapter, merge, quantize, save_adapter
from tests.modules.architectures import scramble

IMAGE = 98  # the token that stands for a patch


@functools.cache
def _llava():
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=8,
        patch_size=4,
        projection_dim=32,
    )
    text = LlamaConfig(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    ).eval()


def llava():
    return copy.deepcopy(_llava())


@torch.no_grad()
def logits(model):
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return model(input_ids=torch.tensor([[5, *[IMAGE] * 4, 7, 8]]), pixel_values=pixels).logits


PARTS = {
    "language": (r".*language_model.*_proj", 14),
    "vision": (r".*vision_tower.*(_proj|fc\d)", 12),
    "both": ("all-linear", 14 + 12 + 2),  # with the projector between them
    "attention of both": (["q_proj", "v_proj"], 8),
}


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("part", PARTS)
def test_a_part(part, quantized, tmp_path):
    targets, count = PARTS[part]
    model = llava()
    if quantized:
        quantize(model)
    before = logits(model)
    names = attach(model, "dora", 4, 6, targets)
    assert len(names) == count and not any("lm_head" in name for name in names)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    scramble(model)
    expected = logits(model)
    assert (expected - before).abs().max() > 1e-3
    save_adapter(model, tmp_path)
    again = llava()
    if quantized:
        quantize(again)
    load_adapter(again, tmp_path)
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-5)
    if not quantized:
        theirs = PeftModel.from_pretrained(llava(), tmp_path).eval()
        torch.testing.assert_close(logits(theirs), expected, rtol=1e-4, atol=1e-5)
    merge(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    detach(model)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("part", PARTS)
def test_we_load_what_peft_saves(part, tmp_path):
    targets, count = PARTS[part]
    theirs = get_peft_model(llava(), LoraConfig(r=4, target_modules=targets)).eval()
    scramble(theirs)
    theirs.save_pretrained(tmp_path)
    model = llava()
    assert len(load_adapter(model, tmp_path)) == count
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=1e-5)


def test_each_part_may_have_its_own_method():
    model = llava()
    attach(model.model.language_model, "dora", 4)
    attach(model.model.vision_tower, "lora", 2)
    ranks = {name.split(".")[1]: layer.rank for name, layer in adapted_linears(model).items()}
    assert ranks == {"language_model": 4, "vision_tower": 2}


def test_names_that_end_alike_are_saved_apart(tmp_path):
    """A full name of the language part may be the end of one of the vision part: PEFT then needs a pattern."""
    model = llava()
    attach(model, "lora", 4, target_modules=r"model\.language_model\.layers\.0\.self_attn\.q_proj")
    scramble(model)
    save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(llava(), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-5)
