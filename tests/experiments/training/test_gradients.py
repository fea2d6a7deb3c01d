"""Gradient checkpointing and accumulation: the plain gradients bit for bit, dropout included; memory; bad input."""

import pytest
import torch
from torch.nn import functional as F

from experiments.config import resolve
from experiments.data.chat import Example
from experiments.data.samples import collate
from experiments.errors import UserError
from experiments.models.load import load_model
from experiments.system.cli import composed
from experiments.training.evaluation import label_logits
from experiments.training.gradients import accumulate
from experiments.training.loop import Trainer
from modules import attach, quantize

METHODS = {
    "full": (None, False),
    "lora": ("lora", False),
    "qlora": ("lora", True),
    "dora": ("dora", False),
    "qdora": ("dora", True),
}


def trainer(method: str, checkpointing: bool = False) -> Trainer:
    adapter, packed = METHODS[method]
    cfg = resolve(
        composed(f"+method={method}", "model=tiny", f"trainer.gradient_checkpointing={checkpointing}", "output_dir=.")
    )
    torch.manual_seed(0)
    model, _ = load_model(cfg.model, torch.float32, seed=0)
    if packed:
        quantize(model)
    if adapter:
        attach(model, adapter, rank=4, dropout=0.25)
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):  # zeros would leave A without a gradient
                torch.nn.init.normal_(p, std=0.1)
    return Trainer(model.train(), cfg, torch.float32, pad_id=0)


def micro_batches(count: int, length: int = 24) -> list[list[Example]]:
    ids = torch.randint(3, 200, (2 * count, length), generator=torch.Generator().manual_seed(0)).tolist()
    examples = [Example(row, [-100] * 4 + row[4:]) for row in ids]
    return [examples[2 * i : 2 * i + 2] for i in range(count)]


def gradients(run: Trainer, group: list[list[Example]]) -> tuple[float, list[torch.Tensor], torch.Tensor]:
    """(loss, gradients, the next random number) of a step with seed 1."""
    torch.manual_seed(1)
    loss = accumulate(run.label_loss, group, run.pad_id, run.dtype, run.scaler, run.engine)
    return loss, [p.grad for p in run.parameters], torch.rand(())


@pytest.mark.parametrize("method", METHODS)
def test_checkpointed_gradients_are_the_plain_ones_bit_for_bit(method):
    group = micro_batches(2)
    loss, grads, after = gradients(trainer(method), group)
    other_loss, other_grads, other_after = gradients(trainer(method, checkpointing=True), group)
    assert loss == other_loss and after == other_after
    for grad, other in zip(grads, other_grads):
        assert grad.abs().max() > 0 and torch.equal(grad, other)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_accumulated_gradients_are_the_sum_of_the_micro_batches_bit_for_bit(checkpointing):
    group = micro_batches(3)
    run = trainer("qdora", checkpointing)
    _, grads, after = gradients(run, group)

    labelled = sum(len(example.input_ids) - 4 for batch in group for example in batch)
    torch.manual_seed(1)
    total = [torch.zeros_like(p) for p in run.parameters]
    for batch in group:
        loss = run.label_loss(collate(batch, run.pad_id)) / labelled
        for sum_, grad in zip(total, torch.autograd.grad(loss, run.parameters)):
            sum_ += grad
    assert torch.rand(()) == after
    for grad, want in zip(grads, total):
        assert torch.equal(grad, want)


def test_dropout_makes_the_difference_that_the_tests_above_look_for():
    """With other random numbers the gradients are others: a recomputation that drew anew would show."""
    run = trainer("lora")
    _, grads, _ = gradients(run, micro_batches(1))
    grads = [grad.clone() for grad in grads]
    run.model.zero_grad()
    torch.manual_seed(2)
    accumulate(run.label_loss, micro_batches(1), run.pad_id, run.dtype, run.scaler, run.engine)
    assert not any(torch.equal(p.grad, grad) for p, grad in zip(run.parameters, grads))


def saved_bytes(run: Trainer, group: list[list[Example]]) -> int:
    """Bytes that the forward pass of a batch keeps for backward, parameters and buffers not counted."""
    own = {t.untyped_storage().data_ptr() for t in (*run.model.parameters(), *run.model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits, targets = label_logits(run.model, collate(group[0], run.pad_id))
        loss = F.cross_entropy(logits, targets)
    del loss
    return sum(kept.values())


def test_less_is_kept_for_backward():
    group = micro_batches(1, length=200)
    plain, checkpointed = (saved_bytes(trainer("qdora", checkpointing), group) for checkpointing in (False, True))
    assert checkpointed < plain / 2


def test_a_model_that_cannot_is_refused(monkeypatch):
    monkeypatch.setattr("transformers.LlamaForCausalLM.supports_gradient_checkpointing", False)
    with pytest.raises(UserError, match="LlamaForCausalLM cannot do trainer"):
        trainer("lora", checkpointing=True)
