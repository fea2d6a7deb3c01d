"""Baselines on disk and back, and beside PEFT's prompt and prefix tuning."""

import json

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from modules import load_adapter, merge, quantize, save_adapter, trainable_parameters
from modules.files.baselines import OUR_CONFIG_FILE, prefix_tuning
from modules.files.bitsandbytes import save_bnb4
from modules.files.checked import SUMS
from tests.modules.architectures import ARCHITECTURES, IDS, dense_model, logits, scramble
from tests.modules.baseline_cases import BASELINE_SETTINGS, with_baseline
from tests.modules.prefix_cases import with_prefix


@pytest.mark.parametrize("adapter", BASELINE_SETTINGS)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "nf4"])
def test_on_disk_and_back(adapter, packed, tmp_path):
    model = with_baseline("llama", adapter, packed, **BASELINE_SETTINGS[adapter])
    scramble(model)
    save_adapter(model, tmp_path, base_model_name="base")
    assert json.loads((tmp_path / OUR_CONFIG_FILE).read_text())["adapter"] == adapter
    again = dense_model("llama")
    if packed:
        quantize(again)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
    mine, theirs = trainable_parameters(model), trainable_parameters(again)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    other = dense_model("opt")
    with pytest.raises(ValueError, match=r"adapter for another model|matches no adapted linear"):
        load_adapter(other, tmp_path)
    assert not trainable_parameters(other).keys() ^ dict(other.named_parameters()).keys()


def test_unsupported_uses_and_bad_files_are_refused(tmp_path):
    for adapter in ("houlsby", "prefix_layer"):
        model = with_baseline(
            "llama", adapter, packed=True, **({"prefix_tokens": 1} if "prefix" in adapter else {"rank": 2})
        )
        with pytest.raises(ValueError, match=f"is {adapter}, which cannot be merged"):
            merge(model)
        with pytest.raises(ValueError, match="a directory of a packed model cannot hold adapters: detach or merge"):
            save_bnb4(model, tmp_path / "out")
    save_adapter(model, tmp_path)
    raw = json.loads((tmp_path / OUR_CONFIG_FILE).read_text())
    (tmp_path / SUMS).unlink()
    for change, message in (
        ({"rank": 4}, "rank is not a setting of adapter 'prefix_layer'"),
        ({"adapter": "ia3"}, "is not a setting of adapter 'ia3'"),
    ):
        (tmp_path / OUR_CONFIG_FILE).write_text(json.dumps(raw | change))
        with pytest.raises(ValueError, match=message):
            load_adapter(dense_model("llama"), tmp_path)
    model(IDS)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_peft_computes_the_same_with_prompt_tuning(architecture, tmp_path):
    model = with_prefix(architecture, "prefix_embed", infix_tokens=0)
    save_adapter(model, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(dense_model(architecture), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(theirs)[:, 3:], logits(model), rtol=1e-4, atol=1e-5)

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    theirs = get_peft_model(dense_model(architecture), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model = dense_model(architecture)
    before = logits(model)
    assert load_adapter(model, tmp_path / "theirs") == []
    assert (logits(model) - before).abs().max() > 1e-2
    torch.testing.assert_close(logits(model), logits(theirs)[:, 4:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_peft_computes_the_same_with_prefix_tuning(architecture, tmp_path):
    model = with_prefix(architecture, "prefix_layer", infix_tokens=0)
    expected = logits(model)
    config, tensors = prefix_tuning(model)
    theirs = get_peft_model(
        dense_model(architecture),
        PrefixTuningConfig(**{key: value for key, value in config.items() if key != "peft_type"}),
    ).eval()
    assert {tuple(p.shape) for p in theirs.prompt_encoder.parameters()} == {tuple(tensors["prompt_embeddings"].shape)}
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.copy_(tensors["prompt_embeddings"])
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-4, atol=1e-5)
