"""PEFT's settings beyond the plain ones, in files of both origins: the same logits, or a refusal by name."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from modules import (
    adapted_linears,
    adapters,
    attach,
    load_adapter,
    quantize,
    save_adapter,
    set_adapter,
    trainable_parameters,
)
from tests.modules.architectures import bnb4_model, dense_model, logits, scramble

# What both sides call by the same name but for rank/r, rslora/use_rslora, dropout/lora_dropout.
SETTINGS = {
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 7},
        "alpha_pattern": {"v_proj": 3, "up_proj": 20},
    },
    "patterns and rslora": {"rank_pattern": {"k_proj": 9}, "alpha_pattern": {"k_proj": 3}, "use_rslora": True},
    "exclusion": {"exclude_modules": ["v_proj", "0.mlp.up_proj"]},
    "exclusion by regex": {"exclude_modules": r".*\.0\..*"},
    "modules to save": {"modules_to_save": ["lm_head", "embed_tokens"], "target_modules": ["q_proj"]},
    "a container to save": {"modules_to_save": ["layers.1.mlp"]},
    "a norm to save": {"modules_to_save": ["model.norm"], "target_modules": ["q_proj"]},
    "dropout": {"lora_dropout": 0.3},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "more rank than the layer has": {"r": 70, "target_modules": ["k_proj"]},
}
BIAS = {"lora_only": {"bias": "lora_only"}, "all": {"bias": "all"}}
ALL = SETTINGS | BIAS
CELLS = [("llama", name, "lora") for name in SETTINGS] + [(a, name, "lora") for a in ("opt", "gpt2") for name in BIAS]
CELLS += [("llama", name, "dora") for name in ("patterns and rslora", "dropout", "head")] + [("opt", "all", "dora")]


def theirs(base, **settings):
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | settings)
    model = get_peft_model(base, config).eval()
    scramble(model)
    return model


@pytest.mark.parametrize("architecture, name, method", CELLS)
def test_we_load_what_peft_saves(architecture, name, method, tmp_path):
    model = theirs(dense_model(architecture), use_dora=method == "dora", **ALL[name])
    model.save_pretrained(tmp_path)
    ours = dense_model(architecture)
    before = logits(ours)
    load_adapter(ours, tmp_path)
    assert (logits(ours) - before).abs().max() > 1e-3
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-4, atol=1e-5)
    trained = sum(p.numel() for p in trainable_parameters(ours).values())
    assert trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    set_adapter(ours, None)
    assert torch.equal(logits(ours), before), "biases and modules are the adapter's own"


@pytest.mark.parametrize(
    "architecture, name, method", [cell for cell in CELLS if cell[1] != "more rank than the layer has"]
)
def test_peft_loads_what_we_save(architecture, name, method, tmp_path):
    model = dense_model(architecture)
    names = {"r": "rank", "use_rslora": "rslora", "lora_dropout": "dropout"}
    settings = {names.get(key, key): value for key, value in ALL[name].items()}
    attach(model, method, **{"rank": 4, "lora_alpha": 6, "init": "pissa" if "rslora" in name else "default"} | settings)
    scramble(model)
    save_adapter(model, tmp_path)
    other = PeftModel.from_pretrained(dense_model(architecture), tmp_path).eval()
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-4, atol=1e-5)
    again = dense_model(architecture)
    load_adapter(again, tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)
    assert adapters(again)["default"].rslora == adapters(model)["default"].rslora


@pytest.mark.parametrize("pattern", [None, "layers"])
def test_layers_to_transform(pattern, tmp_path):
    settings = {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": pattern}
    model = theirs(dense_model("llama"), **settings)
    model.save_pretrained(tmp_path)
    ours = dense_model("llama")
    assert load_adapter(ours, tmp_path) == ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-4, atol=1e-5)


def test_pissa_that_peft_converted_is_plain(tmp_path):
    model = get_peft_model(dense_model("llama"), LoraConfig(r=4, lora_alpha=6, init_lora_weights="pissa")).eval()
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    scramble(model)
    model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    ours = dense_model("llama")
    load_adapter(ours, tmp_path / "end")
    assert adapters(ours)["default"].rank == 8
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-4, atol=1e-5)


def test_embeddings_that_peft_saved_unasked(tmp_path):
    model = theirs(dense_model("qwen3"), target_modules=["q_proj"])
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.1)
        model.get_output_embeddings().weight.add_(0.1)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    ours = dense_model("qwen3")
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-4, atol=1e-5)
    assert not any("embed" in name or "lm_head" in name for name in trainable_parameters(ours)), "nobody trained them"


def test_a_classifier(tmp_path):
    def base():
        torch.manual_seed(0)
        config = dense_model("llama").config
        config.num_labels, config.pad_token_id = 3, 0
        return LlamaForSequenceClassification(config).eval()

    model = theirs(base(), task_type="SEQ_CLS", target_modules=["q_proj"])  # PEFT adds `score` to modules_to_save
    model.save_pretrained(tmp_path)
    ours = base()
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-4, atol=1e-5)
    save_adapter(ours, tmp_path / "ours")
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(base(), tmp_path / "ours").eval()), logits(model), rtol=1e-4, atol=1e-5
    )


def test_half_precision_files_are_read_to_fp32(tmp_path):
    model = theirs(dense_model("llama")).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    ours = dense_model("llama")
    load_adapter(ours, tmp_path)
    for name, layer in adapted_linears(ours).items():
        saved = model.base_model.model.get_submodule(name).lora_A["default"].weight
        assert layer.lora_A.dtype == torch.float32 and torch.equal(layer.lora_A, saved.float())


# ------------------------------------------------------------------------------------ refused

REFUSED = {
    "peft_type 'IA3' is not supported, only LORA and PROMPT_TUNING are": {"peft_type": "IA3"},
    "lora_bias=True is not supported": {"lora_bias": True},
    "target_parameters=['mlp.experts.gate_up_proj'] is not supported": {
        "target_parameters": ["mlp.experts.gate_up_proj"]
    },
    "layer_replication=[[0, 2]] is not supported": {"layer_replication": [[0, 2]]},
    "trainable_token_indices=[1, 2] is not supported": {"trainable_token_indices": [1, 2]},
    "use_qalora=True is not supported": {"use_qalora": True},
    "a_key_of_tomorrow=1 is not supported": {"a_key_of_tomorrow": 1},
    "init_lora_weights='corda' is not supported": {"init_lora_weights": "corda"},
    "init_lora_weights='loftq' is not supported": {"init_lora_weights": "loftq"},
    "rank=0 is not a rank": {"r": 0},
    "target_modules=None is not a list of suffixes": {"target_modules": None},
    "lora_alpha=x: choose a number above 0": {"lora_alpha": "x"},
}


def saved(tmp_path, architecture="llama", **settings):
    theirs(dense_model(architecture), **settings).save_pretrained(tmp_path)
    return tmp_path / "adapter_config.json"


def refusal(model, directory, **kwargs) -> str:
    """What load_adapter says; `model` is as before."""
    before, plain = logits(model), dict(model.named_parameters())
    with pytest.raises(ValueError) as error:
        load_adapter(model, directory, **kwargs)
    assert torch.equal(logits(model), before) and dict(model.named_parameters()).keys() == plain.keys()
    assert all(parameter is plain[name] for name, parameter in model.named_parameters())
    return str(error.value)


@pytest.mark.parametrize("message, change", REFUSED.items(), ids=REFUSED)
def test_what_cannot_be_represented(message, change, tmp_path):
    config = saved(tmp_path)
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    assert refusal(dense_model("llama"), tmp_path).startswith(f"{tmp_path}: {message}")


def test_a_missing_setting(tmp_path):
    config = saved(tmp_path)
    config.write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    assert refusal(dense_model("llama"), tmp_path) == f"{tmp_path}: lora_alpha is missing"


def test_lora_on_an_embedding(tmp_path):
    saved(tmp_path, target_modules=["q_proj", "embed_tokens"])
    message = refusal(dense_model("qwen3"), tmp_path)
    assert "LoRA on an embedding is not supported: base_model.model.model.embed_tokens.lora_embedding_A" in message


def test_an_initialisation_that_packs_the_base_again(tmp_path):
    theirs(bnb4_model("llama"), init_lora_weights="olora").save_pretrained(tmp_path)
    model = dense_model("llama")
    quantize(model)
    assert "init_lora_weights='olora' is not supported over NF4Linear" in refusal(model, tmp_path)


def test_an_adapter_for_another_architecture(tmp_path):
    saved(tmp_path, "gpt2")
    layer = "transformer.h.0.attn.c_attn.lora_"
    assert refusal(dense_model("llama"), tmp_path) == (
        f"{tmp_path} is an adapter for another model: {layer}A.weight is not in the model; {layer}B.weight is not in "
        "the model; transformer.h.0.attn.c_proj.lora_A.weight is not in the model; … 16 in all"
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
    theirs(dense_model("llama"), target_modules=["lm_head"]).save_pretrained(tmp_path)
    model = dense_model("llama")
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    assert "another model: lm_head.base_layer.weight differs from the model's weight" in refusal(model, tmp_path)


def test_what_was_shown_stays_shown_after_a_refusal(tmp_path):
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
    theirs(dense_model("llama")).save_pretrained(tmp_path, safe_serialization=False)
    message = refusal(dense_model("llama"), tmp_path)
    assert "adapter_model.safetensors is missing: adapter_model.bin is a pickle, which can run code" in message
    (tmp_path / "adapter_model.bin").rename(tmp_path / "adapter_model.safetensors")
    message = refusal(dense_model("llama"), tmp_path)
    assert "holds no readable adapter: adapter_model.safetensors is damaged or not a safetensors file: Error" in message
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
