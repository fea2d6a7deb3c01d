"""Find the linears of a model and select those that settings name."""

import pytest
from torch import nn

from modules import attach, decoder_linears, detach
from modules.adapters.targets import decoder_blocks, match_targets, sublayer_ends
from tests.modules.architectures import ARCHITECTURES, dense_model


def test_decoder_linears_leave_out_the_head(llama):
    names = decoder_linears(llama)
    assert len(names) == 14 and not any("lm_head" in name for name in names)


def test_a_suffix_means_whole_parts_of_a_name():
    assert match_targets(["a.up_proj", "a.pup_proj", "up_proj"], ["up_proj"]) == ["a.up_proj", "up_proj"]


def test_attention_that_reads_its_weight_is_left_out():
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    assert attach(model, "lora", 2) == ["1"]


def test_houlsby_sits_where_the_residual_is_added():
    """What ends the attention and the MLP, as each architecture names it."""
    ends = {a: [n.split(".", 3)[-1] for n in sublayer_ends(dense_model(a))][:2] for a in ARCHITECTURES}
    llama = ["self_attn.o_proj", "mlp.down_proj"]
    assert ends.pop("gpt2") == ["attn.c_proj", "mlp.c_proj"]
    assert [name.removeprefix("0.") for name in ends.pop("opt")] == ["self_attn.out_proj", "fc2"]
    assert all(found == llama for found in ends.values())
    model = dense_model("llama")
    assert attach(model, "houlsby", rank=2, target_modules=["down_proj"]) == [
        f"{b}.mlp.down_proj" for b in decoder_blocks(model)[1]
    ]
    detach(model)
    del model.model.layers[1].mlp
    with pytest.raises(
        ValueError, match=r"model.layers.1 must have an attention and an MLP .* has self_attn.o_proj: name"
    ):
        attach(model, "houlsby", rank=2)


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
def test_settings_that_do_not_fit_the_model_are_refused(message, settings):
    model = dense_model("llama")
    with pytest.raises(ValueError) as error:
        attach(model, "lora", **{"rank": 4} | settings)
    assert str(error.value).startswith(message)
    assert all(parameter.requires_grad for parameter in model.parameters()), "the model is unchanged"
