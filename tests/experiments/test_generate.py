"""Generation against a plain loop over the logits; the command: one prompt, many, a conversation, bad input."""

import copy
import io
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments import generate
from experiments.models.generation import decode, own_settings, without_reasoning
from experiments.models.generation import generate as generate_ids
from experiments.models.sampling import Sampling
from experiments.runs.finished import load_run
from modules import adapted_linears, unfuse
from tests.experiments.data import templates
from tests.experiments.helpers import unseal


@pytest.fixture(scope="module")
def wild_run(finished_once, tmp_path_factory) -> Path:
    """A run with a large random adapter: after a few steps of training the tiny model writes nothing but spaces."""
    out = tmp_path_factory.mktemp("wild") / "out"
    shutil.copytree(finished_once, out)
    unseal(out)
    path = out / "adapter" / "adapter_model.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(tensor.shape, generator=generator) if "lora_B" in name else tensor
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def loaded(wild_run):
    return load_run(wild_run)


@pytest.fixture
def write(terminal, wild_run):
    """write(*arguments) runs the command; returns (exit code, what it printed)."""
    return lambda *arguments: terminal(generate, f"run={wild_run}", *arguments)


def greedy(model, prompt: list[int], tokens: int, stop: int) -> list[int]:
    ids = list(prompt)
    with torch.inference_mode():
        while len(ids) < len(prompt) + tokens and stop not in ids[len(prompt) :]:
            ids.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
    return ids[len(prompt) :]


def answers(text: str) -> str:
    """What the command printed but for the machine and the speed."""
    return "\n".join(line for line in text.splitlines() if " on cpu (" not in line and "tokens/s" not in line).strip()


def test_a_batch_is_the_plain_loop_over_each_prompt(loaded):
    prompts = [[5, 9, 40], list(range(20, 33)), [7]]
    expected = [greedy(loaded.model, prompt, 12, loaded.tokenizer.eos_token_id) for prompt in prompts]
    stop = expected[1][4]  # end the second answer early
    loaded.tokenizer.eos_token_id, before = stop, loaded.tokenizer.eos_token_id
    try:
        generated = generate_ids(loaded.model, loaded.tokenizer, prompts, Sampling(12))
    finally:
        loaded.tokenizer.eos_token_id = before
    cut = [ids[: ids.index(stop) + 1] if stop in ids else ids for ids in expected]
    assert generated.ids == cut and len(cut[1]) <= 5
    assert generated.prompt_tokens == 17 and generated.seconds > 0 and generated.prompt_seconds > 0


def test_greedy_is_greedy_whatever_the_model_says(loaded, monkeypatch):
    prompts = [[5, 9, 40], list(range(20, 33)), [7]]
    expected = [greedy(loaded.model, prompt, 12, loaded.tokenizer.eos_token_id) for prompt in prompts]
    own = copy.deepcopy(loaded.model.generation_config)
    own.update(repetition_penalty=3.0, no_repeat_ngram_size=1, num_beams=2, temperature=0.3, min_new_tokens=2)
    monkeypatch.setattr(loaded.model, "generation_config", own)
    assert generate_ids(loaded.model, loaded.tokenizer, prompts, Sampling(12)).ids == expected
    assert loaded.model.generation_config is own
    named = {"repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "num_beams": 2, "min_new_tokens": 2}
    assert own_settings(loaded.model) == named


def test_the_settings_of_the_model_are_named_when_tokens_are_drawn(write, monkeypatch):
    plain = write("prompt=hello", "temperature=1", "max_new_tokens=3")[1]
    assert "generation_config.json" not in plain
    load = generate.load_run

    def with_penalty(*arguments):
        run = load(*arguments)
        run.model.generation_config.repetition_penalty = 1.3
        return run

    monkeypatch.setattr(generate, "load_run", with_penalty)
    text = write("prompt=hello", "temperature=1", "max_new_tokens=3")[1]
    assert "from the model's generation_config.json: repetition_penalty=1.3" in text
    assert "transformers' own loop writes this" in text and "own loop" not in plain
    greedy_text = write("prompt=hello", "max_new_tokens=3")[1]
    assert "generation_config.json" not in greedy_text and "own loop" not in greedy_text


def test_an_answer_ends_at_the_end_token_of_the_template(loaded):
    [long] = generate_ids(loaded.model, loaded.tokenizer, [[5, 9, 40]], Sampling(12)).ids
    tokenizer = copy.deepcopy(loaded.tokenizer)
    end = tokenizer.convert_ids_to_tokens(long[4])
    tokenizer.add_special_tokens({"additional_special_tokens": [end]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + m.content + '" + end + "' }}{% endfor %}"
    [cut] = generate_ids(loaded.model, tokenizer, [[5, 9, 40]], Sampling(12)).ids
    assert cut == long[: long.index(long[4]) + 1]


def test_an_answer_is_told_from_its_reasoning():
    tokenizer = templates.tokenizer(templates.QWEN3)
    ids = tokenizer("<think>\n4 or 5\n</think>\n\n4<|im_end|>")["input_ids"]
    assert decode(tokenizer, without_reasoning(tokenizer, ids)).strip() == "4"
    tokenizer.chat_template = templates.LLAMA3
    assert without_reasoning(tokenizer, ids) == ids


def test_drawn_tokens_follow_the_settings(loaded):
    greedy_ids = generate_ids(loaded.model, loaded.tokenizer, [[5, 9]], Sampling(8)).ids
    assert generate_ids(loaded.model, loaded.tokenizer, [[5, 9]], Sampling(8, 0.7, top_k=1)).ids == greedy_ids
    assert generate_ids(loaded.model, loaded.tokenizer, [[5, 9]], Sampling(8, 0.7, top_p=1e-6)).ids == greedy_ids

    def drawn(seed):
        torch.manual_seed(seed)
        return generate_ids(loaded.model, loaded.tokenizer, [[5, 9]], Sampling(8, 5.0)).ids

    assert drawn(0) == drawn(0) != drawn(1)
    torch.manual_seed(0)
    many = generate_ids(loaded.model, loaded.tokenizer, [[5, 9]] * 512, Sampling(1, 2.0)).ids
    with torch.inference_mode():
        probabilities = (loaded.model(torch.tensor([[5, 9]])).logits[0, -1] / 2.0).softmax(-1)
    share = sum(ids[0] in set(probabilities.topk(30).indices.tolist()) for ids in many) / 512
    expected = probabilities.topk(30).values.sum().item()
    assert abs(share - expected) < 4 * (expected * (1 - expected) / 512) ** 0.5


def test_one_prompt_streams_what_many_give(write, tmp_path):
    drawn = ["max_new_tokens=9", "temperature=2", "seed=1"]
    code, alone = write("prompt=What is 3 plus 3?", *drawn)
    assert code == 0 and "tokens/s" in alone and len(answers(alone)) > 3, alone
    (tmp_path / "prompts.txt").write_text("What is 3 plus 3?\n\nAnd {you}, 'what=is' this?\n")
    code, many = write(f"prompts={tmp_path / 'prompts.txt'}", "batch_size=1", *drawn)
    assert code == 0 and "[2] And {you}, 'what=is' this?" in many
    assert answers(alone) in many
    code, apart = write("prompt=What is 3 plus 3?", "merge=false", *drawn)
    assert code == 0 and answers(apart) == answers(alone)
    for change in ("chat=false", "system=Be brief.", "seed=2"):
        code, other = write("prompt=What is 3 plus 3?", *drawn[:2], change)
        assert code == 0 and answers(other) != answers(alone), change


def test_a_conversation_with_kept_keys_and_values_is_one_without(write, loaded, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO('What is 3 plus 3?\n/help\nand 4?\n/new\n"""\nand 4?\nand 5?\n"""\n'))
    code, text = write("max_new_tokens=7", "temperature=2")
    assert code == 0 and text.count("/new begins another conversation") == 1, text
    text = text.replace(generate.COMMANDS, "")
    writer = generate.Writer(loaded, generate.Options(run="", max_new_tokens=7, temperature=2.0))
    tokenizer, messages, expected = loaded.tokenizer, [], []
    for message in ("What is 3 plus 3?", "and 4?", None, "and 4?\nand 5?"):
        if message is None:
            messages = []
            continue
        messages.append({"role": "user", "content": message})
        [new] = writer.write([writer.encode_messages(messages)]).ids
        messages.append({"role": "assistant", "content": tokenizer.decode(new, skip_special_tokens=True)})
        expected.append(messages[-1]["content"])
    assert len(set(expected)) == 3
    assert answers(text).split() == "\n".join(expected).split()


def test_merging_leaves_plain_linears(wild_run, loaded):
    dense = load_run(wild_run, dense=True)
    assert adapted_linears(loaded.model) and not adapted_linears(dense.model)
    unfuse(dense.model)
    assert {type(m).__module__.split(".")[0] for m in dense.model.modules()} <= {"torch", "transformers"}
    ids = torch.arange(3, 60).unsqueeze(0)
    with torch.inference_mode():
        torch.testing.assert_close(dense.model(ids).logits, loaded.model(ids).logits, rtol=1e-4, atol=1e-5)


BAD = {
    "unknown key": (["promt=x"], "no such key: promt; did you mean prompt or prompts?"),
    "no equals sign": (["hello"], "hello: give it as key=value; --help lists the keys"),
    "not a number": (
        ["prompt=x", "max_new_tokens=many"],
        "max_new_tokens=many: choose a whole number",
    ),
    "twice": (["prompt=x", "seed=1", "seed=2"], "seed= is there twice"),
    "tokens": (["prompt=x", "max_new_tokens=0"], "max_new_tokens=0: choose 1 or more"),
    "too many tokens": (["prompt=x", "max_new_tokens=2048"], "are more than the 2048 that the model can have"),
    "temperature": (["prompt=x", "temperature=-1"], "temperature=-1.0: choose 0 or more"),
    "top_p": (["prompt=x", "top_p=0"], "top_p=0.0: choose a number above 0, up to 1"),
    "top_k": (["prompt=x", "top_k=-1"], "top_k=-1: choose 0 or more"),
    "batch_size": (["prompt=x", "batch_size=0"], "batch_size=0: choose 1 or more"),
    "empty": (["prompt=", "chat=false"], "an empty prompt"),
    "system without chat": (["prompt=x", "chat=false", "system=y"], "system=… is part of a chat template"),
    "conversation without chat": (["chat=false"], "a conversation needs the chat template"),
    "no prompts file": (["prompts=/nowhere.txt"], "/nowhere.txt: cannot read this file"),
    "device": (["prompt=x", "trainer.device=tpu"], "trainer.device=tpu: choose auto, cpu or cuda"),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD)
def test_bad_input_is_one_line(write, arguments, message):
    code, text = write(*arguments)
    assert code == 1 and message in text and "Traceback" not in text, text


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda out: out.rename(out.with_name("gone")), "no such directory"),
        (lambda out: (out / "config.yaml").unlink(), "no config.yaml there, so this is not a run's directory"),
        (lambda out: (out / "config.yaml").write_text("rank: [4"), "config.yaml: while parsing"),
        (lambda out: (out / "config.yaml").write_text("rnk: 4"), "config.yaml: Key 'rnk' not in 'Config'"),
        (lambda out: (out / "adapter").rename(out / "old"), "neither adapter/ nor model/ there"),
        (lambda out: (out / "adapter" / "adapter_model.safetensors").write_bytes(b"no"), "adapter"),
    ],
    ids=["no directory", "no config", "not YAML", "other keys", "no weights", "damaged weights"],
)
def test_no_run_there(terminal, finished_once, tmp_path, damage, message):
    out = tmp_path / "out"
    (out / "adapter").mkdir(parents=True)
    for name in ("config.yaml", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"):
        (out / name).write_bytes((finished_once / name).read_bytes())
    damage(out)
    code, text = terminal(generate, f"run={out}", "prompt=x")
    assert code == 1 and message in text and "Traceback" not in text, text


def test_help_and_a_missing_key(terminal):
    code, text = terminal(generate, "--help")
    assert code == 0 and "prompt=TEXT" in text
    code, text = terminal(generate, "prompt=x")
    assert code == 1 and "run= is missing; --help explains it" in text
