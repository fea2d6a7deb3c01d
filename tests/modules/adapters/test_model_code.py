"""Which linears are left out because of a model's code, and whose results it changes in place."""

import pytest
import torch
from torch import nn

from modules import adapted_linears, attach, load_adapter, quantize, save_adapter
from modules.adapters.model_code import OWN_FORWARD, READ, changed_in_place, left_out, unknown_experts
from modules.adapters.targets import all_linears
from tests.survey.small import build


class WrittenOtherwise(nn.Linear):
    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Doubles(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


def test_a_class_of_its_own():
    model = nn.ModuleDict({"a": WrittenOtherwise(6, 5), "b": Doubles(6, 5, bias=False), "c": Pair(6, 5)})
    assert left_out(model) == {"b": OWN_FORWARD, "c": OWN_FORWARD}
    assert list(all_linears(model)) == ["a"]


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.read, self.called, self.inner = nn.Linear(6, 6), nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6))
        self.config = type("Config", (), {"pretraining_tp": 1})
        nn.init.zeros_(self.called.weight)

    def init_weights(self):
        self.called.weight.data.zero_()

    def forward(self, x):
        if self.config.pretraining_tp > 1:
            return x @ self.called.weight
        return self.called(x.to(self.read.weight.dtype))


def test_reads_of_weights():
    assert left_out(nn.Sequential(Reader())) == {"0.read": READ}


@pytest.mark.parametrize(
    "model_type, last",
    [("mamba2", "out_proj"), ("gemma3n_text", "prediction_coefs"), ("rwkv", "output")],  # RWKV's from the model above
)
def test_of_transformers(model_type, last):
    assert {name.rpartition(".")[2] for name in left_out(build(model_type))} >= {last}


def test_transformers_bloom_and_llama_have_nothing_to_leave_out():
    assert not left_out(build("bloom")) and not left_out(build("llama"))


def test_results_changed_in_place_are_copied():
    model = build("falcon")
    assert changed_in_place(model) == {"transformer.h.0.mlp", "transformer.h.1.mlp"}
    typed = changed_in_place(build("gemma3n_text"))  # `projection: Tensor = …; projection *= …`
    assert "model.per_layer_model_projection" in typed
    attach(model, "dora", rank=4)
    copies = {name for name, layer in adapted_linears(model).items() if layer.copies_result}
    assert copies == {name for name in adapted_linears(model) if ".mlp." in name}


def test_experts_of_unknown_classes_are_counted():
    assert sum(unknown_experts(build("longcat_flash")).values()) > 2 * 3 * 32 * 64
    assert len(unknown_experts(build("jetmoe"))) == 8 and unknown_experts(build("dbrx"))
    model = build("qwen3_moe")
    assert not unknown_experts(build("llama")) and not unknown_experts(model)
    attach(model, "lora", rank=2)
    assert not unknown_experts(model)


def test_narrow_linears_get_the_rank_they_can_have(tmp_path):
    model = build("qwen2_moe")
    attach(model, "lora", rank=16, lora_alpha=32)
    ranks = {name.rpartition(".")[2]: (layer.rank, layer.scaling) for name, layer in adapted_linears(model).items()}
    assert ranks["shared_expert_gate"] == (1, 2.0) and ranks["q_proj"] == (16, 2.0)
    for layer in adapted_linears(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    ids = torch.arange(3, 23).unsqueeze(0)
    with torch.no_grad():
        want = model(ids).logits
        save_adapter(model, tmp_path)
        again = build("qwen2_moe")
        load_adapter(again, tmp_path)
        assert torch.equal(again(ids).logits, want)


def test_asked_for_by_name():
    model = build("mamba2")
    with pytest.raises(ValueError, match=r"out_proj cannot be adapted: the model's code reads its weight"):
        attach(model, "lora", target_modules=["out_proj"])
    assert attach(model, "lora", rank=4, exclude_modules=["out_proj"])  # of which nothing would be left anyway


def test_packing_leaves_them_dense():
    model = build("bamba")
    quantize(model)
    assert type(model.model.layers[0].mamba.out_proj) is nn.Linear
