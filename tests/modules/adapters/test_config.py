"""AdapterConfig: settings that it refuses, and its patterns beside PEFT's."""

import pytest
from peft.utils.other import get_pattern_key

from modules import AdapterConfig

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
def test_bad_values_are_refused(message, settings):
    with pytest.raises(ValueError) as error:
        AdapterConfig(**settings)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "adapter, settings, message",
    [
        ("bitfit", {"target_modules": ["q_proj"]}, r"target_modules=\['q_proj'\] is not a setting of adapter 'bitfit'"),
        ("houlsby", {"dropout": 0.1}, "dropout=0.1 is not a setting of adapter 'houlsby'"),
        ("lora", {"prefix_tokens": 2}, "prefix_tokens=2 is not a setting of adapter 'lora'"),
        ("prefix_embed", {}, "prefix_embed has no tokens: set prefix_tokens or infix_tokens to 1 or more"),
        ("prefix_layer", {"prefix_tokens": -1}, "prefix_tokens=-1: choose a whole number, 0 or more"),
        ("houlsby", {"rank": 0}, "rank=0 is not a rank"),
    ],
)
def test_settings_that_the_adapter_does_not_have_are_refused(adapter, settings, message):
    with pytest.raises(ValueError, match=message):
        AdapterConfig(adapter, **settings)


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
