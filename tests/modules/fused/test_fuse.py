"""Fused models: their own results, names and state; every order of fuse, quantize, attach and their inverses."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from modules import attach, decoder_linears, detach, fuse, merge, quantize, set_adapter, unfuse, unmerge
from modules.fused.mlp import FusedMLP, _Gated, fused_mlp
from modules.fused.module import Fused
from modules.fused.rms_norm import FusedRMSNorm, fused_rms_norm
from tests.kernels.op_cases import assert_as_accurate, with_gradients
from tests.modules.fused.models import (
    adapted,
    assert_computes_the_same,
    ids,
    loss_and_gradients,
    pair,
    small,
)

PER_LAYER = 3  # two norms and an MLP


def fused_parts(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Fused)]


def snapshot(model: nn.Module) -> list:
    """Names, classes and identities: everything that unfuse has to give back."""
    return [
        [(name, type(module)) for name, module in model.named_modules()],
        [(name, id(parameter)) for name, parameter in model.named_parameters()],
        [(name, id(buffer)) for name, buffer in model.named_buffers()],
        list(model.state_dict()),
        str(model),
        model.config._attn_implementation,
    ]


# ------------------------------------------------------------------------------------------ a fused model


@pytest.mark.parametrize("model_class", [LlamaForCausalLM, Qwen3ForCausalLM], ids=lambda c: c.__name__)
def test_of_a_model(model_class):
    theirs = small(model_class, Qwen3Config) if model_class is Qwen3ForCausalLM else small()
    ours = copy.deepcopy(theirs)
    replaced = fuse(ours)
    norms = 4 if model_class is Qwen3ForCausalLM else 2  # Qwen3 has two of queries and keys
    assert sorted(replaced) == sorted(fused_parts(ours))
    assert len(replaced) == 2 * (norms + 1) + 1
    assert {type(module) for module in ours.modules() if isinstance(module, Fused)} == {FusedRMSNorm, FusedMLP}
    assert fuse(ours) == []
    losses = []
    for model in (theirs, ours, copied := copy.deepcopy(ours)):
        quantize(model)
        torch.manual_seed(1)
        attach(model, "dora", 4)
        loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1:], losses[:1] * 2, rtol=1e-5, atol=0)
    for model in (ours, copied):
        assert model.model.norm._parameters["weight"] is model.get_parameter("model.norm.weight")
        for have, want in zip(model.parameters(), theirs.parameters()):
            if want.requires_grad:
                torch.testing.assert_close(have.grad, want.grad, rtol=1e-4, atol=1e-6)


def test_names_parameters_and_state_stay():
    model = small()
    before = snapshot(model)
    linears = list(decoder_linears(model))
    fuse(model)
    after = snapshot(model)
    assert [name for name, _ in after[0]] == [name for name, _ in before[0]] and after[1:4] == before[1:4]
    assert list(decoder_linears(model)) == linears
    assert model.model.layers[0].mlp.hidden_size == 64  # its other attributes too
    assert "FusedRMSNorm((64,), eps=1e-06)" in str(model)


def test_compiles():
    model = small()
    fuse(model)
    attach(model, "dora", 4)
    fuse(model)
    compiled = torch.compile(model.train(), backend="aot_eager", fullgraph=True)
    got, want = (run(input_ids=ids(), use_cache=False).logits for run in (compiled, model))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    model, fused = pair("dora")
    fuse(fused)
    for one in (model, fused):
        one.gradient_checkpointing_enable({"use_reentrant": reentrant})
        one.enable_input_require_grads()
    assert_computes_the_same(fused, model)


def test_generation_with_a_cache():
    model = adapted("dora").eval()
    text = model.generate(ids(), max_new_tokens=6, do_sample=False, pad_token_id=0)
    fuse(model)
    assert torch.equal(model.generate(ids(), max_new_tokens=6, do_sample=False, pad_token_id=0), text)


def test_saved_and_moved(tmp_path):
    model = small()
    before = model(input_ids=ids()).logits
    fuse(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path).eval()(input_ids=ids()).logits, before)
    model.to(torch.bfloat16)
    assert model.model.norm.weight.dtype == torch.bfloat16
    unfuse(model.train())
    assert model.model.norm.weight.dtype == torch.bfloat16 and model.model.norm.training
    norm = FusedRMSNorm(LlamaRMSNorm(8))
    assert torch.equal(pickle.loads(pickle.dumps(norm)).weight, norm.weight)


def test_a_norm_that_is_there_twice_is_one_again():
    model = small()
    model.model.layers[0].post_attention_layernorm = model.model.layers[0].input_layernorm
    model.model.norm = model.model.layers[1].input_layernorm
    fuse(model)
    assert model.model.layers[0].post_attention_layernorm is model.model.layers[0].input_layernorm
    assert model.model.norm is model.model.layers[1].input_layernorm and isinstance(model.model.norm, FusedRMSNorm)
    unfuse(model)
    assert model.model.norm is model.model.layers[1].input_layernorm and type(model.model.norm) is LlamaRMSNorm


# ------------------------------------------------------------------------------------------ what is left alone


def test_what_computes_something_else_is_left_alone():
    model = small(Gemma2ForCausalLM, Gemma2Config)  # its norms multiply with 1 + w
    assert [name for name in fuse(model) if "norm" in name] == []


def test_gpt2_has_nothing_to_fuse():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=101)).eval()
    want, before = model(input_ids=ids()).logits, snapshot(model)
    assert fuse(model) == []
    torch.testing.assert_close(model(input_ids=ids()).logits, want, rtol=1e-4, atol=1e-5)
    unfuse(model)
    assert snapshot(model) == before and torch.equal(model(input_ids=ids()).logits, want)


class _Scaled(LlamaMLP):
    def forward(self, x):
        return 2 * super().forward(x)


class _Dropping(LlamaMLP):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


class _DoubleRMSNorm(LlamaRMSNorm):
    def forward(self, x):
        return 2 * super().forward(x)


def test_the_probe():
    config = small().config
    assert isinstance(fused_mlp(LlamaMLP(config)), FusedMLP)
    assert isinstance(fused_mlp(LlamaMLP(config).eval()), FusedMLP)
    for kind in (_Scaled, _Dropping):
        assert fused_mlp(kind(config).eval()) is None
    assert isinstance(fused_rms_norm(LlamaRMSNorm(7)), FusedRMSNorm)
    assert fused_rms_norm(_DoubleRMSNorm(7)) is None
    assert fused_rms_norm(nn.RMSNorm(7, eps=1e-5)) is not None and fused_rms_norm(nn.RMSNorm(7)) is None
    assert fused_rms_norm(nn.LayerNorm(7)) is None
    hooked = LlamaRMSNorm(7)
    hooked.forward = lambda x: x
    assert fused_rms_norm(hooked) is None
    with torch.device("meta"):
        assert fused_rms_norm(LlamaRMSNorm(7)).weight.is_meta


# ------------------------------------------------------------------------------------------ unfuse, and every order


def test_unfuse_gives_the_model_back():
    model = small()
    want, before = model(input_ids=ids()).logits, snapshot(model)
    fuse(model)
    assert snapshot(model) != before
    unfuse(model)
    assert snapshot(model) == before
    assert torch.equal(model(input_ids=ids()).logits, want)


@pytest.mark.parametrize("first", ["fuse", "adapt"])
def test_fusing_before_and_after(first):
    def change(model):
        quantize(model)
        attach(model, "dora", 4)
        return model.train()

    theirs, ours = small(), small()
    torch.manual_seed(1)
    change(theirs)
    torch.manual_seed(1)
    if first == "fuse":
        fuse(ours)
        change(ours)
    else:
        change(ours)
        assert len(fuse(ours)) == 2 * PER_LAYER + 1
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_computes_the_same(ours, theirs)
    before = snapshot(theirs)
    unfuse(ours)
    assert snapshot(ours)[0] == before[0]
    for got, want in zip(loss_and_gradients(ours), loss_and_gradients(theirs), strict=True):
        assert torch.equal(got, want)


def test_switching_merging_and_detaching_a_fused_model():
    theirs, ours = pair("dora")
    fuse(ours)
    for model in (theirs, ours):
        model.eval()
        torch.manual_seed(3)
        attach(model, "lora", 2, name="other", target_modules=["q_proj", "up_proj"])

    def logits():
        return [model(input_ids=ids()).logits for model in (ours, theirs)]

    steps = [
        lambda model: set_adapter(model, "default"),
        lambda model: merge(model),
        lambda model: unmerge(model),
        lambda model: set_adapter(model, None),
        lambda model: detach(model),
    ]
    torch.testing.assert_close(*logits(), rtol=1e-4, atol=1e-5)
    for step in steps:
        for model in (ours, theirs):
            step(model)
        torch.testing.assert_close(*logits(), rtol=1e-4, atol=1e-5)
        assert list(ours.state_dict()) == list(theirs.state_dict())
    unfuse(ours)
    assert fused_parts(ours) == [] and torch.equal(*logits())


@pytest.mark.parametrize("first", ["fuse", "attach"])
def test_norms_and_mlps_that_train_whole(first):
    """They are copies; of fused modules these are fused, others stay as they are."""
    theirs, ours = small().to(torch.bfloat16), small().to(torch.bfloat16)
    for model in (theirs, ours):
        if model is ours and first == "fuse":
            fuse(model)
        torch.manual_seed(1)
        attach(model, "lora", 4, target_modules=["q_proj"], modules_to_save=["norm", "mlp"])
        if model is ours and first == "attach":
            fuse(model)
            assert "model.norm" not in fused_parts(model)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for got, want in zip(loss_and_gradients(ours), loss_and_gradients(theirs), strict=True):
        torch.testing.assert_close(got, want, rtol=0.1, atol=0.02 * want.abs().max().item())
    if first == "fuse":
        before = snapshot(ours)
        with pytest.raises(ValueError, match=r"an adapter trains model\.norm, which is fused: detach the adapter"):
            unfuse(ours)
        assert snapshot(ours) == before
    detach(ours)
    unfuse(ours)
    assert fused_parts(ours) == [] and type(ours.model.norm) is LlamaRMSNorm


# ------------------------------------------------------------------------------------------ norms and MLPs


def test_a_norm_that_trains_gets_its_gradient():
    norm = LlamaRMSNorm(8)
    x = torch.randn(3, 8)
    norm(x).sum().backward()
    want, norm.weight.grad = norm.weight.grad, None
    fused_rms_norm(norm)(x).sum().backward()
    torch.testing.assert_close(norm.weight.grad, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("what", ["gelu_pytorch_tanh", "relu"])
def test_other_activations_against_float64(what, dtype):
    torch.manual_seed(0)
    leaves, dy = [torch.randn(7, 33).to(dtype) for _ in range(2)], torch.randn(7, 33).to(dtype)
    own = lambda gate, up: ACT2FN[what](gate) * up  # noqa: E731
    got = with_gradients(lambda gate, up: _Gated.apply(gate, up, ACT2FN[what]), leaves, dy)
    theirs = with_gradients(own, leaves, dy)
    assert torch.equal(got[0], theirs[0])
    assert_as_accurate(got, theirs, with_gradients(own, [leaf.double() for leaf in leaves], dy), dtype)


@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
def test_an_mlp_keeps_gate_and_up_alone(act):
    """Beside the input of each linear's adapter and its own thin result."""
    model = small(hidden_act=act)
    attach(model, "lora", 4)
    own = model.model.layers[0].mlp.train()
    fused, kept = fused_mlp(own), {}
    for name, mlp in (("own", own), ("fused", fused)):
        x = torch.randn(2, 5, 64, requires_grad=True)
        y = mlp(x)
        wide = [t for t in _saved_by(y) if t.numel() == 2 * 5 * 128]
        kept[name] = len({t.data_ptr() for t in wide})
        y.sum().backward()
    assert kept["fused"] == 2 < kept["own"]


def _saved_by(y: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that the graph of y keeps without computing them again."""
    found, todo, seen = [], [y.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [parent for parent, _ in node.next_functions]
        if hasattr(node, "saved_tensors") and "lora_linear" not in type(node).__name__:
            found += [t for t in node.saved_tensors if t is not None]
        found += [
            getattr(node, name)
            for name in dir(node)
            if name.startswith("_saved_") and isinstance(getattr(node, name), torch.Tensor)
        ]
    return found


def test_checkpointing_decides_what_is_kept():
    """A hook of our own inside its hooks would hold what feeds the product, of every block at once."""
    mlp = fused_mlp(small().model.layers[0].mlp)
    mlp.requires_grad_(True)
    x, kept = torch.randn(2, 5, 64, requires_grad=True), []
    product = mlp._product(mlp.gate_proj(x), mlp.up_proj(x))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        mlp(x)
    assert any(torch.equal(tensor.flatten(), product.flatten()) for tensor in kept)
