"""The LoRA paper's baselines by the commands: train, evaluate, generate, export; the infix where training has it."""

import io
import json
import sys

import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F

from experiments import evaluate, export, generate
from experiments.data.chat import IGNORED
from experiments.data.samples import load_data
from experiments.models.load import load_base
from experiments.runs.finished import load_run
from experiments.training.evaluation import evaluate as measure
from experiments.training.evaluation import label_logits
from experiments.training.loss import LabelLoss
from modules.files.baselines import OUR_CONFIG_FILE
from tests.experiments.helpers import SMALL
from tests.modules.prefix_cases import TEXTS, batch_of, reference, with_prefix

# Of the tiny model: 2 layers of width 64 with 14 linears, whose outputs are 64, 32, 32, 64, 128, 128 and 64 wide.
PARAMETERS = {
    "bitfit": 2 * 512,
    "houlsby": 4 * (2 * 64 * 4 + 4 + 64),
    "prefix_embed": 64 * (32 + 3),
    "prefix_layer": 2 * 64 * 8,
}
MORE = {"houlsby": ["quant=nf4"], "prefix_embed": ["infix_tokens=3"]}
HAS_NO_RANK = {"bitfit", "prefix_embed", "prefix_layer"}


@pytest.fixture
def trained(command, tmp_path):
    """trained(method, *overrides) trains the tiny model for two steps; returns the run's directory and the output."""

    def train(method: str, *overrides: str):
        short = ["trainer.steps=2", "trainer.eval_every=0", *SMALL]
        code, text = command(f"+method={method}", *short, *overrides, *MORE.get(method, []))
        assert code == 0, text
        return tmp_path / "out", text

    return train


def answers(text: str) -> list[str]:
    """The lines of `generate` without those on the machine, its load and its speed."""
    return [line for line in text.splitlines()[:-1] if " on cpu (" not in line]


@pytest.mark.parametrize("method", PARAMETERS)
def test_train_evaluate_generate(trained, terminal, method):
    run, text = trained(method, "lr=3e-2")
    assert ("tiny has no biases to train: each of its 14 linears gets one" in text) == (method == "bitfit")
    result = json.loads((run / "result.json").read_text())
    assert result["trainable_params"] == PARAMETERS[method]
    assert result["adapter_bytes"] == 4 * PARAMETERS[method]
    assert result["effective_rank"] is None and not (run / "spectrum.csv").exists()
    assert ("rank" in result["config"]) == (method not in HAS_NO_RANK)
    loaded = load_run(run)
    base, tokenizer = load_base(loaded.cfg, loaded.dtype)
    heldout = load_data(loaded.cfg.data, tokenizer).heldout
    loss = measure(base, heldout, loaded.cfg.trainer.eval_batch_size, tokenizer.pad_token_id).loss
    assert result["loss_before"] == pytest.approx(loss, rel=1e-6)  # the base's, also where tokens begin at random
    assert abs(result["loss_after"] - loss) > 1e-4

    code, text = terminal(evaluate, f"run={run}")
    assert code == 0 and f"{result['loss_after']:.3f}" in text, text
    drawn = ["prompt=What is 3 plus 3?", "max_new_tokens=9", "temperature=2", "seed=1"]
    code, merged = terminal(generate, f"run={run}", *drawn)
    assert code == 0, merged
    code, apart = terminal(generate, f"run={run}", *drawn, "merge=false")
    assert code == 0 and answers(apart) == answers(merged)


def test_what_peft_has(trained, terminal):
    """prefix_layer as prefix tuning, prefix_embed without infix as prompt tuning: the same logits, says the export."""
    run, _ = trained("prefix_layer", "lr=3e-2")
    code, text = terminal(export, f"run={run}", "to=peft")
    assert code == 0 and "read back: logits of 256 tokens" in text, text
    config = json.loads((run / "peft" / "adapter_config.json").read_text())
    assert config["peft_type"] == "PREFIX_TUNING" and config["num_virtual_tokens"] == 8
    loaded, ids = load_run(run), torch.arange(3, 90)[None]
    theirs = PeftModel.from_pretrained(load_base(loaded.cfg, torch.float32)[0], run / "peft").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=ids).logits, loaded.model(ids).logits, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_exported(trained, terminal, tmp_path):
    run, _ = trained("houlsby")
    for to, message in (
        ("peft", "to=peft: PEFT has nothing that computes method=houlsby"),
        ("merged", "to=merged: method=houlsby adds what dense weights cannot hold"),
        ("bnb4", "to=bnb4: method=houlsby adds what dense weights cannot hold"),
    ):
        code, text = terminal(export, f"run={run}", f"to={to}")
        assert code == 1 and message in text and "Traceback" not in text, text
        assert not (run / to).exists()


def test_a_model_that_got_biases(trained, terminal, tmp_path):
    run, _ = trained("bitfit", "lr=0.3")
    for to in ("merged", "bnb4"):
        code, text = terminal(export, f"run={run}", f"to={to}")
        assert code == 0 and "read back: logits of 256 tokens" in text, text
        config = json.loads((run / to / "config.json").read_text())
        assert config["attention_bias"] and config["mlp_bias"]
    code, text = terminal(export, f"run={run}", "to=peft")
    assert code == 1 and "PEFT has nothing that computes method=bitfit" in text
    assert (run / "adapter" / OUR_CONFIG_FILE).is_file()


@pytest.mark.parametrize("kind", ["prefix_embed", "prefix_layer"])
def test_the_loss_is_that_of_each_text_written_out(kind):
    model, batch, expected = with_prefix("llama", kind), batch_of(TEXTS, left=False), 0.0
    batch["labels"] = torch.full_like(batch["input_ids"], IGNORED)
    for row, (text, prompt) in enumerate(zip(TEXTS, (2, 6, 0))):
        labels = torch.tensor(text[prompt:])
        batch["labels"][row, prompt : len(text)] = labels
        logits = reference(with_prefix("llama", kind), text, prompt)[prompt - 1 if prompt else 0 : -1]
        expected += F.cross_entropy(logits, labels if prompt else labels[1:], reduction="sum").item()
    assert LabelLoss(model)(batch).item() == pytest.approx(expected, rel=1e-5)
    logits, targets = label_logits(model, batch)
    assert F.cross_entropy(logits, targets, reduction="sum").item() == pytest.approx(expected, rel=1e-5)


def test_a_conversation_keeps_the_infix_at_the_first_prompt(trained, monkeypatch):
    """And reads all of it again for each answer: a cache with a prefix is longer than its text."""
    run, _ = trained("prefix_embed", "lr=3e-2")
    writer = generate.Writer(load_run(run), generate.Options(run="", max_new_tokens=7))
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is 3 plus 3?\nand 4?\n/new\nand 5?\n"))
    asked, write = [], generate.Writer.write

    def record(self, prompts, **how):
        asked.append((len(prompts[0]), how["prompt_length"]))
        return write(self, prompts, **how)

    monkeypatch.setattr(generate.Writer, "write", record)
    generate.converse(writer)
    (first, _), (second, _), (third, _) = asked
    assert asked == [(first, first), (second, first), (third, third)] and first < second


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["+method=bitfit", "rslora=true"], "rslora=True is not a setting of adapter 'bitfit'"),
        (["+method=lora", "prefix_tokens=4"], "prefix_tokens=4 is not a setting of adapter 'lora'"),
        (["+method=full", "infix_tokens=4"], "infix_tokens is about adapters, and method=full has none"),
        (["+method=prefix_embed", "prefix_tokens=0"], "set prefix_tokens or infix_tokens to 1 or more"),
        (["+method=prefix_layer", "prefix_tokens=2000"], "are more than the 2048 positions of tiny"),
        (["+method=houlsby", "rank=0"], "rank=0: choose 1 or more"),
        (["+method=bitfit", "trainer.loraplus_lr_ratio=16"], "is about LoRA's A and B, and method=bitfit has none"),
    ],
)
def test_bad_settings(command, overrides, message):
    code, text = command(*overrides)
    assert code == 1 and message in text and "Traceback" not in text, text
