"""Steps of mixtures of experts: on packs, with checkpointing, pages and accumulation, and as CUDA graphs."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from experiments.config import resolve
from experiments.data.packing import epoch_packs
from experiments.models.tiny import byte_tokenizer
from experiments.system.cli import composed
from experiments.training.graphs import cannot_capture
from experiments.training.loop import Trainer
from modules import attach, fuse, quantize
from modules.fused.attention import without_mask
from tests.experiments.training.test_packed_steps import assert_close, gradients, one_by_one, samples
from tests.modules.moe_cases import MODELS, moe_model
from tests.survey.small import config_of

aten = torch.ops.aten
WAITS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.equal)
TOKENS = 64


def trainer(kind: str, *overrides: str) -> Trainer:
    cfg = resolve(composed("+method=qdora", "model=tiny", "rank=4", "output_dir=.", *overrides))
    model = moe_model(kind)
    quantize(model)
    attach(model, "dora", rank=4, dropout=cfg.dropout)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):  # zeros would leave A without a gradient
            torch.nn.init.normal_(parameter, std=0.1)
    return Trainer(model.train(), cfg, torch.float32, byte_tokenizer(259).pad_token_id)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "llama4_text", "deepseek_v3"])
def test_loss_and_gradients_of_packs_are_those_of_the_samples_one_by_one(kind):
    run = trainer(kind, "data.packing=true", f"trainer.tokens={TOKENS}", "trainer.grad_accum=2")
    group = list(epoch_packs(samples(), TOKENS, seed=0, epoch=0))[:2]
    assert_close(gradients(run, group), one_by_one(run, group))


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_checkpointing_and_pages_give_the_same_bits(kind, tmp_path):
    results = []
    pages = ["optim.paged=true", "optim.budget_mb=4", f"output_dir={tmp_path}"]
    for settings in ([], ["trainer.gradient_checkpointing=true"], pages):
        run = trainer(kind, "dropout=0.1", "trainer.grad_accum=2", *settings)
        torch.manual_seed(0)
        for _ in range(2):
            run.step([samples(3), samples(5)])
        results.append([parameter.detach().clone() for parameter in run.parameters])
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


class _Waits(TorchDispatchMode):
    """Notes the operations that make the host wait for values on a device."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in WAITS:
            self.found.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", MODELS[:-1])  # the last is a hybrid, which needs a mask
def test_no_step_waits_for_routing(kind):
    """On the meta device, where our ops do not run: their Triton kernels leave the numbers of rows on the device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(kind)).train()
    quantize(model)
    attach(model, "dora", rank=2)
    fuse(model)
    ids = torch.zeros(2, 16, dtype=torch.int64, device="meta")
    with without_mask(model), _Waits() as waits:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    assert not waits.found


def test_experts_that_make_the_host_wait_are_named():
    cfg = resolve(composed("+method=lora", "model=tiny", "output_dir=."))
    model = moe_model("qwen3_moe")
    attach(model, "lora", rank=2, target_modules=["q_proj"])
    assert cannot_capture(cfg, model) is None
    model = moe_model("qwen3_moe")
    attach(model, "lora", rank=2, target_modules=["q_proj"], modules_to_save=["gate_up_proj"])
    assert "experts.gate_up_proj trains whole, and the host asks" in cannot_capture(cfg, model)
    assert "is of experts of a class not known here" in cannot_capture(cfg, moe_model("dbrx"))
