"""A long text in windows has the tokens that it has as a whole, whatever its tokenizer is like."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from experiments.config import DataConfig
from experiments.data import opened, samples, windows
from experiments.data.samples import load_data
from experiments.data.tokens import tokenize_document
from experiments.system import machine

WORDS = (
    "the",
    "function",
    "Über",
    "naïve",
    "x1",
    "return",
    "日本語",
    "😀",
    "e\u0301",
    "ﬁn",
    "12345",
    "don't",
    "a" * 70,
)
BETWEEN = (" ", " ", " ", "  ", "\n", "\n\n", " \n \n", "\t", "\r\n", ", ", "---", "")
LLAMA3 = r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def text(seed: int, count: int) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + rng.choice(BETWEEN) for _ in range(count))


def byte_level(split: str | None) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    first = [] if split is None else [pre_tokenizers.Split(_regex(split), "isolated")]
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [*first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator([text(0, 3000)], trainer)
    return made


def _regex(pattern: str):
    from tokenizers import Regex

    return Regex(pattern)


def sentencepiece(model: str, split: bool) -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token="<unk>") if model == "bpe" else models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(_regex(" {2,}"), " ")])
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if split else "always", split=split)
    about = {"vocab_size": 200, "special_tokens": ["<unk>"]}
    trainer = trainers.BpeTrainer(**about) if model == "bpe" else trainers.UnigramTrainer(unk_token="<unk>", **about)
    made.train_from_iterator(text(0, 3000).split("\n"), trainer)
    return made


def word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator([text(0, 3000)], trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"]))
    return made


TOKENIZERS = {
    "gpt-2": lambda: byte_level(None),
    "llama-3": lambda: byte_level(LLAMA3),
    "llama-2": lambda: sentencepiece("bpe", False),
    "mistral": lambda: sentencepiece("bpe", True),
    "t5": lambda: sentencepiece("unigram", True),
    "bert": word_piece,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def some_tokenizer(request) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=TOKENIZERS[request.param]())


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    for module, name, value in ((windows, "SIZE", 500), (windows, "AROUND", 200), (opened, "AT_ONCE", 333)):
        monkeypatch.setattr(module, name, value)


def by_windows(path, tokenizer) -> tuple[list[int], bool, int]:
    document, count = windows.Document(tokenizer), 0
    for window in windows.windows(str(path)):
        document.add(windows.tokens_of(window, tokenizer))
        count += 1
    return document.ids().tolist(), document.fits, count


@pytest.mark.parametrize("seed", range(1, 7))
def test_windows_have_the_tokens_of_the_whole(tmp_path, some_tokenizer, seed):
    whole = text(seed, 1500)
    (tmp_path / "t.txt").write_bytes(whole.encode())
    found, fits, count = by_windows(tmp_path / "t.txt", some_tokenizer)
    assert found == tokenize_document(some_tokenizer, whole)
    assert fits and count > 10


@pytest.mark.parametrize("whole", ["ab" * 4000, "aab" * 3000, " " * 5000 + "x", "\n" * 5000 + "x", "x", "é" * 3000])
def test_texts_without_words(tmp_path, some_tokenizer, whole):
    (tmp_path / "t.txt").write_bytes(whole.encode())
    assert by_windows(tmp_path / "t.txt", some_tokenizer)[0] == tokenize_document(some_tokenizer, whole)


def test_several_processes_make_the_samples_of_one(tmp_path, monkeypatch):
    """Two files of text and one of rows, of which one has UTF-16."""
    monkeypatch.setenv("QDORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "usable_cores", lambda: 2)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=TOKENIZERS["gpt-2"](), eos_token="x1")
    (tmp_path / "in").mkdir()
    texts = [text(seed, 900) for seed in range(3)]
    (tmp_path / "in" / "a.txt").write_bytes(texts[0].encode())
    (tmp_path / "in" / "b.txt").write_bytes(texts[1].encode("utf-16"))
    (tmp_path / "in" / "c.md").write_bytes(texts[2].encode())
    cfg = DataConfig(name="text", source="text", path=str(tmp_path / "in"), max_length=16)
    alone = load_data(cfg, tokenizer)
    monkeypatch.setattr(samples, "LARGE", 1)
    assert load_data(cfg, tokenizer) == alone
    ids = [token for one in texts for token in tokenize_document(tokenizer, one)]
    assert [token for part in (alone.train, alone.heldout) for one in part for token in one.input_ids] == ids
