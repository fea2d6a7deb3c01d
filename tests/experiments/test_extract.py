"""The extract command: an adapter comes back from the model it was merged into, and PEFT reads it; bad input."""

import json

import pytest
import torch
from peft import PeftModel

from experiments import extract
from modules import DoRALinear, adapted_linears, attach, decoder_linears, load_adapter
from tests.experiments.helpers import tiny


@pytest.fixture
def tuned(tmp_path):
    """A directory with the tiny model after a change of rank 3 in every linear, and the model."""
    model, tokenizer = tiny()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for linear in decoder_linears(model).values():
            b = torch.randn(linear.out_features, 3, generator=generator)
            linear.weight += 0.05 * b @ torch.randn(3, linear.in_features, generator=generator)
    model.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    return tmp_path / "tuned", model


@pytest.fixture
def command(terminal, tmp_path, chats):
    given = ["base=tiny", "data=jsonl", f"data.path={chats}", f"output_dir={tmp_path / 'out'}"]
    return lambda *overrides: terminal(extract, *given, *overrides)


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_a_change_of_rank_3_comes_back(command, tuned, tmp_path, adapter):
    directory, model = tuned
    code, text = command(f"tuned={directory}", "rank=3", f"adapter={adapter}")
    assert code == 0, text
    assert f"{adapter}, rank 3" in text and "100.0% of ‖W′ − W‖² kept in 14 linears" in text
    assert "not in the adapter" not in text
    result = json.loads((tmp_path / "out" / "extract.json").read_text())
    losses = {name: evaluation["loss"] for name, evaluation in result["evaluations"].items()}
    assert losses["extracted"] == pytest.approx(losses["tuned"], abs=1e-4)
    assert abs(losses["base"] - losses["tuned"]) > 1e-2
    assert result["changed_elsewhere"] == {} and max(result["layer_errors"].values()) < 1e-3

    ids = torch.arange(40)[None]
    ours, theirs = tiny()[0], tiny()[0]
    load_adapter(ours, tmp_path / "out" / "adapter")
    theirs = PeftModel.from_pretrained(theirs, tmp_path / "out" / "adapter")
    with torch.no_grad():
        for extracted in (ours, theirs):
            torch.testing.assert_close(extracted(ids).logits, model(ids).logits, atol=1e-3, rtol=0)


def test_what_is_lost_is_said(command, tuned, tmp_path):
    directory, model = tuned
    with torch.no_grad():
        model.model.norm.weight *= 1.5
    model.save_pretrained(directory)
    code, text = command(
        f"tuned={directory}", "rank=1", "target_modules=[q_proj,down_proj]", "decomposition=randomized"
    )
    assert code == 0, text
    # In two kinds of linears of each of two layers; the other ten and the norm are elsewhere.
    assert "kept in 4 linears" in text and "not in the adapter: changes of 11 other tensors" in text
    result = json.loads((tmp_path / "out" / "extract.json").read_text())
    assert 0.3 < result["kept_share"] < 0.9
    assert result["changed_elsewhere"]["model.norm.weight"] == pytest.approx(0.5)


def test_a_run_s_own_adapter_comes_back_from_its_merged_weights():
    model, _ = tiny()
    attach(model, "dora", rank=4)
    for layer in adapted_linears(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.02)
        layer.magnitude.data *= 1 + 0.1 * torch.randn(len(layer.magnitude))
        fresh = DoRALinear(layer.base, 4, 8)
        assert extract.set_extracted(fresh, layer.merged_weight(), "svd") < 0.2


BAD = {
    "no base": (["base=???", "tuned=x"], "no base: add base=DIR"),
    "no tuned": ([], "no tuned: add tuned=DIR"),
    "not there": (
        ["tuned=/nowhere"],
        "/nowhere: no such directory or file, and no model of that name; there are ",
    ),
    "adapter": (["tuned=tiny", "adapter=ia3"], "adapter=ia3: choose lora or dora"),
    "decomposition": (["tuned=tiny", "decomposition=qr"], "decomposition=qr: choose svd, randomized, als, nuclear"),
    "rank": (["tuned=tiny", "rank=0"], "rank=0 is not a rank: choose a whole number, 1 or more"),
    "batch": (["tuned=tiny", "batch_size=0"], "batch_size=0: choose 1 or more"),
    "misspelt": (["tuned=tiny", "rnk=2"], "no such key: rnk; did you mean rank?"),
    "targets": (["tuned=tiny", "target_modules=[nope]"], "matches no linear of the model"),
}


@pytest.mark.parametrize("overrides, message", BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_leaves_nothing(command, tmp_path, overrides, message):
    code, text = command(*overrides)
    assert code == 1 and message in text, text
    assert len([line for line in text.splitlines() if line.startswith("error: ")]) == 1 and "Traceback" not in text
    assert not (tmp_path / "out").exists()


def test_a_tuned_model_of_another_shape_is_refused(command, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    _, tokenizer = tiny()
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=300
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    code, text = command(f"tuned={tmp_path / 'other'}")
    assert code == 1 and "is not a fine-tuned tiny: " in text and "Traceback" not in text
