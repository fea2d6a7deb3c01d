"""Turns of published chat templates: where they begin and end, and what becomes a sample."""

import signal

import pytest

from experiments.config import DataConfig
from experiments.data import rendering
from experiments.data.chat import encode, split
from experiments.data.named_templates import set_template
from experiments.data.template import chat_template
from experiments.errors import UserError
from tests.experiments.data import templates
from tests.experiments.data.conversations import conversation, labelled
from tests.experiments.data.templates import tokenizer

TWO = ("user: q1", "assistant: end 1", "user: q2", "assistant: im 2")

# template, its EOS → the labels of each sample, the end of the last prompt, the token that ends an answer
PUBLISHED = {
    "Qwen3": (
        (templates.QWEN3, "<|endoftext|>"),
        ["<think>\n\n</think>\n\nend 1<|im_end|>", "<think>\n\n</think>\n\nim 2<|im_end|>"],
        "<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "Phi-3": ((templates.PHI3, "<|endoftext|>"), ["end 1<|end|>im 2<|end|>"], "<|assistant|>\n", "<|end|>"),
    "gpt-oss": (
        (templates.GPT_OSS, "<|endoftext|>"),
        ["<|channel|>final<|message|>end 1<|return|>", "<|channel|>final<|message|>im 2<|return|>"],
        "<|start|>assistant",
        "<|return|>",
    ),
    "DeepSeek-V3": (
        (templates.DEEPSEEK, "<|endoftext|>"),
        ["end 1<|endoftext|>im 2<|endoftext|>"],
        "<|Assistant|>",
        "<|endoftext|>",
    ),
    "GLM-4-MoE": (
        (templates.GLM4_MOE, "<|endoftext|>"),
        ["end 1<|user|>im 2<|user|>"],
        "<|assistant|>\n",
        "<|user|>",
    ),
    "Llama-3": (
        (templates.LLAMA3, "<|endoftext|>"),
        ["end 1<|eot_id|>im 2<|eot_id|>"],
        "<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "Gemma": (
        (templates.GEMMA, "<|endoftext|>"),
        ["end 1<end_of_turn>im 2<end_of_turn>"],
        "<start_of_turn>model\n",
        "<end_of_turn>",
    ),
    "no end token": (
        (templates.PLAIN, "<|endoftext|>"),
        ["end 1<|endoftext|>", "im 2<|endoftext|>"],
        "### assistant:\n",
        "<|endoftext|>",
    ),
    "image-text": ((templates.IMAGE_TEXT, "<|endoftext|>"), ["end 1<|end|>im 2<|end|>"], "assistant: ", "<|end|>"),
}


def samples(sample, tok, train_on="all"):
    return [encode(one, tok, 1000, "error") for one in split(sample, tok, train_on)]


@pytest.mark.parametrize("rstrip", [False, True])
@pytest.mark.parametrize(("template", "labels", "prompt", "stop"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_templates(template, labels, prompt, stop, rstrip):
    tok = tokenizer(*template, rstrip=rstrip)
    found = samples(conversation(*TWO), tok)
    assert [labelled(tok, example).replace("\n", "") for example in found] == [
        text.replace("\n", "") for text in labels
    ]
    assert tok.decode(found[-1].prompt_ids).rstrip().endswith(prompt.rstrip())
    assert tok.convert_ids_to_tokens(chat_template(tok).stop) == stop
    [last] = samples(conversation(*TWO), tok, "last")
    assert labels[-1].replace("\n", "").endswith(labelled(tok, last).replace("\n", ""))
    assert "end 1" not in labelled(tok, last)
    # an answer is generated from the tokens that training has before it
    text = chat_template(tok).generation_prompt(conversation(*TWO).messages[:3])
    assert tok(text, add_special_tokens=False)["input_ids"] == last.prompt_ids


@pytest.mark.parametrize("rstrip", [False, True])
@pytest.mark.parametrize("turns", [2, 4])
def test_marks_give_transformers_own_mask(rstrip, turns):
    tok = tokenizer(templates.MARKED, "<|end|>", rstrip)
    messages = conversation(*TWO[:turns]).messages
    oracle = tok.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    example = encode(conversation(*TWO[:turns]), tok, 1000, "error")
    assert example.input_ids == oracle["input_ids"]
    assert [label != -100 for label in example.labels] == [bool(flag) for flag in oracle["assistant_masks"]]


def test_an_end_token_that_swallows_the_newline_is_labelled():
    source = templates.MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    tok = tokenizer(source, "<|end|>", rstrip=True)
    assert labelled(tok, encode(conversation(*TWO), tok, 1000, "error")) == "end 1<|end|>im 2<|end|>"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (templates.QWEN3, "<think>\nwhy\n</think>\n\na<|im_end|>"),
        (
            templates.GPT_OSS,
            "<|channel|>analysis<|message|>why<|end|><|start|>assistant<|channel|>final<|message|>a<|return|>",
        ),
    ],
)
def test_reasoning_is_given_to_the_template(template, text):
    tok = tokenizer(template)
    sample = conversation("user: q", "assistant: a")
    sample.messages[1]["reasoning_content"] = "why"
    [example] = samples(sample, tok)
    assert labelled(tok, example) == text
    assert example.reference == "a"
    answer = example.input_ids[len(example.prompt_ids) :]
    opens = max(i for i, token in enumerate(answer) if token == chat_template(tok).opens)
    assert tok.decode(answer[opens + 1 :], skip_special_tokens=True).strip() == "a"


def test_a_template_that_leaves_something_out_is_refused():
    def refused(template, message, change):
        sample = conversation("user: q", "assistant: a")
        sample.messages[1] |= change
        with pytest.raises(ValueError, match=f"^the tokenizer's chat template leaves out {message}"):
            samples(sample, tokenizer(template))

    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    refused(templates.LLAMA3, "reasoning_content of message 2", {"reasoning_content": "why"})
    refused(templates.LLAMA3, "tool_calls of message 2", {"tool_calls": [call]})
    refused(templates.DEEPSEEK, "the text before </think> of message 2", {"content": "<think>why</think>a"})
    ignores_system = templates.LLAMA3.replace("for m in messages %}", "for m in messages if m.role != 'system' %}", 1)
    with pytest.raises(ValueError, match="leaves out message 1, the system's"):
        samples(conversation("system: be brief", "user: q", "assistant: a"), tokenizer(ignores_system))


def test_turns_that_are_not_learned_from():
    sample = conversation(*TWO)
    tok = tokenizer(templates.LLAMA3)
    object.__setattr__(sample, "trained", (3,))
    [example] = samples(sample, tok)
    assert labelled(tok, example) == "im 2<|eot_id|>"
    assert "end 1<|eot_id|>" in tok.decode(example.input_ids)


def test_a_template_that_asks_for_a_system_message():
    asks = "{% if messages[0].role != 'system' %}{{ raise_exception('a system message comes first') }}{% endif %}"
    tok = tokenizer(asks + templates.LLAMA3)
    [example] = samples(conversation("system: be brief", *TWO), tok)
    assert labelled(tok, example) == "end 1<|eot_id|>im 2<|eot_id|>"
    with pytest.raises(ValueError, match="refuses this conversation: a system message comes first"):
        samples(conversation(*TWO), tok)


def test_a_template_that_writes_other_content():
    with pytest.raises(ValueError, match="leaves out message 1, the user's"):
        samples(conversation(*TWO), tokenizer("{% for m in messages %}{{ m.role + m.content.upper() }}{% endfor %}"))


def test_a_template_that_fails_is_one_line():
    sample = conversation("user: U", "assistant: a")
    with pytest.raises(ValueError, match=r"refuses this conversation: can only concatenate str"):
        samples(sample, tokenizer("{{ 'a' + messages }}"))


LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{{ messages }}"


@pytest.mark.parametrize("source", [LOOPS, LOOPS + "{% generation %}{% endgeneration %}"], ids=["plain", "marked"])
def test_a_template_that_loops_without_end(source, monkeypatch):
    monkeypatch.setattr(rendering, "SECONDS", 0.2)
    handler = signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(UserError, match=r"template takes more than 0.2 s for one conversation: use another one, data"):
        chat_template(tokenizer(source)).marked([{"role": "user", "content": "a"}])
        chat_template(tokenizer(source)).render([{"role": "user", "content": "a"}])
    assert signal.getsignal(signal.SIGVTALRM) == handler and signal.getitimer(signal.ITIMER_VIRTUAL)[0] == 0


def test_a_file_with_a_template_that_loops_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(rendering, "SECONDS", 0.2)
    (tmp_path / "t.jinja").write_text(LOOPS)
    cfg = DataConfig(chat_template=str(tmp_path / "t.jinja"))
    with pytest.raises(UserError, match=r"takes more than 0.2 s for one conversation"):
        set_template(cfg, tokenizer(templates.QWEN3))
