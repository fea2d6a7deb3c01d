"""The planner on mixtures of experts, against what is really allocated and computed, and published sizes."""

import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import kernels
from experiments.config import Config, resolve
from experiments.errors import UserError
from experiments.models.architecture import meta_model
from experiments.models.load import prepare_model, tiny_model
from experiments.plan import __main__ as plan
from experiments.plan.allocations import Allocations
from experiments.plan.budget import budget, planned_model, stored
from experiments.plan.measure import allocated, measure
from experiments.plan.simulate import loss_of, simulate
from experiments.system.cli import composed
from kernels.triton.case import meta, meta_packed
from modules import AdamW, parameter_groups

CPU = torch.device("cpu")
PUBLISHED = {  # parameters in the files on the Hugging Face hub, and those of a token: the models' cards round them
    "qwen3-30b-a3b": (30_532_122_624, 3.3e9),
    "mixtral-8x7b": (46_702_792_704, 12.9e9),
    "gpt-oss-20b": (20_914_757_184, 3.6e9),
    "gpt-oss-120b": (116_829_156_672, 5.1e9),
}


def config(*overrides: str) -> Config:
    return resolve(composed(*overrides, "output_dir=."))


@pytest.fixture(scope="module")
def small_mixture(tmp_path_factory) -> str:
    """A directory with a Qwen3-MoE of odd sizes: experts that are no whole number of blocks."""
    path = tmp_path_factory.mktemp("mixture")
    sizes = {"hidden_size": 120, "moe_intermediate_size": 44, "num_hidden_layers": 2, "vocab_size": 1003}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 20, "tie_word_embeddings": False}
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, num_experts=6, num_experts_per_tok=2))
    model.save_pretrained(path)
    tiny_model(torch.float32, seed=0)[1].save_pretrained(path)
    return f"model.path={path}"


@pytest.mark.parametrize("settings", [["+method=qdora", "rank=3"], ["+method=lora", "rank=3"]], ids=["packed", "dense"])
def test_experts_are_counted_as_they_are_allocated(settings, small_mixture):
    cfg = config("model=hf", small_mixture, *settings)
    there = stored(prepare_model(cfg, CPU, torch.float32)[0])
    needs = budget(cfg, torch.float32, batch=1, seq=8)
    for name in ("packed", "constants", "dense", "adapters"):
        assert getattr(needs, name) == allocated(getattr(there, name)), name
    experts = 2 * 6 * 3 * 120 * 44
    assert needs.packed > experts / 2 if cfg.quant.name != "none" else needs.dense > 4 * experts


@pytest.mark.parametrize(
    "settings",
    [["+method=qlora"], ["+method=qdora", "dropout=0.1", "trainer.gradient_checkpointing=true"], ["+method=full"]],
    ids=["qlora", "qdora-checkpointed", "full"],
)
def test_the_peak_is_within_a_tenth_of_what_is_measured(settings, small_mixture):
    cfg = config("model=hf", small_mixture, "trainer.dtype=float32", "rank=4", *settings)
    measured = measure(cfg, CPU, torch.float32, batch=2, seq=96)
    needs = budget(cfg, torch.float32, batch=2, seq=96, on_cpu=True)
    assert needs.peak(cfg.trainer.gradient_checkpointing) == pytest.approx(measured.peak, rel=0.1)
    assert measured.gradients == needs.gradients and measured.state == needs.state


@pytest.mark.parametrize("method, dropout", [("qlora", 0.0), ("qlora", 0.1), ("lora", 0.0), ("qdora", 0.1)])
def test_flops_of_ops_of_experts_are_those_of_the_products_in_their_twins(method, dropout, small_mixture):
    model = planned_model(
        config(f"+method={method}", "model=hf", small_mixture, "rank=4", f"dropout={dropout}"), torch.float32
    )
    fused, taken_apart = (
        simulate(loss_of(model), AdamW(parameter_groups(model, 1e-3)), 2, 48, on_cpu=on_cpu) for on_cpu in (False, True)
    )
    assert fused.flops == taken_apart.flops


@pytest.mark.parametrize("method", ["full", "qlora"])
def test_one_more_expert_a_token_takes_the_flops_of_one_expert(method, small_mixture, tmp_path):
    """A full fine-tuning takes three products with each weight; an adapter two with each weight and three with its own
    (the first layer needs the gradient of its input too: attention before it has adapters)."""
    settings = json.loads((Path(small_mixture.removeprefix("model.path=")) / "config.json").read_text())
    steps = []
    for k in (2, 3):
        path = tmp_path / f"{k}.json"
        path.write_text(json.dumps(settings | {"num_experts_per_tok": k}))
        cfg = config(f"+method={method}", "model=hf", f"model.path={path}", "rank=4")
        steps.append(budget(cfg, torch.float32, batch=1, seq=48).step(False))
    of_base, of_adapter = 3 * 120 * 44, 4 * (120 + 88) + 4 * (44 + 120)
    products = 3 * of_base if method == "full" else 2 * of_base + 3 * of_adapter
    assert steps[1].flops - steps[0].flops == 48 * 2 * 2 * products
    assert steps[0].idle - steps[1].idle == 2 * (of_base + (of_adapter if method == "qlora" else 0))


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(name):
    model = meta_model(composed("+method=lora", f"model={name}").model, torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name][0]


def test_the_table_says_how_many_parameters_compute(terminal):
    code, text = terminal(plan, "model=mixtral-8x7b", "+method=qlora", "rank=1", "seq=16")
    line = next(line for line in text.splitlines() if "compute for a token" in line)
    assert code == 0 and round(int(line.split()[0].replace(",", "")) / 1e9, 1) == PUBLISHED["mixtral-8x7b"][1] / 1e9


def test_gpus_among_which_experts_can_be_shared(small_mixture):
    given = ["model=hf", small_mixture, "rank=2"]
    with pytest.raises(
        UserError, match=r"gpus=7: .*experts\.\w+ has 6 experts, so shards make sense on 6 GPUs at most"
    ):
        budget(config("+method=lora", *given), torch.bfloat16, 1, 16, gpus=7)
    assert budget(config("+method=qlora", *given), torch.bfloat16, 1, 16, gpus=7).gathered  # codes are cut anywhere


@pytest.mark.parametrize(("on_cpu", "experts"), [(True, 1), (False, 32)])
def test_a_few_experts_are_dense_at_a_time(on_cpu, experts):
    """Of the 128 of Qwen3-30B-A3B on a GPU as many as fit 256 MiB."""
    x, weight = meta(256, 2048, dtype="bf16"), meta_packed(128, 1536, 2048)
    with Allocations(on_cpu) as memory:
        kernels.experts_linear(x, meta(128, dtype=torch.int32), weight)
    assert memory.weight == experts * 1536 * 2048 * 2
