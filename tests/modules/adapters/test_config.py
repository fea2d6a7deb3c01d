"""AdapterConfig: what it refuses, and how its patterns are read beside PEFT's."""

import pytest
from peft.utils.other import get_pattern_key

from modules import AdapterConfig, attach
from tests.modules.architectures import dense_model

REFUSED = {
    "rank=3 is odd: init=orthogonal needs an even rank": {"rank": 3, "init": "orthogonal"},
    "rank of q_proj=0 is not a rank: choose a whole number, 1 or more": {"rank_pattern": {"q_proj": 0}},
    "rank of q_proj=True is not a rank": {"rank_pattern": {"q_proj": True}},
    "rank_pattern=8 is not a mapping of names: give it as {q_proj: 8}": {"rank_pattern": 8},
    "rank_pattern='(' is not a regular expression: missing )": {"rank_pattern": {"(": 8}},
    "lora_alpha=0: choose a number above 0": {"lora_alpha": 0},
    "lora_alpha of q_proj=x: choose a number above 0": {"alpha_pattern": {"q_proj": "x"}},
    "dropout=1: choose a number from 0 to below 1": {"dropout": 1},
    "bias='some' is not one of none, lora_only, all": {"bias": "some"},
    "target_modules=3 is not a list of suffixes or a regular expression": {"target_modules": 3},
    "exclude_modules='[' is not a regular expression: unterminated": {"exclude_modules": "["},
    "modules_to_save='lm_head' is not a list of suffixes": {"modules_to_save": "lm_head"},
}


@pytest.mark.parametrize("message, settings", REFUSED.items(), ids=REFUSED)
def test_what_no_adapter_can_have(message, settings):
    with pytest.raises(ValueError) as error:
        AdapterConfig(**settings)
    assert str(error.value).startswith(message)


UNFIT = {
    "v_prj of target_modules matches no linear of the model": {"target_modules": ["q_proj", "v_prj"]},
    "rank_pattern: qproj matches no adapted linear": {"rank_pattern": {"qproj": 2}},
    "alpha_pattern: q_proj matches no adapted linear that an earlier key does not match": {
        "alpha_pattern": {".*": 2, "q_proj": 3}
    },
    "rank 65 is out of range: model.layers.0.self_attn.q_proj can have 1 to 64": {"rank_pattern": {"q_proj": 65}},
    "exclude_modules=['qproj'] matches none of the target modules": {"exclude_modules": ["qproj"]},
    "exclude_modules and modules_to_save leave no linear to put an adapter on": {"exclude_modules": ".*"},
    "modules_to_save: the model has no module head": {"modules_to_save": ["head"]},
}


@pytest.mark.parametrize("message, settings", UNFIT.items(), ids=UNFIT)
def test_what_a_model_cannot_have(message, settings):
    model = dense_model("llama")
    with pytest.raises(ValueError) as error:
        attach(model, "lora", **{"rank": 4} | settings)
    assert str(error.value).startswith(message)
    assert all(parameter.requires_grad for parameter in model.parameters()), "the model is unchanged"


@pytest.mark.parametrize(
    "pattern",
    [
        {"q_proj": 2},
        {"layers.1.self_attn.q_proj": 2, "q_proj": 4},
        {r"^model\.layers\.0\..*": 2},
        {".*_proj": 2},
        {"proj": 2},
    ],
    ids=str,
)
def test_patterns_are_read_as_peft_reads_them(pattern):
    config = AdapterConfig(rank=9, rank_pattern=pattern, alpha_pattern=pattern)
    for layer in range(12):
        for suffix in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"):
            name = f"model.layers.{layer}.{suffix}"
            assert config.rank_of(name) == pattern.get(get_pattern_key(pattern.keys(), name), 9)
            assert config.lora_alpha_of(name) == pattern.get(get_pattern_key(pattern.keys(), name), 18)
