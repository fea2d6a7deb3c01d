"""A tokenizer of bytes with ChatML."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.experiments.data.conversations import CHATML


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte, plus ChatML's. Offsets leave spaces out, as SmolLM2's and GPT-2's do."""
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytewise = Tokenizer(models.BPE(vocab, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.post_processor = processors.ByteLevel(trim_offsets=True)
    bytewise.decoder = decoders.ByteLevel()
    specials = ["<|im_start|>", "<|im_end|>"]
    fast = PreTrainedTokenizerFast(tokenizer_object=bytewise, additional_special_tokens=specials)
    fast.chat_template = CHATML
    return fast
