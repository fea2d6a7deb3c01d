"""The adapter's settings on the command line: what a run trains and writes, and what it refuses."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from experiments import export
from experiments.config import resolve
from experiments.data.samples import load_data
from experiments.models.load import load_model, prepare_model
from experiments.runs.finished import load_run
from experiments.system.cli import composed
from experiments.training.evaluation import evaluate
from modules import adapted_linears, decoder_linears, dequantize, quantize
from modules.files.bitsandbytes import load_bnb4
from tests.experiments.helpers import repeatable_records, repeatable_result, tensors

MANY = [
    *("init=pissa", "rslora=true", "rank_pattern={q_proj:2,mlp.up_proj:6}", "alpha_pattern={v_proj:12}"),
    *("exclude_modules=[k_proj]", "modules_to_save=[lm_head]"),
]


def peft_loss(out, chats, *overrides) -> float:
    """The held-out loss that PEFT measures over the adapter of the run in `out`, on a dense base."""
    cfg = resolve(composed(*overrides, "model=tiny", "data=jsonl", f"data.path={chats}", "trainer=debug"))
    model, tokenizer = load_model(cfg.model, torch.float32, cfg.seed)
    if cfg.quant.name == "nf4":
        quantize(model, cfg.quant.blocksize, cfg.quant.double)
        for name, linear in decoder_linears(model).items():
            model.set_submodule(name, linear.dequantize())
    theirs = PeftModel.from_pretrained(model, out / "adapter")
    heldout = load_data(cfg.data, tokenizer).heldout
    return evaluate(theirs.get_base_model(), heldout, 8, tokenizer.pad_token_id).loss


@pytest.mark.parametrize(
    "overrides",
    [
        ("+method=qdora", *MANY),
        ("+method=qlora", "init=loftq"),
        ("+method=dora", "init=eva", "freeze_A=true"),
    ],
    ids=lambda overrides: " ".join(overrides[:3]),
)
def test_peft_measures_the_same_loss(command, tmp_path, chats, overrides):
    code, text = command(*overrides, "lr=1e-2", "trainer.samples=0", "trainer.dtype=float32")
    assert code == 0, text
    measured = repeatable_result(tmp_path / "out")
    assert measured["loss_after"] < measured["loss_before"]
    assert peft_loss(tmp_path / "out", chats, *overrides) == pytest.approx(measured["loss_after"], rel=1e-4)


@pytest.mark.parametrize("method", ["qlora", "qdora"])
def test_a_base_packed_for_its_adapter_stays_with_the_run(command, terminal, tmp_path, chats, method):
    more = ["init=qpissa", "trainer.checkpoint_every=2", "trainer.samples=0", "lr=1e-3", "data.max_heldout=8"]
    more.append("trainer.dtype=float32")
    out, whole = tmp_path / "out", tmp_path / "whole"
    code, text = command(f"+method={method}", *more)
    assert code == 0, text
    measured = repeatable_result(out)

    # transformers and bitsandbytes load base/, PEFT the adapter that names it: a plain LoRA or DoRA. A DoRA over dense
    # weights: on CPUs with bf16 bitsandbytes' first forward reorders the codes, which PEFT's DoRA then misreads.
    if method == "qlora":
        base = AutoModelForCausalLM.from_pretrained(out / "base").eval()
    else:
        base = load_bnb4(out / "base")
        dequantize(base)
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(out / "base") and config["r"] == 4
    cfg = resolve(composed("+method=qlora", "model=tiny", "data=jsonl", f"data.path={chats}", "data.max_heldout=8"))
    _, tokenizer = load_model(cfg.model, torch.float32, 0)
    heldout = load_data(cfg.data, tokenizer).heldout
    theirs = PeftModel.from_pretrained(base, out / "adapter").get_base_model()
    assert evaluate(theirs, heldout, 8, tokenizer.pad_token_id).loss == pytest.approx(measured["loss_after"], rel=1e-4)

    model = load_run(out).model
    assert evaluate(model, heldout, 8, tokenizer.pad_token_id).loss == pytest.approx(measured["loss_after"], rel=1e-6)
    at_end = load_run(out / "checkpoints" / "step-00000004").model
    assert torch.equal(at_end(**model.dummy_inputs).logits, model(**model.dummy_inputs).logits)
    code, text = terminal(export, f"run={out}", "to=peft", f"output_dir={tmp_path / 'peft'}")
    assert code == 0, text

    shutil.copytree(out, whole)
    shutil.rmtree(out / "checkpoints" / "step-00000004")
    (out / "result.json").unlink()
    code, text = command(f"+method={method}", *more, f"resume={out}")
    assert code == 0, text
    assert (
        repeatable_records(out) == repeatable_records(whole)
        and repeatable_result(out) == repeatable_result(whole)
        and tensors(out) == tensors(whole)
    )
    shutil.rmtree(out / "base")
    code, text = terminal(export, f"run={out}", "to=peft", f"output_dir={tmp_path / 'again'}")
    assert code == 1 and "base is missing: the adapter of init=qpissa is nothing without its base" in text


@pytest.mark.parametrize("quant_type", ["fp4", "int4"])
def test_another_data_type(command, terminal, tmp_path, quant_type):
    """It trains, comes back as it was, and leaves in bitsandbytes' format where that has it."""
    out = tmp_path / "out"
    code, text = command("+method=qdora", f"quant={quant_type}", "trainer.samples=0", "lr=1e-2")
    assert code == 0, text
    assert repeatable_result(out)["loss_after"] < repeatable_result(out)["loss_before"]
    linears = decoder_linears(load_run(out).model)
    assert {linear.quant_type for linear in linears.values()} == {quant_type}
    code, text = terminal(export, f"run={out}", "to=bnb4", f"output_dir={tmp_path / 'bnb4'}")
    if quant_type == "int4":
        assert code == 1 and f"bitsandbytes has no int4, in which the base of {out} is packed: take to=merged" in text
        assert not (tmp_path / "bnb4").exists()
    else:
        assert code == 0, text
        config = json.loads((tmp_path / "bnb4" / "config.json").read_text())
        assert config["quantization_config"]["bnb_4bit_quant_type"] == "fp4"
        code, text = command(
            "+method=qlora", "model=hf", f"model.path={tmp_path / 'bnb4'}", "quant=nf4", "overwrite=true"
        )
        assert code == 1 and "is packed in fp4, not in nf4: choose quant=fp4" in text


def test_every_setting_reaches_the_model():
    settings = [*MANY, "freeze_A=true", "rank=4", "dropout=0.1", "model=tiny", "output_dir=unused"]
    model, _ = prepare_model(resolve(composed("+method=dora", *settings)), torch.device("cpu"), torch.float32)
    layers = adapted_linears(model)
    assert {name.rpartition(".")[2] for name in layers} == {
        *("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    first = {name.removeprefix("model.layers.0."): layer for name, layer in layers.items() if ".0." in name}
    assert first["self_attn.q_proj"].rank == 2 and first["mlp.up_proj"].rank == 6 and first["mlp.gate_proj"].rank == 4
    assert first["self_attn.v_proj"].scaling == 12 / 2 and first["self_attn.o_proj"].scaling == 8 / 2
    assert all(layer.init_A is not None and not layer.lora_A.requires_grad for layer in layers.values())
    assert model.lm_head.weight.requires_grad and not model.model.embed_tokens.weight.requires_grad


def test_b_learns_faster_than_a_with_lora_plus(command, tmp_path):
    settings = ["trainer.loraplus_lr_ratio=16", "trainer.steps=1", "trainer.samples=0", "trainer.warmup=0", "lr=1e-3"]
    assert command("+method=lora", *settings)[0] == 0
    assert repeatable_records(tmp_path / "out")[1]["lr"] == 1e-3
    saved = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    b = torch.cat([tensor.flatten() for name, tensor in saved.items() if "lora_B" in name])
    # it starts at 0, so one step of Adam moves all of it by its learning rate
    assert b.abs().median().item() == pytest.approx(16e-3, rel=1e-2)


def test_a_run_goes_on_from_its_checkpoint(command, tmp_path):
    more = ["freeze_A=true", "trainer.checkpoint_every=2", "trainer.samples=0", "dropout=0.1", "lr=1e-2"]
    settings = ["+method=qlora", *MANY, *more]
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert command(*settings)[0] == 0
    shutil.copytree(out, whole)
    shutil.rmtree(out / "checkpoints" / "step-00000004")
    (out / "result.json").unlink()
    code, text = command(*settings, f"resume={out}")
    assert code == 0, text
    assert (
        repeatable_records(out) == repeatable_records(whole)
        and repeatable_result(out) == repeatable_result(whole)
        and tensors(out) == tensors(whole)
    )
    code, text = command(*settings, "rank_pattern={q_proj:3}", f"resume={out}", "trainer.steps=5")
    assert code == 1 and "another configuration: rank_pattern.q_proj (2 there, 3 here)" in text


BAD = {  # and in tests/modules/adapters/test_config.py
    "init": (["init=svd"], "init='svd' is not one of default, gaussian"),
    "loftq without packing": (["init=loftq"], "init=loftq makes up for the error of quantizing: choose +method=qlora"),
    "qpissa without packing": (
        ["init=qpissa"],
        "init=qpissa makes up for the error of quantizing: choose +method=qlora",
    ),
    "data type": (["quant=nf4", "quant.type=fp4"], "quant.type=fp4 is not quant=nf4: choose quant=fp4"),
    "block size": (["quant=mxfp4", "quant.blocksize=64"], "quant.blocksize=64: mxfp4 has blocks of 32: leave it out"),
    "fp32 scales": (["quant=nvfp4", "quant.double=false"], "quant.double=false: the scales of nvfp4 have 8 bits"),
    "tuned": (["quant=tuned", "quant.type=nvfp4", "quant.map=x"], "quant.type=nvfp4: its blocks have one size, so"),
    "no data type": (["quant=tuned", "quant.type=int5"], "quant.type=int5: choose nf4, fp4, int4"),
    "rank pattern": (["rank_pattern={q_proj:x}"], "rank of q_proj=x is not a rank: choose a whole number"),
    "idle pattern": (["rank_pattern={qproj:2}"], "rank_pattern: qproj matches no adapted linear"),
    "modules to save": (["modules_to_save=[head]"], "modules_to_save: the model has no module head"),
    "LoRA+": (["trainer.loraplus_lr_ratio=0"], "trainer.loraplus_lr_ratio=0.0: choose a number above 0"),
    "no adapter": (["+method=full", "init=pissa"], "init is about adapters, and method=full has none"),
}


@pytest.mark.parametrize("overrides, message", BAD.values(), ids=BAD)
def test_bad_settings_are_one_line(command, tmp_path, overrides, message):
    method = [] if "+method=full" in overrides else ["+method=lora"]
    code, text = command(*method, *overrides)
    assert code == 1
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0] and "Traceback" not in text, text
    assert not (tmp_path / "out").exists()
