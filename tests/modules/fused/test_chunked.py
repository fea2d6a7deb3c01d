"""MLPs in parts: the results and gradients of transformers' own code, and which modules are no such MLP."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from modules import attach, quantize, unfuse
from modules.fused import compute_mlps_in_parts
from modules.fused.chunked import ChunkedMLP
from tests.modules.fused.models import assert_computes_the_same, ids

WIDTHS = {"vocab_size": 101, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = WIDTHS | {"intermediate_size": 192}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT2 = {"vocab_size": 101, "n_embd": 64, "n_layer": 2, "n_head": 4}
MPT = {"vocab_size": 101, "d_model": 64, "n_layers": 2, "n_heads": 4}
MODELS = {
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gptj": GPT2 | {"rotary_dim": 8},
    "mpt": MPT,
    "bloom": {"vocab_size": 101, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "falcon": WIDTHS,
    "phi": WIDE,
    "phi3": WIDE,
    "gpt_neox": WIDE,
    "starcoder2": WIDE | {"num_key_value_heads": 2},
    "nemotron": WIDE | {"num_key_value_heads": 2},
}
INLINE = {  # layers that have the linears of their MLP beside other things
    "opt": WIDTHS | {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "biogpt": WIDE | {"hidden_dropout_prob": 0.0, "activation_dropout": 0.0, "attention_probs_dropout_prob": 0.0},
    "xglm": {"vocab_size": 101, "d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 128}
    | {"activation_dropout": 0.0},
}
MODELS |= INLINE
NONE = {
    "biogpt with dropout": WIDE | {"activation_dropout": 0.1},
    "mamba": WIDTHS,
}


def made(name: str, **settings) -> nn.Module:
    torch.manual_seed(0)
    given = MODELS.get(name) or NONE[name]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name.partition(" ")[0], **given | SPECIAL | settings))
    return model.train()


def draws_nothing(model: nn.Module) -> nn.Module:
    """The model without its own dropout."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_an_mlp_that_is_not_gated(name):
    theirs = draws_nothing(made(name))
    ours = copy.deepcopy(theirs)
    before = [(path, type(module)) for path, module in ours.named_modules()]
    assert len(compute_mlps_in_parts(ours, 4)) == 2
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_computes_the_same(ours, theirs)
    assert_computes_the_same(pickle.loads(pickle.dumps(ours)), theirs)
    unfuse(ours)
    assert [(path, type(module)) for path, module in ours.named_modules()] == before


@pytest.mark.parametrize("adapter", ["lora", "dora", "houlsby"])
@pytest.mark.parametrize("name", ["gpt2", "bloom", "phi", "opt"])
def test_with_packed_weights_and_adapters(name, adapter):
    theirs = draws_nothing(made(name))
    quantize(theirs)
    attach(theirs, adapter, 4)
    with torch.no_grad():
        for path, parameter in theirs.named_parameters():
            if path.endswith(("lora_B", "adapter_up")):
                parameter.normal_(std=0.1)
    ours = copy.deepcopy(theirs)
    assert len(compute_mlps_in_parts(ours, 4)) == 2
    assert_computes_the_same(ours, theirs)


def test_backward_has_the_masks_of_the_models_own_dropout():
    """With the same masks in both passes the gradient is that of the loss: against a difference quotient."""
    model = made("gpt2", resid_pdrop=0.3, attn_pdrop=0.0, embd_pdrop=0.0).double()
    compute_mlps_in_parts(model, 4)
    mlp = model.transformer.h[1].mlp
    assert isinstance(mlp, ChunkedMLP) and mlp.random

    def loss(bias: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(2)
        with torch.no_grad():
            mlp.c_fc.bias.copy_(bias)
        return model(input_ids=ids()).logits.square().mean()

    bias, step = mlp.c_fc.bias.detach().clone(), 1e-5
    direction = torch.randn_like(bias)
    loss(bias).backward()
    quotient = (loss(bias + step * direction) - loss(bias - step * direction)) / (2 * step)
    torch.testing.assert_close(mlp.c_fc.bias.grad @ direction, quotient, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["gpt2", *INLINE])
def test_less_is_alive_at_a_time(name):
    model = draws_nothing(made(name))
    compute_mlps_in_parts(model, 4)
    rows = []
    for path, module in model.named_modules():
        if path.endswith(("fc1", "c_fc")):
            module.register_forward_hook(lambda _, args, output: rows.append(output.shape[0]))
    model(input_ids=ids()).logits.sum().backward()
    assert max(rows) == 4 and sum(rows) == 2 * 2 * 18  # two layers, computed twice


@pytest.mark.parametrize("name", NONE)
def test_what_is_no_such_mlp_stays(name):
    model = made(name)
    assert compute_mlps_in_parts(model, 4) == [] and not any(isinstance(one, ChunkedMLP) for one in model.modules())


def test_a_module_whose_tokens_change_one_another_stays():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

        def forward(self, x):
            return self.down(self.up(x).relu().cumsum(-2))

    assert compute_mlps_in_parts(nn.Sequential(Mixer()), 4) == []
