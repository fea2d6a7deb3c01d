"""Runs over models with experts: what they train is the formula's, they go on bit for bit, and others read them."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, Mxfp4Config

from experiments import export, generate
from experiments.runs.finished import load_run
from modules import decoder_linears, dequantize, detach, unfuse
from modules.experts import NF4Experts
from tests.experiments.helpers import repeatable_records, repeatable_result, tensors
from tests.modules.moe_cases import by_formula, experts_of, outputs, pack_as_shipped
from tests.survey.life import save_small

STEPS = ["rank=4", "lr=1e-2", "trainer.steps=4", "trainer.checkpoint_every=2", "trainer.samples=0", "dropout=0.1"]


@pytest.fixture
def moe(tmp_path):
    """moe(kind) is the settings of a run over a small model of the kind, whose directory is tmp_path/kind."""
    return lambda kind: [*STEPS, "model=hf", f"model.path={save_small(kind, tmp_path)}", "trainer.dtype=float32"]


@pytest.mark.parametrize(("kind", "method"), [("qwen3_moe", "qdora"), ("gpt_oss", "qlora")])
def test_the_life_of_a_run(command, terminal, moe, tmp_path, kind, method):
    settings, out, whole = [f"+method={method}", *moe(kind)], tmp_path / "out", tmp_path / "whole"
    code, text = command(*settings)
    assert code == 0 and "stay dense" not in text, text
    shutil.copytree(out, whole)
    shutil.rmtree(out / "checkpoints" / "step-00000004")
    (out / "result.json").unlink()
    code, text = command(*settings, f"resume={out}")
    assert code == 0, text
    assert repeatable_records(out) == repeatable_records(whole) and tensors(out) == tensors(whole)
    assert repeatable_result(out) == repeatable_result(whole)

    ours = load_run(out).model
    assert len(experts_of(ours)) == 4
    assert all(isinstance(layer.base, NF4Experts) and layer.lora_B.any() for layer in experts_of(ours).values())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / kind, dtype=torch.float32).eval()
    want = outputs(by_formula(plain, ours))
    torch.testing.assert_close(outputs(ours).double(), want, rtol=1e-3, atol=1e-4)
    code, text = terminal(generate, f"run={out}", "prompt=hi", "max_new_tokens=2")
    assert code == 0, text

    code, text = terminal(export, f"run={out}", "to=merged")
    assert code == 0, text
    merged = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(outputs(merged).double(), want, rtol=1e-3, atol=1e-4)
    code, text = terminal(export, f"run={out}", "to=peft")
    if method == "qdora":
        assert code == 1 and "PEFT has nothing that computes method=qdora on experts" in text
    else:
        assert code == 0, text
        base = load_run(out).model
        modules_of_base(base)
        theirs = PeftModel.from_pretrained(base, out / "peft").eval()
        torch.testing.assert_close(outputs(theirs).double(), want, rtol=1e-3, atol=1e-4)
    code, text = terminal(export, f"run={out}", "to=bnb4")
    assert code == 1 and "experts, which bitsandbytes does not pack: take to=merged" in text


def modules_of_base(model) -> None:
    """Give transformers its own modules back, of the weights that the codes stand for."""
    detach(model)
    dequantize(model)
    unfuse(model)
    assert not any("experts" in name for name in decoder_linears(model))


@pytest.mark.parametrize("method", ["qlora", "qdora"])
def test_a_run_over_gpt_oss_as_it_is_shipped(command, terminal, moe, tmp_path, method):
    """Experts stay in MXFP4, everything else dense."""
    settings, out, whole = [f"+method={method}", "quant=mxfp4", *moe("gpt_oss")], tmp_path / "out", tmp_path / "whole"
    pack_as_shipped(tmp_path / "gpt_oss")
    code, text = command(*settings)
    assert code == 0, text
    shutil.copytree(out, whole)
    shutil.rmtree(out / "checkpoints" / "step-00000004")
    (out / "result.json").unlink()
    code, text = command(*settings, f"resume={out}")
    assert code == 0, text
    assert repeatable_records(out) == repeatable_records(whole) and tensors(out) == tensors(whole)
    ours = load_run(out).model
    assert {layer.base.quant_type for layer in experts_of(ours).values()} == {"mxfp4"}
    unpacked = Mxfp4Config(dequantize=True)
    plain = AutoModelForCausalLM.from_pretrained(
        tmp_path / "gpt_oss", quantization_config=unpacked, dtype=torch.float32
    )
    want = outputs(by_formula(plain.eval(), ours))
    torch.testing.assert_close(outputs(ours).double(), want, rtol=1e-3, atol=1e-4)
    code, text = terminal(export, f"run={out}", "to=merged")
    assert code == 0, text
    merged = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(outputs(merged).double(), want, rtol=1e-3, atol=1e-4)
    code, text = command(*settings[:1], *settings[2:], "overwrite=true")
    assert code == 1 and "is packed in mxfp4, not in nf4: choose quant=mxfp4" in text


def test_experts_that_the_data_reaches_and_one_factor_for_all(command, moe, tmp_path):
    settings = moe("qwen3_moe")
    code, text = command("+method=qdora", *settings, "experts=reached", "shared_factor=A", "target_modules=[experts]")
    assert code == 0, text
    layers = experts_of(load_run(tmp_path / "out").model)
    assert len(layers) == 4
    for layer in layers.values():  # the file has a factor for each expert
        reached = layer.lora_A[layer.lora_B.flatten(1).any(1)]
        assert len(reached) and torch.equal(reached, reached[:1].expand_as(reached))
    code, text = command("+method=qlora", *settings, "experts=[0,7]", f"output_dir={tmp_path / 'other'}")
    assert code == 1 and "error: experts: 7 is not one of the 4" in text
    code, text = command("+method=qlora", *settings, "init=loftq", f"output_dir={tmp_path / 'other'}")
    assert code == 1 and "error: init=loftq is not for experts" in text


def test_experts_of_a_class_that_is_not_known_are_counted_at_the_end(command, moe, tmp_path):
    code, text = command("+method=qlora", *moe("longcat_flash"))
    assert code == 0, text
    left_out = json.loads((tmp_path / "out" / "result.json").read_text())["experts_left_out"]
    assert (
        left_out > 0 and f"{left_out:,} weights of experts stayed dense and untrained" in text.rsplit("held out", 1)[1]
    )


def test_a_sweep_shares_the_packed_experts(command, moe, tmp_path):
    settings = moe("qwen3_moe")
    code, text = command("-m", "+method=qlora", *settings, "lr=1e-3,1e-2")
    assert code == 0, text
    results = [repeatable_result(path.parent) for path in sorted((tmp_path / "out").glob("*/result.json"))]
    assert len(results) == 2 and all(result["bits_per_weight"] < 4.2 for result in results)
