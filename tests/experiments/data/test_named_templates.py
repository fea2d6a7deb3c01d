"""Chat templates from files and by name, what they take beside messages, and which tokens are learned from."""

from dataclasses import replace

import pytest

from experiments.data.chat import IGNORED, encode
from experiments.data.named_templates import NAMED, set_template
from experiments.data.samples import load_data
from experiments.data.template import chat_template
from experiments.errors import UserError
from tests.experiments.data.conversations import chat, conversation, jsonl_config, labelled, pairs, write
from tests.experiments.data.templates import PHI3, QWEN3, tokenizer

TALK = ("system: S", "user: U", "assistant: A", "user: V", "assistant: B")
# The formats as their makers publish them, of TALK.
PUBLISHED = {
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n",
    "llama-3": "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>"
    "\n\nU<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|><|start_header_id|>user"
    "<|end_header_id|>\n\nV<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nB<|eot_id|>",
    "mistral": "<s>[INST] S\n\nU [/INST] A<|endoftext|>[INST] V [/INST] B<|endoftext|>",
    "gemma": "<s><start_of_turn>user\nS\n\nU<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n"
    "<start_of_turn>user\nV<end_of_turn>\n<start_of_turn>model\nB<end_of_turn>\n",
}
LEARNED = {
    "chatml": "A<|im_end|>B<|im_end|>",
    "llama-3": "A<|eot_id|>B<|eot_id|>",
    "mistral": " A<|endoftext|> B<|endoftext|>",
    "gemma": "A<end_of_turn>B<end_of_turn>",
}
# Hermes' and Qwen's way to show tools, in short.
TOOLS = """{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson + '\n' }}{% endfor %}
{{- '<|im_end|>\n' }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'tool' %}
{{- m.content | tojson }}{% else %}{{ m.content }}{% endif %}{% for call in m.tool_calls or [] %}
{{- '<call>' + call.function.name + (call.function.arguments | tojson) + '</call>' }}{% endfor %}
{{- '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def config(**changes):
    return jsonl_config("c.jsonl", **changes)


@pytest.mark.parametrize("name", NAMED)
def test_named_templates_write_the_published_format(name):
    tok = tokenizer(None)
    set_template(config(chat_template=name), tok)
    example = encode(conversation(*TALK), tok, 1000, "error")
    assert tok.decode(example.input_ids) == PUBLISHED[name]
    assert labelled(tok, example) == LEARNED[name]
    prompt = chat_template(tok).generation_prompt(chat(*TALK[:-1]))
    assert tok.decode(example.prompt_ids) == prompt == PUBLISHED[name][: len(prompt)]


def test_a_file(tmp_path):
    (tmp_path / "t.jinja").write_text(PHI3)
    tok = tokenizer(None)
    data = load_data(
        replace(jsonl_config(write(tmp_path / "c.jsonl", *pairs(9))), chat_template=str(tmp_path / "t.jinja")), tok
    )
    assert tok.decode(data.train[0].input_ids).startswith("<|user|>\nquestion") and tok.chat_template == PHI3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            None,
            r"t.jinja: cannot read this file \(No such file or directory\): choose chatml, .*gemma, or a Jinja file",
        ),
        ("a\n{% for %}", r"t.jinja:2: not a Jinja template: "),
        ("hello", r"t.jinja: this template does not read messages, so it is not a chat template"),
    ],
)
def test_files_that_are_not_templates(tmp_path, content, message):
    if content:
        (tmp_path / "t.jinja").write_text(content)
    with pytest.raises(UserError, match=message):
        set_template(config(chat_template=str(tmp_path / "t.jinja")), tokenizer(None))


def test_a_template_whose_tokens_are_missing(tokenizer):
    with pytest.raises(
        UserError, match=r"=gemma writes <start_of_turn>, which this tokenizer lacks: choose chatml, a J"
    ):
        set_template(config(chat_template="gemma"), tokenizer)
    with pytest.raises(
        UserError, match=r"=mistral writes bos_token, which this tokenizer lacks: choose chatml, a Jinja"
    ):
        set_template(config(chat_template="mistral"), tokenizer)


def test_options_of_the_template():
    options = "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    template = QWEN3.replace("{{ '<|im_start|>assistant\n' }}{% endif %}", "{{ '<|im_start|>assistant\n' }}" + options)
    tok = tokenizer(template + "{% endif %}")
    sample = conversation("user: q", "assistant: a")
    thinks = encode(sample, tok, 1000, "error")
    set_template(config(chat_template_kwargs={"enable_thinking": False}), tok)
    quick = encode(sample, tok, 1000, "error")
    assert thinks.input_ids == quick.input_ids
    assert labelled(tok, thinks) == "<think>\n\n</think>\n\na<|im_end|>" and labelled(tok, quick) == "a<|im_end|>"
    assert chat_template(tok).generation_prompt(chat("user: q")).endswith("<think>\n\n</think>\n\n")
    with pytest.raises(UserError, match=r"data.chat_template_kwargs.tools is set here for every template"):
        set_template(config(chat_template_kwargs={"tools": []}), tok)


def test_everything_is_learned_from_but_turns_that_are_context():
    tok = tokenizer(QWEN3)
    sample = conversation(*TALK[1:])
    example = encode(sample, tok, 1000, "error", "everything")
    assert example.labels == example.input_ids and example.reference == "B"
    assert tok.decode(example.prompt_ids).endswith("V<|im_end|>\n<|im_start|>assistant\n")
    set_template(config(chat_template="llama-3"), tok)
    example = encode(replace(sample, trained=(3,)), tok, 1000, "error", "everything")
    ignored = [token for token, label in zip(example.input_ids, example.labels) if label == IGNORED]
    assert tok.decode(ignored) == "A<|eot_id|>"
    cut = encode(sample, tok, 30, "truncate", "everything")
    assert cut.labels == cut.input_ids and len(cut.labels) == 30


def test_tools_their_calls_and_results():
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    call = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
    sample = conversation("user: q", "assistant: a")
    said = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": '{"sum": "3"}'}]
    sample = replace(sample, messages=[sample.messages[0], *said, sample.messages[1]], tools=[tool])
    tok = tokenizer(TOOLS)
    example = encode(sample, tok, 1000, "error")
    assert labelled(tok, example) == '<call>add{"x": 1}</call><|im_end|>a<|im_end|>'
    with pytest.raises(ValueError, match="leaves out the tools: use one that describes them"):
        encode(sample, tokenizer(TOOLS.replace("{% if tools %}", "{% if false %}")), 1000, "error")
    with pytest.raises(ValueError, match="leaves out message 3, the tool's"):
        encode(sample, tokenizer(TOOLS.replace("m.content | tojson", "''")), 1000, "error")


def test_a_template_that_marks_nothing():
    marks = (
        "{% for m in messages %}{{ '<|user|>' + m.content + '<|end|>' }}{% generation %}{% endgeneration %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="the chat template marks no token as the assistant's"):
        encode(conversation("user: q", "assistant: a"), tokenizer(marks), 1000, "error")
