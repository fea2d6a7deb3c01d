"""The loss of models: without logits, and of those that do something to their logits."""

import shutil

import pytest
import torch
from torch.nn import functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from experiments.data.buckets import Bucket, fill
from experiments.data.chat import IGNORED, Example
from experiments.errors import UserError
from experiments.training.evaluation import label_logits
from experiments.training.loss import LabelLoss, has_plain_head

SMALL = {
    **{"vocab_size": 101, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8},
    **{"num_attention_heads": 2, "num_key_value_heads": 1},
}


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


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_of_a_padded_batch(bias):
    """Places without a label add nothing, to the gradient of a head and its bias neither."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    if bias:
        model.set_output_embeddings(torch.nn.Linear(16, 101))
    texts = torch.randint(101, (2, 9)).tolist()
    batch = [Example(text, [IGNORED] * 3 + text[3:]) for text in (texts[0], texts[1][:6])]
    filled = fill(batch, Bucket(length=16, labels=20, rows=3), pad_id=0)
    assert (filled["targets"] == IGNORED).sum() == 20 - 9
    loss = LabelLoss(model).padded(filled)
    rows = [(model(input_ids=torch.tensor([one.input_ids])).logits[0, :-1], one.labels[1:]) for one in batch]
    expected = sum(F.cross_entropy(logits, torch.tensor(labels), reduction="sum") for logits, labels in rows)
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
