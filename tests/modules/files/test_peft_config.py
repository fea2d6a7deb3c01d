"""PEFT's settings in files of both origins: the same logits, or a refusal by name."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from modules import adapters, attach, load_adapter, quantize, save_adapter, set_adapter, trainable_parameters
from tests.modules.architectures import bnb4_model, dense_model, logits, scramble
from tests.modules.peft_cases import peft_model, refusal, saved

# PEFT's names. Ours are the same except rank for r, rslora for use_rslora and dropout for lora_dropout.
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


@pytest.mark.parametrize("architecture, name, method", CELLS)
def test_we_load_what_peft_saves(architecture, name, method, tmp_path):
    model = peft_model(dense_model(architecture), use_dora=method == "dora", **ALL[name])
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
    model = peft_model(dense_model("llama"), **settings)
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


REFUSED = {
    "peft_type 'IA3' is not supported, only LORA and PROMPT_TUNING are": {"peft_type": "IA3"},
    "lora_bias=True is not supported": {"lora_bias": True},
    "target_parameters: mlp.experts.gate_up_proj matches no experts of the model": {
        "target_parameters": ["mlp.experts.gate_up_proj"]
    },
    "layer_replication=[[0, 2]] is not supported": {"layer_replication": [[0, 2]]},
    "trainable_token_indices=[1, 2] is not supported": {"trainable_token_indices": [1, 2]},
    "use_qalora=True is not supported": {"use_qalora": True},
    "a_key_of_tomorrow=1 is not supported": {"a_key_of_tomorrow": 1},
    "init_lora_weights='corda' is not supported": {"init_lora_weights": "corda"},
    "init_lora_weights='loftq' is not supported": {"init_lora_weights": "loftq"},
    # Begins with random numbers: PEFT itself loads another base than it trained.
    "init_lora_weights='pissa_niter_4' is not supported": {"init_lora_weights": "pissa_niter_4"},
    "rank=0 is not a rank": {"r": 0},
    "target_modules=None is not a list of suffixes": {"target_modules": None},
    "lora_alpha=x: choose a number above 0": {"lora_alpha": "x"},
}


@pytest.mark.parametrize("message, change", REFUSED.items(), ids=REFUSED)
def test_unsupported_settings_are_refused(message, change, tmp_path):
    config = saved(tmp_path)
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    assert refusal(dense_model("llama"), tmp_path).startswith(f"{tmp_path}: {message}")


def test_a_missing_setting(tmp_path):
    config = saved(tmp_path)
    config.write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    assert refusal(dense_model("llama"), tmp_path) == f"{tmp_path}: lora_alpha is missing"


def test_an_initialisation_that_packs_the_base_again(tmp_path):
    peft_model(bnb4_model("llama"), init_lora_weights="olora").save_pretrained(tmp_path)
    model = dense_model("llama")
    quantize(model)
    assert "init_lora_weights='olora' is not supported over NF4Linear" in refusal(model, tmp_path)
