"""Prefix tuning against a plain float64 forward of one text at a time."""

import pytest
import torch
from peft import PeftModel

from modules import attach, quantize, save_adapter, trainable_parameters
from modules.adapters.prefix import prompt_lengths
from modules.files.baselines import prefix_tuning
from tests.modules.architectures import ARCHITECTURES, IDS, bnb4_model, dense_model, logits, scramble
from tests.modules.prefix_cases import TEXTS, batch_of, reference, with_prefix

KINDS = ("prefix_embed", "prefix_layer")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_batch_is_each_text_written_out(architecture, kind):
    """Prompts of different lengths, padded on the right as in training; one has no prompt."""
    model = with_prefix(architecture, kind)
    lengths = [3, 6, 0]
    with torch.no_grad(), prompt_lengths(model, torch.tensor(lengths)):
        found = model(**batch_of(TEXTS, left=False), use_cache=False).logits
    for row, text, length in zip(found, TEXTS, lengths):
        expected = reference(with_prefix(architecture, kind), text, length)
        torch.testing.assert_close(row[: len(text)].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_generation_in_a_batch_with_a_cache_is_each_prompt_alone_without(architecture, kind):
    model = with_prefix(architecture, kind)
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    together = model.generate(**batch_of(TEXTS, left=True), **how, output_logits=True, return_dict_in_generate=True)
    for row, text in enumerate(TEXTS):
        ids = torch.tensor([text])
        for step in range(6):
            with torch.no_grad(), prompt_lengths(model, torch.tensor([len(text)])):
                alone = model(input_ids=ids, use_cache=False).logits[0, -1]
            torch.testing.assert_close(together.logits[step][row], alone, rtol=1e-4, atol=1e-5)
            ids = torch.cat([ids, alone.argmax().view(1, 1)], 1)
        assert together.sequences[row, -6:].tolist() == ids[0, -6:].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_over_packed_weights(kind, tmp_path):
    model = dense_model("llama")
    quantize(model)
    attach(model, kind, prefix_tokens=3)
    scramble(model)
    prefix = next(iter(trainable_parameters(model).values()))
    assert prefix.dtype == torch.float32
    if kind == "prefix_embed":
        save_adapter(model, tmp_path)
        theirs = PeftModel.from_pretrained(bnb4_model("llama"), tmp_path).eval()
        torch.testing.assert_close(logits(theirs)[:, 3:], logits(model), rtol=1e-4, atol=1e-5)
    model(IDS).logits.sum().backward()
    assert all(p.grad.abs().max() > 0 for p in trainable_parameters(model).values())


def test_gradients_are_those_of_float64_and_of_checkpointing():
    grads = {}
    for how in ("float32", "float64", "checkpointed"):
        model = with_prefix("llama", "prefix_layer").train()
        if how == "float64":
            model.double()
            for name, p in trainable_parameters(model).items():
                assert p.dtype == torch.float64, name
        if how == "checkpointed":
            model.activation_checkpointing_enable({"use_reentrant": False})
        batch = batch_of(TEXTS, left=False)
        with prompt_lengths(model, torch.tensor([3, 6, 0])):
            out = model(**batch, use_cache=False).logits
        (out.double().square() * batch["attention_mask"][..., None]).sum().backward()
        grads[how] = [p.grad for p in trainable_parameters(model).values()]
    for plain, exact, again in zip(*grads.values()):
        torch.testing.assert_close(plain.double(), exact, rtol=1e-3, atol=1e-4)
        assert torch.equal(plain, again)


def test_models_and_inputs_that_cannot_have_a_prefix():
    model = dense_model("llama")
    with pytest.raises(ValueError, match="is a decoder by itself: attach the prefix to a model with its head"):
        attach(model.model, "prefix_embed", prefix_tokens=1)
    with pytest.raises(ValueError, match="Linear has no list of decoder blocks"):
        attach(torch.nn.Linear(2, 2), "prefix_layer", prefix_tokens=1)
    attach(model, "prefix_layer", prefix_tokens=1, infix_tokens=1)
    with pytest.raises(ValueError, match="PEFT's prefix tuning has no infix tokens"):
        prefix_tuning(model)
    with pytest.raises(ValueError, match="attention_mask has 4 dimensions"):
        model(IDS, attention_mask=torch.ones(3, 1, 7, 7))
