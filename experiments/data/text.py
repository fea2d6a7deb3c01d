"""Plain text in blocks of max_length tokens, each token labelled.

A block begins as the tokenizer begins a text (with BOS, or with nothing), and a file ends with EOS.
"""

from transformers import PreTrainedTokenizerBase

from experiments.config import DataConfig
from experiments.data.chat import Example
from experiments.data.tokens import begin_and_end, tokenize_document
from experiments.data.user_files import read_text
from experiments.errors import UserError


def text_blocks(cfg: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Example], list[Example]]:
    """Training and held-out blocks. The file's last share is held out, unless there is a file of its own.

    Raises:
        UserError: a file cannot be read or is too short.
    """
    train = _document(cfg.path, tokenizer)
    if cfg.heldout_path:
        heldout = _document(cfg.heldout_path, tokenizer)
    else:
        cut = len(train) - round(cfg.heldout_fraction * len(train))
        train, heldout = train[:cut], train[cut:]
    if min(len(train), len(heldout)) < 2:  # one token has no next token to predict
        raise UserError(
            f"{cfg.path}: {len(train)} training and {len(heldout)} held-out tokens are too few: "
            "add text or set data.heldout_path=FILE"
        )
    begin, _ = begin_and_end(tokenizer)
    if cfg.max_length <= len(begin):
        raise UserError(
            f"data.max_length={cfg.max_length}: the tokenizer begins a text by {len(begin)} tokens: raise it"
        )
    train_blocks, heldout_blocks = (_blocks(ids, cfg.max_length, begin) for ids in (train, heldout))
    return train_blocks[: cfg.max_train], heldout_blocks[: cfg.max_heldout]


def _document(path: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    try:
        return tokenize_document(tokenizer, read_text(path))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def _blocks(ids: list[int], length: int, begin: list[int]) -> list[Example]:
    step = length - len(begin)
    blocks = [begin + ids[start : start + step] for start in range(0, len(ids), step)]
    return [Example(block, block) for block in blocks if len(block) > 1]
