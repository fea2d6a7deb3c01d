"""Method × quantization × initialisation × direction on five architectures: real files, PEFT computes the same logits.

PEFT's base is the dense model, or the one that transformers and bitsandbytes packed in NF4. PEFT's own LoftQ runs on
CUDA alone; its files are plain LoRA, and so are ours. tests/experiments/models/test_smollm2.py has the real model.
"""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from modules import adapted_linears, attach, load_adapter, quantize, save_adapter
from tests.modules.architectures import ARCHITECTURES, IDS, bnb4_model, dense_model, logits, scramble

METHODS = ("lora", "qlora", "dora", "qdora")
INITS = ("default", "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora", "loftq", "eva")
OTHERS = ARCHITECTURES[1:]
# The whole matrix on Llama; on the others each method, quantization and kind of start at least once.
OURS = [("llama", method, init) for method in METHODS for init in INITS]
OURS = [cell for cell in OURS if cell[1].startswith("q") or cell[2] != "loftq"]  # which is about quantizing
OURS += [
    (a, *c) for a in OTHERS for c in (("lora", "default"), ("qdora", "default"), ("dora", "pissa"), ("qlora", "pissa"))
]
# PEFT's other initialisations need dense weights. It packs OLoRA's base again: test_peft_config.py.
THEIRS = [("llama", method, init) for method in METHODS for init in (True, "gaussian")]
THEIRS += [("llama", method, init) for method in ("lora", "dora") for init in ("orthogonal", "pissa", "olora")]
THEIRS += [(a, *c) for a in OTHERS for c in (("lora", True), ("qdora", True), ("dora", "pissa"))]


def our_base(architecture: str, method: str):
    model = dense_model(architecture)
    if method.startswith("q"):
        quantize(model, blocksize=64)
    return model


def their_base(architecture: str, method: str):
    return bnb4_model(architecture) if method.startswith("q") else dense_model(architecture)


@pytest.mark.parametrize("architecture, method, init", OURS)
def test_peft_loads_what_we_save_and_we_what_it_saves_again(architecture, method, init, tmp_path):
    model = dense_model(architecture)
    before = logits(model)
    if method.startswith("q") and init != "loftq":
        quantize(model, blocksize=64)
        before = logits(model)
    torch.manual_seed(0)
    attach(
        model,
        method.removeprefix("q"),
        rank=4,
        lora_alpha=6,
        init=init,
        dropout=0.1,
        calibration=[{"input_ids": IDS}] if init == "eva" else None,
    )
    if init == "loftq":
        quantize(model, blocksize=64)
    else:
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)  # it starts as its base
    scramble(model)
    assert (logits(model) - before).abs().max() > 1e-2
    expected = logits(model)
    save_adapter(model, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(their_base(architecture, method), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    again = our_base(architecture, method)
    load_adapter(again, tmp_path / "theirs")
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture, method, init", THEIRS)
def test_we_load_what_peft_saves(architecture, method, init, tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", use_dora=method.endswith("dora"), init_lora_weights=init
    )
    theirs = get_peft_model(their_base(architecture, method), config).eval()
    scramble(theirs)
    theirs.save_pretrained(tmp_path)
    ours = our_base(architecture, method)
    before = logits(ours)
    assert len(load_adapter(ours, tmp_path)) == len(adapted_linears(ours)) > 0
    assert (logits(ours) - before).abs().max() > 1e-2
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)
