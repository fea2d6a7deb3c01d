"""BitFit and Houlsby's adapters: what trains, what they compute, over packed weights, merged, on disk, refused."""

import json

import pytest
import torch
from torch.nn import functional as F

from modules import (
    AdapterConfig,
    attach,
    detach,
    load_adapter,
    merge,
    quantize,
    save_adapter,
    set_adapter,
    trainable_parameters,
    unmerge,
)
from modules.adapters.targets import all_linears, decoder_blocks, sublayer_ends
from modules.files.baselines import OUR_CONFIG_FILE
from modules.files.bitsandbytes import save_bnb4
from modules.linear import dense_weight
from tests.modules.architectures import ARCHITECTURES, IDS, dense_model, logits, scramble

SETTINGS = {
    "bitfit": {},
    "houlsby": {"rank": 3, "rank_pattern": {"layers.1.self_attn.o_proj": 5}},
    "prefix_embed": {"prefix_tokens": 3, "infix_tokens": 2},
    "prefix_layer": {"prefix_tokens": 3},
}


def adapted(architecture: str, adapter: str, packed: bool = False, **settings):
    model = dense_model(architecture)
    if packed:
        quantize(model)
    torch.manual_seed(0)
    attach(model, adapter, **settings)
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bitfit_trains_the_biases_and_nothing_else(architecture):
    model = dense_model(architecture)
    biases = {name: p.clone() for name, p in model.named_parameters() if name.endswith(".bias")}
    without = logits(model)
    attach(model, "bitfit")
    assert torch.equal(logits(model), without)
    trained = trainable_parameters(model)
    if biases:
        assert trained.keys() == biases.keys()
        assert all(torch.equal(trained[name], biases[name]) for name in biases)
    else:
        linears = [name for name, linear in all_linears(model).items() if linear is not model.lm_head]
        assert trained.keys() == {f"{name}.bias" for name in linears}
        assert not any(p.any() for p in trained.values())
    scramble(model)
    learned = logits(model)
    assert (learned - without).abs().max() > 1e-2
    merge(model)
    assert torch.equal(logits(model), learned) and not trainable_parameters(model)
    unmerge(model)
    detach(model)
    assert torch.equal(logits(model), without)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "nf4"])
def test_bitfit_gives_a_linear_a_bias(packed):
    """Over bf16 weights the bias is fp32, and what is computed is xWᵀ + b in bf16."""
    model = dense_model("llama").bfloat16()
    if packed:
        quantize(model)
    base = model.model.layers[0].mlp.up_proj
    weight = dense_weight(base) if packed else base.weight
    attach(model, "bitfit")
    ours = model.model.layers[0].mlp.up_proj
    [bias] = [p for p in ours.parameters() if p.dim() == 1]
    assert bias.dtype == torch.float32 and bias.requires_grad and base.bias is None
    with torch.no_grad():
        bias.copy_(torch.linspace(-1, 1, len(bias)))
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    expected = x.double() @ weight.double().t() + bias.double()
    assert ours(x).dtype == torch.bfloat16
    torch.testing.assert_close(ours(x).double(), expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "nf4"])
def test_houlsby_is_the_papers_network_behind_attention_and_mlp(architecture, packed):
    model = dense_model(architecture)
    if packed:
        quantize(model)
    without, d, r = logits(model), 64, 3
    torch.manual_seed(0)
    names = attach(model, "houlsby", rank=r)
    assert len(names) == 4 and torch.equal(logits(model), without)
    assert sum(p.numel() for p in trainable_parameters(model).values()) == 4 * (2 * d * r + r + d)
    scramble(model)
    found = logits(model)
    weights = {name: {k: p.double() for k, p in model.get_submodule(name).own_parameters().items()} for name in names}
    detach(model)
    assert torch.equal(logits(model), without)

    def network(w):
        def hook(_, args, h):
            down = F.gelu(h.double() @ w["adapter_down"].T + w["adapter_down_bias"])
            return (h.double() + down @ w["adapter_up"].T + w["adapter_up_bias"]).to(h.dtype)

        return hook

    for name, w in weights.items():
        model.get_submodule(name).register_forward_hook(network(w))
    torch.testing.assert_close(found, logits(model), rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize("adapter", SETTINGS)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "nf4"])
def test_on_disk_and_back(adapter, packed, tmp_path):
    model = adapted("llama", adapter, packed, **SETTINGS[adapter])
    scramble(model)
    save_adapter(model, tmp_path, base_model_name="base")
    assert json.loads((tmp_path / OUR_CONFIG_FILE).read_text())["adapter"] == adapter
    again = dense_model("llama")
    if packed:
        quantize(again)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
    mine, theirs = trainable_parameters(model), trainable_parameters(again)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    other = dense_model("opt")
    with pytest.raises(ValueError, match=r"adapter for another model|matches no adapted linear"):
        load_adapter(other, tmp_path)
    assert not trainable_parameters(other).keys() ^ dict(other.named_parameters()).keys()


def test_they_take_turns_with_others_on_one_base():
    model = dense_model("llama")
    without, found = logits(model), {}
    for adapter, settings in {"lora": {"rank": 2}, **SETTINGS}.items():
        attach(model, adapter, name=adapter, **settings)
        scramble(model)
        found[adapter] = logits(model)
    for adapter in reversed(list(found)):
        set_adapter(model, adapter)
        assert torch.equal(logits(model), found[adapter]), adapter
        set_adapter(model, None)
        assert torch.equal(logits(model), without)
    detach(model)
    assert torch.equal(logits(model), without) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("architecture", ("llama", "opt"))
def test_packing_after_attaching(architecture):
    """OPT's MLP is linears of the block itself, which a prefix puts another in the place of."""
    for adapter in ("houlsby", "prefix_layer"):
        settings = {"prefix_tokens": 3} if adapter == "prefix_layer" else {"rank": 3}
        model = adapted(architecture, adapter, **settings)
        quantize(model)
        expected = adapted(architecture, adapter, packed=True, **settings)
        if adapter == "prefix_layer":  # it starts with activations, which packing changes
            for p, q in zip(trainable_parameters(model).values(), trainable_parameters(expected).values()):
                q.data.copy_(p)
        assert torch.equal(logits(model), logits(expected))
        detach(model), detach(expected)
        assert torch.equal(logits(model), logits(expected))


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
def test_bad_settings(adapter, settings, message):
    with pytest.raises(ValueError, match=message):
        AdapterConfig(adapter, **settings)


def test_what_cannot_be_done_with_them(tmp_path):
    for adapter in ("houlsby", "prefix_layer"):
        model = adapted("llama", adapter, packed=True, **({"prefix_tokens": 1} if "prefix" in adapter else {"rank": 2}))
        with pytest.raises(ValueError, match=f"is {adapter}, which cannot be merged"):
            merge(model)
        with pytest.raises(ValueError, match="the model has adapters, which a bitsandbytes directory cannot hold"):
            save_bnb4(model, tmp_path / "out")
    save_adapter(model, tmp_path)
    raw = json.loads((tmp_path / OUR_CONFIG_FILE).read_text())
    for change, message in (
        ({"rank": 4}, "rank is not a setting of adapter 'prefix_layer'"),
        ({"adapter": "ia3"}, "is not a setting of adapter 'ia3'"),
    ):
        (tmp_path / OUR_CONFIG_FILE).write_text(json.dumps(raw | change))
        with pytest.raises(ValueError, match=message):
            load_adapter(dense_model("llama"), tmp_path)
    model(IDS)
