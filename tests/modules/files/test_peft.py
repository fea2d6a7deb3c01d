"""Adapters on disk: PEFT reads what we write, we read what PEFT writes, bad files are refused."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from modules import adapted_linears, adapters, attach, load_adapter, quantize, save_adapter, trainable_parameters
from modules.files.checked import SUMS
from tests.modules.architectures import dense_model, logits, scramble
from tests.modules.peft_cases import peft_model, refusal, saved
from tests.survey.small import build


@pytest.fixture
def base(llama):
    return llama.eval()


def trained(base, adapter="lora", target_modules="all-linear", **kwargs):
    """A copy of `base` with an adapter that changes its output."""
    model = copy.deepcopy(base)
    attach(model, adapter, rank=4, lora_alpha=6, target_modules=target_modules, **kwargs)
    torch.manual_seed(1)
    for linear in adapted_linears(model).values():
        nn.init.normal_(linear.lora_B, std=0.1)
        if adapter == "dora":
            nn.init.uniform_(linear.magnitude, 0.3, 0.9)
    return model.eval()


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"], r".*layers\.1\..*proj"], ids=str)
@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_peft_computes_the_same_logits(base, tmp_path, adapter, targets):
    model = trained(base, adapter, targets, dropout=0.1)
    save_adapter(model, tmp_path, "some/base")
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert (logits(model) - logits(base)).abs().max() > 1e-2
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "checksums.json",
    ]


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_a_file_of_peft_computes_the_same_logits(base, tmp_path, adapter):
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], use_dora=adapter == "dora", init_lora_weights=False
    )
    theirs = get_peft_model(copy.deepcopy(base), config).eval()
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    assert len(load_adapter(ours, tmp_path)) == 4
    torch.testing.assert_close(logits(ours.eval()), logits(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_round_trip_over_nf4_is_exact(base, tmp_path, adapter):
    packed = copy.deepcopy(base)
    quantize(packed)
    model = trained(packed, adapter)
    save_adapter(model, tmp_path)
    again = copy.deepcopy(packed)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again.eval()), logits(model))


def test_no_adapter_to_save(base, tmp_path):
    with pytest.raises(ValueError, match="the model has no adapter to save"):
        save_adapter(base, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def _damage(directory, how):
    weights, config = directory / "adapter_model.safetensors", directory / "adapter_config.json"
    (directory / SUMS).unlink()
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "no weights":
        weights.unlink()
    elif how == "no config":
        config.unlink()
    elif how == "not JSON":
        config.write_text("{")
    elif how == "another rank":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 3}))
    elif how == "other layers":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"target_modules": ["q_proj"]}))


@pytest.mark.parametrize(
    "how, message",
    [
        (
            "truncated",
            "adapter_model.safetensors is damaged or not a safetensors file: Error",
        ),
        ("no weights", "adapter_model.safetensors is missing"),
        ("no config", "adapter_config.json is missing"),
        ("not JSON", "holds no readable adapter"),
        (
            "another rank",
            r"adapter_config.json and adapter_model.safetensors disagree: model.layers.0.self_attn.q_proj has rank 3 "
            r"in the first and 4 in the second; \S+k_proj has .*; \S+v_proj has .*; … 14 in all",
        ),
        (
            "other layers",
            r"another model: model.layers.\S+lora_A.weight is in the file, but adapter_config.json puts no",
        ),
    ],
)
def test_damaged_adapters_are_refused(base, tmp_path, how, message):
    save_adapter(trained(base), tmp_path)
    _damage(tmp_path, how)
    with pytest.raises(ValueError, match=message):
        load_adapter(copy.deepcopy(base), tmp_path)


def test_embeddings_that_peft_saved_without_training(tmp_path):
    model = peft_model(dense_model("qwen3"), target_modules=["q_proj"])
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.1)
        model.get_output_embeddings().weight.add_(0.1)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    ours = dense_model("qwen3")
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-4, atol=1e-5)
    assert not any("embed" in name or "lm_head" in name for name in trainable_parameters(ours)), "they were not trained"


def test_a_classifier(tmp_path):
    def base():
        config = dense_model("llama").config  # which may draw numbers, when it is made first
        torch.manual_seed(0)
        config.num_labels, config.pad_token_id = 3, 0
        return LlamaForSequenceClassification(config).eval()

    model = peft_model(base(), task_type="SEQ_CLS", target_modules=["q_proj"])  # PEFT adds `score` to modules_to_save
    model.save_pretrained(tmp_path)
    ours = base()
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-4, atol=1e-5)
    save_adapter(ours, tmp_path / "ours")
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(base(), tmp_path / "ours").eval()), logits(model), rtol=1e-4, atol=1e-5
    )


def test_half_precision_files_are_read_to_fp32(tmp_path):
    model = peft_model(dense_model("llama")).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    ours = dense_model("llama")
    load_adapter(ours, tmp_path)
    for name, layer in adapted_linears(ours).items():
        saved = model.base_model.model.get_submodule(name).lora_A["default"].weight
        assert layer.lora_A.dtype == torch.float32 and torch.equal(layer.lora_A, saved.float())


def test_lora_on_an_embedding(tmp_path):
    saved(tmp_path, target_modules=["q_proj", "embed_tokens"])
    message = refusal(dense_model("qwen3"), tmp_path)
    assert "LoRA on an embedding is not supported: base_model.model.model.embed_tokens.lora_embedding_A" in message


def test_an_adapter_for_another_architecture(tmp_path):
    saved(tmp_path, "gpt2")
    layer = "transformer.h.0.attn.c_attn.lora_"
    assert refusal(dense_model("llama"), tmp_path) == (
        f"{tmp_path} is an adapter for another model: {layer}A.weight is not in the model; {layer}B.weight is not in "
        "the model; transformer.h.0.attn.c_proj.lora_A.weight is not in the model; … 16 in all"
    )


def test_an_adapter_on_a_linear_that_is_left_out(tmp_path):
    """PEFT puts one on a router that returns a pair."""
    peft_model(build("llama4_text"), target_modules=["q_proj", "router"]).save_pretrained(tmp_path)
    assert "feed_forward.router.lora_A.weight is in the file, but that linear gets no adapter: its class computes" in (
        refusal(build("llama4_text"), tmp_path)
    )


def test_an_adapter_for_another_size(tmp_path):
    saved(tmp_path, target_modules=["q_proj"])
    config = dense_model("llama").config
    config.hidden_size, config.head_dim = 32, 8
    layers = "model.layers.0.self_attn.q_proj.lora_", "model.layers.1.self_attn.q_proj.lora_"
    assert refusal(LlamaForCausalLM(config).eval(), tmp_path) == (
        f"{tmp_path} is an adapter for another model: {layers[0]}A.weight is [4, 64] in the file, [4, 32] in the "
        f"model; {layers[0]}B.weight is [64, 4] in the file, [32, 4] in the model; {layers[1]}A.weight is [4, 64] in "
        "the file, [4, 32] in the model; … 4 in all"
    )


def test_an_embedding_that_is_not_the_models(tmp_path):
    peft_model(dense_model("llama"), target_modules=["lm_head"]).save_pretrained(tmp_path)
    model = dense_model("llama")
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    assert "another model: lm_head.base_layer.weight differs from the model's weight" in refusal(model, tmp_path)


def test_the_active_adapter_stays_active_after_a_refusal(tmp_path):
    saved(tmp_path, "gpt2")
    model = dense_model("llama")
    attach(model, "lora", 4, modules_to_save=["lm_head"])
    scramble(model)
    refusal(model, tmp_path, name="other")
    assert adapters(model).keys() == {"default"}
    assert "the model has an adapter 'default' already" in refusal(model, tmp_path)


def test_directories_of_several(tmp_path):
    model = get_peft_model(dense_model("llama"), LoraConfig(r=4, target_modules=["q_proj"]))
    model.add_adapter("other", LoraConfig(r=3, target_modules=["k_proj"]))
    model.save_pretrained(tmp_path / "peft")  # "default" in the directory, "other" in a folder of it
    ours = dense_model("llama")
    message = refusal(ours, tmp_path / "peft")
    assert message == f"{tmp_path / 'peft'} holds several adapters: give name=, one of default, other"
    assert load_adapter(ours, tmp_path / "peft", "other") == [f"model.layers.{n}.self_attn.k_proj" for n in (0, 1)]
    assert load_adapter(ours, tmp_path / "peft", "default") == [f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)]
    assert "holds several adapters: give name=, one of default, other" in refusal(ours, tmp_path / "peft", name="third")

    (tmp_path / "one").mkdir()
    (tmp_path / "peft" / "other").rename(tmp_path / "one" / "other")
    only = dense_model("llama")
    assert len(load_adapter(only, tmp_path / "one")) == 2, "the only adapter there needs no name"
    assert load_adapter(only, tmp_path / "peft", "mine") == [f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)]


def test_pickles_are_not_read(tmp_path):
    peft_model(dense_model("llama")).save_pretrained(tmp_path, safe_serialization=False)
    message = refusal(dense_model("llama"), tmp_path)
    assert "adapter_model.safetensors is missing: adapter_model.bin is a pickle, which can run code" in message
    (tmp_path / "adapter_model.bin").rename(tmp_path / "adapter_model.safetensors")
    message = refusal(dense_model("llama"), tmp_path)
    assert f"{tmp_path / 'adapter_model.safetensors'} is damaged or not a safetensors file: Error" in message
    (tmp_path / "adapter_config.json").write_text("[1]")
    assert "holds no readable adapter: adapter_config.json: " in refusal(dense_model("llama"), tmp_path)


def test_a_tensor_that_is_missing(tmp_path):
    saved(tmp_path, modules_to_save=["lm_head"])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert "another model: model.layers.0.mlp.up_proj.lora_B.weight is not in the file" in refusal(
        dense_model("llama"), tmp_path
    )
    tensors["base_model.model.lm_head.weight"] = tensors["base_model.model.lm_head.weight"][:50]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert "lm_head.weight is [50, 64] in the file, [99, 64] in the model" in refusal(dense_model("llama"), tmp_path)
