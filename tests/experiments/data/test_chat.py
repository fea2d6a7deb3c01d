"""Conversations as tokens and labels, and tokenizers that cannot make them."""

import pytest
from transformers import PreTrainedTokenizerFast

from experiments.data.chat import IGNORED, encode
from experiments.data.samples import load_data
from experiments.errors import UserError
from tests.experiments.data.conversations import CHATML, clone, conversation, jsonl_config, labelled, pairs, write


def test_labels_cover_the_answers_and_their_end_tokens(tokenizer):
    sample = conversation("system: S", "user: Hello you", "assistant:  Ünï  code\n ", "user: B", "assistant: b")
    example = encode(sample, tokenizer, 1000, "error")
    text = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHello you<|im_end|>\n<|im_start|>assistant\n"
    text += " Ünï  code\n <|im_end|>\n<|im_start|>user\nB<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(example.input_ids) == text + "b<|im_end|>\n"
    assert labelled(tokenizer, example) == " Ünï  code\n <|im_end|>b<|im_end|>"
    assert all(label in (token, IGNORED) for token, label in zip(example.input_ids, example.labels))
    assert tokenizer.decode(example.prompt_ids) == text
    assert example.reference == "b"


def test_too_long(tokenizer):
    sample = conversation("user: U", "assistant: first", "user: V", "assistant: second")
    ids = encode(sample, tokenizer, 1000, "error").input_ids
    assert encode(sample, tokenizer, len(ids), "error").input_ids == ids
    message = rf"^{len(ids)} tokens, but data.max_length is 20: raise data.max_length, or set data.too_l"
    with pytest.raises(ValueError, match=message):
        encode(sample, tokenizer, 20, "error")
    assert encode(sample, tokenizer, 20, "drop") is None

    cut = encode(sample, tokenizer, 25, "truncate")
    assert cut.input_ids == ids[:25]
    assert labelled(tokenizer, cut) == "first"
    assert tokenizer.decode(cut.prompt_ids) == "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    assert cut.reference == "first"
    with pytest.raises(ValueError, match=r"^none of the first 12 tokens is the assistant's"):
        encode(sample, tokenizer, 12, "truncate")


def test_tokenizers_that_are_not_fit(tmp_path, tokenizer):
    cfg = jsonl_config(write(tmp_path / "c.jsonl", *pairs(9)))
    with pytest.raises(UserError, match="the tokenizer has no chat template: use a chat model or data=text"):
        load_data(cfg, clone(tokenizer, None))

    slow = clone(tokenizer, CHATML)
    slow.__class__ = type("Slow", (PreTrainedTokenizerFast,), {"is_fast": False})
    with pytest.raises(UserError, match="chat data needs a fast tokenizer"):
        load_data(cfg, slow)

    last_differs = clone(tokenizer, CHATML.replace("m.content", "('last: ' if loop.last else '') + m.content"))
    with pytest.raises(ValueError, match=r"^the tokenizer's chat template renders message 2 differently"):
        encode(conversation("user: U", "assistant: a", "user: V"), last_differs, 1000, "error")

    refuses = clone(tokenizer, "{{ raise_exception('no system role') }}")
    with pytest.raises(ValueError, match=r"refuses this conversation: no system role"):
        encode(conversation("user: U", "assistant: a"), refuses, 1000, "error")
