"""Evaluation and training against plain formulas."""

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from experiments.config import ModelConfig, TrainerConfig, resolve
from experiments.data.chat import IGNORED, Example
from experiments.data.samples import collate
from experiments.errors import UserError
from experiments.models.generation import answer
from experiments.models.load import load_model
from experiments.runs import one_run
from experiments.system.cli import composed
from experiments.training import evaluation
from experiments.training.engines import Engine
from experiments.training.evaluation import Evaluation, evaluate, label_logits
from experiments.training.gradients import accumulate
from experiments.training.loop import Trainer
from experiments.training.loss import LabelLoss
from experiments.training.trained import lr_factor
from tests.experiments.helpers import SMALL, TINY, write_chats


@pytest.fixture(scope="module")
def tiny():
    return load_model(ModelConfig(name="tiny", source="tiny"), torch.float32, seed=0)


def example(length: int, labelled: int, seed: int) -> Example:
    ids = torch.randint(3, 200, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Example(ids, [IGNORED] * (length - labelled) + ids[length - labelled :])


EXAMPLES = [example(9, 3, 0), example(14, 5, 1), example(6, 6, 2), example(11, 1, 3)]


def test_label_logits_are_those_of_the_whole_sequence(tiny):
    model, tokenizer = tiny
    batch = collate(EXAMPLES, tokenizer.pad_token_id)
    logits, targets = label_logits(model, batch)
    whole = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    torch.testing.assert_close(logits, whole[labels != IGNORED], rtol=1e-5, atol=1e-5)
    assert targets.tolist() == labels[labels != IGNORED].tolist()


@pytest.mark.parametrize("at_once", [1, 2**13, 2**25])
def test_evaluate_is_the_mean_over_labelled_tokens(tiny, monkeypatch, at_once):
    monkeypatch.setattr(evaluation, "FP32_BYTES", at_once)
    model, tokenizer = tiny
    losses, hits = [], []
    for one in EXAMPLES:
        logits = model(torch.tensor([one.input_ids])).logits[0, :-1].double()
        for position, label in enumerate(one.labels[1:]):
            if label != IGNORED:
                losses.append(-logits[position].log_softmax(-1)[label].item())
                hits.append(logits[position].argmax().item() == label)
    measured = evaluate(model, EXAMPLES, batch_size=3, pad_id=tokenizer.pad_token_id)
    assert measured.tokens == len(losses) == 14  # the first token of the third example has nothing before it
    assert measured.loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert measured.token_accuracy == pytest.approx(sum(hits) / len(hits))


def test_accumulated_gradients_are_those_of_one_large_batch(tiny):
    model, tokenizer = tiny
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    parameters = list(model.parameters())

    def gradients(group):
        model.zero_grad()
        loss = accumulate(LabelLoss(model), group, tokenizer.pad_token_id, torch.float32, scaler, Engine(model.device))
        return loss, [p.grad.clone() for p in parameters]

    loss, grads = gradients([EXAMPLES])
    split_loss, split_grads = gradients([EXAMPLES[:1], EXAMPLES[1:]])
    assert split_loss == pytest.approx(loss, rel=1e-6)
    for one, other in zip(grads, split_grads):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    model.zero_grad()


def test_answer_continues_each_prompt_as_it_would_alone(tiny):
    model, tokenizer = tiny
    prompts = [EXAMPLES[0].input_ids, EXAMPLES[1].input_ids]
    together = answer(model, tokenizer, prompts, 6)
    assert together == [answer(model, tokenizer, [prompt], 6)[0] for prompt in prompts]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_a_number_never_reaches_the_weights(tmp_path, monkeypatch, last, value):
    where = [f"data.path={write_chats(tmp_path)}", "data=jsonl", f"output_dir={tmp_path / 'out'}"]
    steps = [f"trainer.steps={3 if last else 6}", "trainer.checkpoint_every=1", "trainer.grad_accum=1"]
    step, good = Trainer.step, {}

    def faulty(self, group):
        if self.trained.steps < 2:
            return step(self, group)
        good.update({name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad})
        handle = self.parameters[0].register_hook(lambda gradient: gradient * value)
        try:
            return step(self, group)
        finally:
            handle.remove()

    monkeypatch.setattr(Trainer, "step", faulty)
    with pytest.raises(
        UserError, match=r"the gradients became (nan|inf) at step 3, under a loss of .* weights of step 2"
    ):
        one_run.run(resolve(composed("+method=lora", *TINY, *SMALL, *where, *steps)))
    kept = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert len(kept) == len(good) and all(tensor.isfinite().all() for tensor in kept.values())
    saved = load_file(tmp_path / "out" / "checkpoints" / "step-00000002" / "weights.safetensors")
    for name, tensor in saved.items():
        torch.testing.assert_close(tensor, good[name], rtol=0, atol=0)
    assert not (tmp_path / "out" / "result.json").exists()


@pytest.mark.parametrize("step", [0, 2])
def test_a_heldout_loss_that_is_not_a_number_ends_the_run(tmp_path, monkeypatch, step):
    where = [f"data.path={write_chats(tmp_path)}", "data=jsonl", f"output_dir={tmp_path / 'out'}"]
    found = [Evaluation(3.0, 0.0, 1)] * (step > 0) + [Evaluation(float("nan"), 0.0, 1)]
    monkeypatch.setattr(one_run, "evaluate_each", lambda *_: (found.pop(0), []))
    message = "is nan before training, in float32" if step == 0 else "became nan after step 2"
    with pytest.raises(UserError, match=f"the held-out loss {message}"):
        one_run.run(resolve(composed("+method=lora", *TINY, *SMALL, *where, "trainer.steps=2")))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rate(schedule):
    trainer = TrainerConfig(name="test", steps=20, batch_size=1, warmup=0.2, schedule=schedule)
    factors = [lr_factor(step, trainer) for step in range(20)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert factors[-1] == 1.0 if schedule == "constant" else 0 < factors[-1] < 0.1
    assert factors[12] == pytest.approx(1.0 if schedule == "constant" else 0.5)
