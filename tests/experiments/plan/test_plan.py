"""The planner against what is really allocated and computed, published sizes, and bad input."""

import json
import re

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from experiments.config import Config, ModelConfig, resolve
from experiments.errors import UserError
from experiments.models.architecture import meta_model
from experiments.models.load import prepare_model, tiny_model
from experiments.plan import __main__ as plan
from experiments.plan import claims
from experiments.plan.budget import budget, planned_model, shard_bytes, stored
from experiments.plan.cards import CARDS
from experiments.plan.measure import allocated, measure
from experiments.plan.packs import pack_inputs
from experiments.plan.simulate import Step, loss_of, simulate
from experiments.runs.result_numbers import nbytes
from experiments.system.cli import composed
from experiments.training.engines import FSDP
from experiments.training.optim import make_optimizer
from modules import AdamW, parameter_groups
from modules.paging import PAGE_BYTES
from tests.survey import small

CPU = torch.device("cpu")
PUBLISHED = {  # parameters, as the files on the Hugging Face hub have them
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "gemma-3-1b": 999_885_952,
    "smollm2-135m": 134_515_008,
}


def config(*overrides: str) -> Config:
    return resolve(composed(*overrides, "output_dir=."))


@pytest.fixture(scope="module")
def small_llama(tmp_path_factory) -> str:
    """A directory with a Llama of odd sizes: rows that are no whole number of blocks, grouped key and value heads."""
    path = tmp_path_factory.mktemp("small")
    _, tokenizer = tiny_model(torch.float32, seed=0)
    torch.manual_seed(0)
    sizes = {"hidden_size": 120, "intermediate_size": 328, "num_hidden_layers": 3, "vocab_size": 1003}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": False}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return f"model.path={path}"


# ------------------------------------------------------------------------------------------ beside what is allocated


@pytest.mark.parametrize(
    "model, settings",
    [
        pytest.param("smollm2", ["+method=qdora", "optim=adamw8bit"], marks=pytest.mark.smollm2),
        ("hf", ["+method=qlora", "rank=5", "quant.blocksize=32", "optim=adamw8bit"]),
        ("hf", ["+method=qdora", "rank=7", "quant.double=false", "bias=all", "modules_to_save=[lm_head]"]),
        ("hf", ["+method=lora", "init=pissa", "freeze_A=true"]),
        ("hf", ["+method=full", "optim=adamw8bit"]),
    ],
    ids=["smollm2", "qlora", "qdora", "pissa", "full"],
)
def test_weights_adapters_and_optimizer_state_are_those_allocated(model, settings, small_llama):
    cfg = config(f"model={model}", *settings, *([small_llama] if model == "hf" else []))
    real, _ = prepare_model(cfg, CPU, torch.float32)
    optimizer = make_optimizer(cfg, parameter_groups(real, cfg.lr))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    there = stored(real)
    states = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    gradients = [p.grad for p in real.parameters() if p.requires_grad]
    needs = budget(cfg, torch.float32, batch=1, seq=8)
    for name in ("packed", "constants", "dense", "adapters"):
        assert getattr(needs, name) == allocated(getattr(there, name)), name
    assert needs.gradients == allocated(gradients)
    assert needs.state == needs.states[cfg.optim.name] == allocated(states)


@pytest.mark.parametrize(
    "settings",
    [
        ["+method=qlora"],
        ["+method=qlora", "trainer.gradient_checkpointing=true", "trainer.grad_accum=2"],
        ["+method=qdora", "dropout=0.1", "optim=adamw8bit"],
        ["+method=lora", "trainer.dtype=bfloat16"],
        ["+method=qlora", "trainer.mlp_tokens=64", "trainer.gradient_checkpointing=true"],
        ["+method=qlora", "data.packing=true", "trainer.tokens=384"],
        ["+method=full", "trainer.gradient_checkpointing=true"],
        ["+method=full", "trainer.dtype=bfloat16"],
        ["+method=full", "trainer.dtype=bfloat16", "trainer.gradient_checkpointing=true"],
    ],
    ids=[
        "qlora",
        "checkpointed",
        "qdora",
        "bf16",
        "mlp-in-parts",
        "packed",
        "full",
        "autocast",
        "autocast-checkpointed",
    ],
)
def test_the_peak_is_within_a_tenth_of_what_is_measured(settings, small_llama):
    dtype = torch.bfloat16 if "trainer.dtype=bfloat16" in settings else torch.float32
    cfg = config("model=hf", small_llama, "trainer.dtype=float32", *settings)
    measured = measure(cfg, CPU, dtype, batch=2, seq=192)
    needs = budget(cfg, dtype, batch=2, seq=192, on_cpu=True)
    assert needs.peak(cfg.trainer.gradient_checkpointing) == pytest.approx(measured.peak, rel=0.1)
    assert measured.gradients == needs.gradients and measured.state == needs.state


@pytest.mark.parametrize(
    ("kind", "dtype", "packing"),
    [
        ("llama", "bfloat16", True),
        ("gemma3", "float32", True),  # two masks, of which one has a window
        ("gpt2", "bfloat16", True),  # attention with dropout, which no kernel has
        ("gemma3", "bfloat16", False),
    ],
)
def test_the_peak_with_masks(kind, dtype, packing, tmp_path):
    """Of a pack of shorter samples: a block of queries sees the keys of few of them."""
    sizes = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 16}
    types = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 128}
    model = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**sizes, **more)),
        "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **more, **types)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)),
    }
    model[kind]().save_pretrained(tmp_path)
    tiny_model(torch.float32, seed=0)[1].save_pretrained(tmp_path)
    packs = ["data.packing=true", "trainer.tokens=768"] if packing else []
    more = [f"trainer.dtype={dtype}", "trainer.gradient_checkpointing=true", *packs]
    cfg = config("model=hf", f"model.path={tmp_path}", "+method=qlora", "rank=4", *more)
    measured = measure(cfg, CPU, getattr(torch, dtype), batch=8, seq=96)
    needs = budget(cfg, getattr(torch, dtype), batch=8, seq=96, on_cpu=True)
    assert needs.peak(True) == pytest.approx(measured.peak, rel=0.03)


@pytest.mark.parametrize(
    ("model_type", "masks"),
    [("llama", 0), ("mistral", 0), ("gemma3_text", 0), ("opt", 0), ("gemma2", 2), ("gpt_oss", 2), ("falcon", 1)],
)
def test_masks_of_packs_on_a_gpu(model_type, masks):
    """As tests/experiments/training/test_packing.py finds what keeps samples apart there."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(small.config_of(model_type))
    assert len(pack_inputs(model, 4096, 512, on_cpu=False)[1]) == masks


def test_pages_on_the_device(small_llama, tmp_path):
    pages = ["optim.paged=true", "optim.budget_mb=4", f"output_dir={tmp_path}"]
    cfg = resolve(composed("+method=full", "model=hf", small_llama, *pages))
    whole = budget(config("+method=full", "model=hf", small_llama), torch.float32, 1, 64)
    needs = budget(cfg, torch.float32, 1, 64)
    assert needs.state == PAGE_BYTES < whole.state
    assert needs.peak(False) == whole.peak(False) - whole.state + PAGE_BYTES
    assert measure(cfg, CPU, torch.float32, 1, 64).state == PAGE_BYTES


# ------------------------------------------------------------------------------------------ FLOPs, sizes, shards


@pytest.mark.parametrize("method", ["qlora", "lora", "qdora"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_flops_of_our_ops_are_those_of_the_products_in_their_twins(method, dropout):
    cfg = config(f"+method={method}", "model=tiny", "rank=4", f"dropout={dropout}")
    model = planned_model(cfg, torch.float32)
    steps = [
        simulate(loss_of(model), AdamW(parameter_groups(model, 1e-3)), 2, 48, checkpointing=again, on_cpu=on_cpu)
        for again in (False, True)
        for on_cpu in (False, True)
    ]
    assert steps[0].flops == steps[1].flops < steps[2].flops == steps[3].flops


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(name):
    model = meta_model(composed("+method=lora", f"model={name}").model, torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


def test_gpt3_and_gemma_3_27b_are_near_what_their_names_say():
    for name, billions in (("gpt3-175b", 175), ("gemma-3-27b", 27)):
        model = meta_model(composed("+method=lora", f"model={name}").model, torch.bfloat16)
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(billions * 1e9, rel=0.01)


@pytest.mark.parametrize("gpus", [2, 3, 8])
def test_shards_are_those_that_fsdp_makes(gpus):
    """Of a process that believes in others."""
    model, _ = prepare_model(config("+method=qdora", "model=tiny", "rank=6"), CPU, torch.float32)
    planned = shard_bytes(stored(model), gpus)
    dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    try:
        FSDP(CPU).place(model)
    finally:
        dist.destroy_process_group()
    local = {id(t): t.to_local() if hasattr(t, "to_local") else t for t in (*model.parameters(), *model.buffers())}
    assert planned == nbytes(local.values())


def test_totals_on_several_gpus():
    needs = budget(config("+method=qlora", "model=tiny", "rank=4"), torch.bfloat16, 1, 64)
    assert needs.sharded(1, True) == needs.replicated(1, True) == needs.peak(True)
    assert needs.replicated(4, True) == needs.peak(True) + needs.gradients - needs.state + needs.state // 4
    eight = budget(config("+method=qlora", "model=tiny", "optim=adamw8bit"), torch.bfloat16, 1, 64)
    assert eight.sharded(2, False) is None


# ------------------------------------------------------------------------------------------ what is printed


def test_65b_in_48_gb(terminal):
    given = ["model=llama-65b", "+method=qlora", "rank=64", "batch=1", "seq=512", "gpu=a6000", "tokens=1e6"]
    code, text = terminal(plan, *given)
    assert code == 0, text
    for line in (
        "66,085,199,872 parameters, of which 799,539,200 train (1.210%); 4.127 bits a weight in the linears",
        "weights, packed                              32,380,026,880    32.380",
        "adapters                                      3,198,156,800     3.198",
    ):
        assert line in text, text
    assert re.search(r"RTX A6000, 48 GB +2 GPUs, sharded +1 GPU\n", text), text


def test_8b_with_qlora_at_32k_tokens_on_one_card_of_80_gb():
    given = ["model=qwen3-8b", "+method=qlora", "rank=16", "trainer.gradient_checkpointing=true"]
    plain, both = (
        budget(config(*given, *more), torch.bfloat16, 1, 32768)
        for more in ([], ["trainer.mlp_tokens=4096", "trainer.offload_activations=true"])
    )
    hidden = 32768 * 4096 * 2  # bytes of the input of a block
    assert both.step(True).host == 36 * hidden
    assert plain.step(True).activations - both.step(True).activations == pytest.approx(36 * hidden, rel=0.03)
    usable = CARDS["h100"].usable_bytes
    assert plain.peak(False) > usable > plain.peak(True) > both.peak(True)
    assert (round(plain.peak(True) / 1e9, 1), round(both.peak(True) / 1e9, 1)) == (22.7, 10.4)


def test_a_pack_is_planned_as_one_row():
    given = ["+method=qlora", "model=tiny", "rank=4"]
    packed = budget(config(*given, "data.packing=true", "trainer.tokens=4096"), torch.bfloat16, 1, 64)
    assert packed.tokens == 4096 > packed.longest  # positions begin anew
    with pytest.raises(UserError, match=r"seq=64 fits no pack of trainer\.tokens=32: raise it"):
        budget(config(*given, "data.packing=true", "trainer.tokens=32"), torch.bfloat16, 1, 64)


def test_claims(monkeypatch):
    """With peaks that are made up: of a real one there is the test above."""
    step = Step(peak=40 * 10**9, phase="loss", activations=0, loss=0, weight=0, flops=1)
    monkeypatch.setattr("experiments.plan.budget.loss_of", lambda _: None)
    monkeypatch.setattr("experiments.plan.budget.simulate", lambda *_: step)
    rows = {row.what: row for row in claims.claims()}
    assert rows["NF4 with double quantization, bits a weight"].here == "4.127"
    assert rows["what double quantization saves on 65B"].here == "0.373 bits, 3.02 GB"
    assert rows["finetuning LLaMA 65B on one GPU of 48 GB"].holds
    assert rows["GPT-3 175B: fewer trainable parameters with LoRA"].here == "9,251 times"
    assert rows["GPT-3 175B: memory of training with LoRA"].here.startswith("349 GB of weights")
    assert claims.table(list(rows.values())).count("≠") == sum(not row.holds for row in rows.values())


def test_a_local_config_json_is_enough(terminal, small_llama):
    code, text = terminal(plan, "model=hf", f"{small_llama}/config.json", "+method=qdora", "gpus=4", "rank=8")
    assert code == 0 and "cannot" not in text and "4.1" in text, text


def test_a_card_without_bf16_is_planned_in_fp16_and_it_is_said(terminal):
    given = ["model=tiny", "+method=qlora", "rank=4", "seq=16", "gpu=t4"]
    code, text = terminal(plan, *given)
    lines = [line for line in text.splitlines() if line.endswith("   with trainer.dtype=float16")]
    assert code == 0 and [line.partition(", 16 GB")[0] for line in lines] == ["T4", "1,000,000,000 tokens on T4"]
    code, half = terminal(plan, *given, "trainer.dtype=float16")
    assert code == 0 and "with trainer.dtype" not in half
    sizes = [[line for line in one.splitlines() if line.startswith("peak of a step")] for one in (text, half)]
    assert sizes[0] == sizes[1] and sizes[0]


def test_a_plot(terminal, tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.plan.plot.SIZES", ("tiny",))
    monkeypatch.setattr("experiments.plan.plot.LENGTHS", (16, 64))
    code, text = terminal(plan, "model=tiny", "+method=lora", "rank=4", "seq=32", "plot=true", f"output_dir={tmp_path}")
    assert code == 0 and f"Written: {tmp_path}/tiny-lora.png" in text, text
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-lora.png"]


def test_the_plan_beside_a_run(terminal):
    code, text = terminal(plan, "model=tiny", "+method=qdora", "rank=4", "seq=64", "measure=true", "trainer=cpu")
    assert code == 0 and re.search(r"adapters +40,960 +40,960 +equal\n", text) and "s a step" in text, text


@pytest.mark.parametrize(
    "given, message",
    [
        (["model=llama-8b"], "model=llama-8b: no such model; did you mean llama-3-8b?"),
        (["gpus=33"], "k_proj has 32 rows, so shards make sense on 32 GPUs at most"),
        (["gpus=0"], "gpus=0: choose 1 or more"),
        (["seq=1"], "a sequence of one token has none to predict"),
        (["seq=4096"], "seq=4096 is longer than the 2048 tokens that model=tiny can have"),
        (["gpu=h10"], "gpu=h10: choose one of"),
        (["utilisation=40"], "utilisation=40.0: choose a share above 0, up to 1"),
        (["optim.paged=true", "optim.budget_mb=1"], "optim.budget_mb=1 is smaller than a page: choose 4 or more"),
        (["plot=true", "measure=true"], "leave one of them out"),
        (["model=llama-7b", "measure=true"], "model=llama-7b has shapes for experiments.plan but no weights"),
        (["rank=100"], "rank 100 is out of range"),
    ],
)
def test_bad_input_is_one_line(terminal, given, message):
    code, text = terminal(plan, "+method=qlora", "model=tiny", *given)
    assert code == 1 and message in text and len(text.strip().splitlines()) == 1, text


def test_an_architecture_without_linears_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 0}))
    with pytest.raises(UserError, match="model=hf: LlamaForCausalLM has no linears to pack or to adapt"):
        planned_model(config("+method=qlora", "model=hf", f"model.path={path}"), torch.bfloat16)
    with pytest.raises(UserError, match="is not a causal language model"):
        meta_model(ModelConfig(name="sound", source="preset", architecture={"model_type": "wav2vec2"}), torch.bfloat16)
