"""Exports read by transformers, PEFT and bitsandbytes give the run's logits; nothing is overwritten or half written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments import export
from experiments.config import ModelConfig
from experiments.models.load import load_model
from experiments.runs import checkpoints
from experiments.runs.finished import load_run
from experiments.system.files import claim
from modules import decoder_linears, dequantize, detach
from modules.files.bitsandbytes import by_definition
from modules.files.peft import WEIGHTS_FILE
from tests.experiments.helpers import SMALL

IDS = torch.arange(3, 90).unsqueeze(0)


@torch.inference_mode()
def logits(model):
    return model.eval()(IDS).logits


@pytest.fixture
def finished(command, tmp_path):
    """finished(method, *overrides) trains the tiny model; returns the run's directory."""

    def train(method: str, *overrides: str) -> Path:
        short = ["trainer.steps=2", "trainer.eval_every=0", "lr=3e-2", *SMALL]
        code, text = command(f"+method={method}", *short, *overrides)
        assert code == 0, text
        return tmp_path / "out"

    return train


def check_merged(run: Path, directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert {type(module).__module__.split(".")[0] for module in model.modules()} <= {"torch", "transformers"}
    torch.testing.assert_close(logits(model), logits(load_run(run).model), rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(directory).chat_template


def check_bnb4(run: Path, directory: Path) -> None:
    """The merged weights as bitsandbytes itself packs them."""
    model = by_definition(AutoModelForCausalLM.from_pretrained(directory))
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    dense = load_run(run, dense=True).model
    for linear in decoder_linears(dense).values():
        packed, state = quantize_4bit(linear.weight.data, quant_type="nf4", compress_statistics=True)
        linear.weight.data = dequantize_4bit(packed, state)
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-4)


def test_a_qdora_run_in_every_format(terminal, finished_once, tmp_path):
    (tmp_path / ".merged.12.partial").mkdir()  # of an export that was killed
    code, text = terminal(export, f"run={finished_once}", "to=merged", f"output_dir={tmp_path / 'merged'}")
    assert code == 0 and "read back: logits of 256 tokens differ by" in text, text
    check_merged(finished_once, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    code, text = terminal(export, f"run={finished_once}", "to=bnb4", f"output_dir={tmp_path / 'bnb4'}")
    assert code == 0 and "packing loses" in text and "packing changes the logits by" in text, text
    check_bnb4(finished_once, tmp_path / "bnb4")
    checkpoint = checkpoints.of_run(finished_once)[0]
    code, text = terminal(export, f"run={checkpoint}", "to=peft", f"output_dir={tmp_path / 'peft'}")
    assert code == 0 and "over a base that is packed as the run's was" in text, text
    saved = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert all(torch.equal(saved[k], v) for k, v in load_file(checkpoint / "adapter" / WEIGHTS_FILE).items())


def test_a_full_run(terminal, finished):
    run = finished("full")
    code, text = terminal(export, f"run={run}", "to=merged")
    assert code == 0, text
    check_merged(run, run / "merged")
    code, text = terminal(export, f"run={run}", "to=bnb4")
    assert code == 0 and "packing loses" not in text, text
    check_bnb4(run, run / "bnb4")
    code, text = terminal(export, f"run={run}", "to=peft")
    assert code == 1 and "has no adapter, for method=full trained every weight: take to=merged" in text
    assert not (run / "peft").exists() and not list(run.glob(".*"))
    shutil.rmtree(run / "model")
    code, text = terminal(export, f"run={run}", "to=peft")
    assert code == 1 and "neither adapter/ nor model/ there" in text


def test_linears_without_an_adapter_are_unpacked_too(terminal, finished):
    run = finished("qlora", "target_modules=[q_proj,down_proj]")
    code, text = terminal(export, f"run={run}", "to=merged")
    assert code == 0, text
    check_merged(run, run / "merged")


def test_an_adapter_for_peft_names_its_base(terminal, finished, tmp_path):
    model, tokenizer = load_model(ModelConfig(name="tiny", source="tiny"), torch.float32, seed=0)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    run = finished("dora", "model=hf", f"model.path={tmp_path / 'base'}")
    code, text = terminal(export, f"run={run}", "to=peft")
    assert code == 0 and "read back" in text, text
    config = json.loads((run / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"])
    theirs = PeftModel.from_pretrained(base, run / "peft")
    torch.testing.assert_close(logits(theirs), logits(load_run(run).model), rtol=1e-4, atol=1e-4)

    code, text = terminal(export, f"run={run}", "to=merged", "trainer.dtype=bfloat16")
    assert code == 0, text
    assert AutoModelForCausalLM.from_pretrained(run / "merged").dtype == torch.bfloat16


def test_an_export_that_gives_other_logits_is_not_kept(terminal, finished_once, tmp_path, monkeypatch):
    def forget_the_adapter(model):
        detach(model)
        dequantize(model)

    monkeypatch.setattr(export, "make_dense", forget_the_adapter)
    code, text = terminal(export, f"run={finished_once}", "to=merged", f"output_dir={tmp_path / 'merged'}")
    assert code == 1 and "the export is wrong" in text and "nothing is kept" in text, text
    assert not list(tmp_path.glob("*merged*"))


def test_nothing_is_overwritten(terminal, finished_once, tmp_path):
    (tmp_path / "there").mkdir()
    code, text = terminal(export, f"run={finished_once}", "to=merged", f"output_dir={tmp_path / 'there'}")
    assert code == 1 and f"{tmp_path / 'there'} exists already: nothing is overwritten" in text
    assert not list((tmp_path / "there").iterdir())


def test_what_cannot_be_exported(terminal):
    code, text = terminal(export, "run=/nowhere", "to=merged")
    assert code == 1 and "/nowhere: no such directory" in text
    code, text = terminal(export, "run=/nowhere")
    assert code == 1 and "to= is missing" in text
    code, text = terminal(export, "run=/nowhere", "to=gguf")
    assert code == 1 and "to=gguf: choose merged, peft, bnb4" in text


def test_two_exports_to_one_folder(finished_once, terminal, tmp_path):
    target = tmp_path / "peft"
    with claim(target.with_name(".peft.lock")):
        code, text = terminal(export, f"run={finished_once}", "to=peft", f"output_dir={target}")
    assert code == 1 and f"another export to {target} began at the same time: set output_dir" in text
    assert list(tmp_path.iterdir()) == []
