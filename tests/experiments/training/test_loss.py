"""The loss without logits, against torch's in float64, and for models that do something to their logits."""

import shutil

import pytest
import torch
from torch.nn import functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from experiments.data.chat import IGNORED
from experiments.errors import UserError
from experiments.training import loss as loss_module
from experiments.training.evaluation import label_logits
from experiments.training.loss import LabelLoss, has_plain_head, linear_cross_entropy

SMALL = {
    **{"vocab_size": 101, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8},
    **{"num_attention_heads": 2, "num_key_value_heads": 1},
}


def with_gradients(function, *leaves: torch.Tensor) -> list[torch.Tensor]:
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    loss = function(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss * 0.25, leaves)]


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("n", [0, 1, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_against_float64(dtype, n, bias, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 4 * 101 * 3)  # three tokens a chunk: 7 leave a tail
    torch.manual_seed(0)
    shapes = [(n, 16), (101, 16)] + ([(101,)] if bias else [])
    leaves = [torch.randn(shape).to(dtype) for shape in shapes]
    targets = torch.randint(101, (n,))
    got = with_gradients(lambda h, w, b=None: linear_cross_entropy(h, w, b, targets), *leaves)

    def plain(h, w, b=None):
        return F.cross_entropy(
            F.linear(h, w, b).to(torch.promote_types(h.dtype, torch.float32)), targets, reduction="sum"
        )

    exact = with_gradients(plain, *(leaf.double() for leaf in leaves))
    by_torch = with_gradients(plain, *leaves)
    for have, want, torchs in zip(got, exact, by_torch):
        assert have.dtype == torchs.dtype
        allowed = 2 * (torchs.double() - want).abs().max() + 8 * torch.finfo(dtype).eps * want.abs().max() if n else 0.0
        if have.numel():
            assert (have.double() - want).abs().max() <= allowed


def test_large_logits_stay_finite():
    h, w = torch.full((1, 16), 50.0), torch.linspace(-1, 1, 101 * 16).view(101, 16)
    got = with_gradients(lambda h: linear_cross_entropy(h, w, None, torch.tensor([0])), h)
    exact = F.cross_entropy(h.double() @ w.double().t(), torch.tensor([0]), reduction="sum")
    torch.testing.assert_close(got[0].double(), exact, rtol=1e-6, atol=0)
    assert got[1].isfinite().all()


@pytest.mark.parametrize("plain", [True, False], ids=["llama", "softcap"])
def test_of_a_model(plain):
    torch.manual_seed(0)
    if plain:
        model = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    else:
        model = Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=0.1)).eval()
    assert has_plain_head(model) is plain
    input_ids = torch.randint(101, (2, 9))
    labels = input_ids.masked_fill(torch.rand(2, 9) < 0.4, IGNORED)
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}
    loss = LabelLoss(model)(batch)
    logits, targets = label_logits(model, batch)
    expected = F.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    got, want = (torch.autograd.grad(value, list(model.parameters())) for value in (loss, expected))
    for have, should in zip(got, want):
        torch.testing.assert_close(have, should, rtol=1e-4, atol=1e-5)


def test_a_head_with_an_adapter_is_not_plain():
    from modules import LoRALinear

    model = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    model.set_output_embeddings(LoRALinear(model.lm_head, 2, 4.0))
    assert not has_plain_head(model)


def test_compiled(tmp_path, monkeypatch):
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    input_ids = torch.randint(101, (2, 9))
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": input_ids}
    torch.testing.assert_close(LabelLoss(model, compiled=True)(batch), LabelLoss(model)(batch), rtol=1e-5, atol=1e-5)
    assert list(tmp_path.iterdir())


def test_compiling_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="needs a C\\+\\+ compiler, and no-such-compiler is not there"):
        LabelLoss(LlamaForCausalLM(LlamaConfig(**SMALL)), compiled=True)
