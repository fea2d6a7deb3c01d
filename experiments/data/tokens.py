"""Text to token ids."""

from transformers import PreTrainedTokenizerBase


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, **kwargs):
    """Token ids of text as it is: no special tokens are added, and no length is warned of.

    Raises:
        ValueError: the tokenizer's model (see `limit_tokens`) has no embedding for a token.
    """
    encoded = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False, **kwargs)
    known, largest = getattr(tokenizer, "known_tokens", None), max(encoded["input_ids"], default=0)
    if known is not None and largest >= known:
        raise ValueError(
            f"the text has the token {tokenizer.convert_ids_to_tokens(largest)!r} with id {largest}, and the model has "
            f"{known} embeddings: make room for it (model.resize_token_embeddings) and save the model, or leave it out"
        )
    return encoded


def limit_tokens(tokenizer: PreTrainedTokenizerBase, known: int) -> None:
    """Have `tokenize` refuse tokens from `known` on, for which the tokenizer's model has no embeddings."""
    tokenizer.known_tokens = known


def begin_and_end(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and behind a text, such as BOS and nothing."""
    bare, whole = tokenize(tokenizer, "a")["input_ids"], tokenizer("a")["input_ids"]
    start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), len(whole))
    return whole[:start], whole[start + len(bare) :]


def end_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """EOS, or whatever the tokenizer ends a text with."""
    _, end = begin_and_end(tokenizer)
    return end or [tokenizer.eos_token_id] * (tokenizer.eos_token_id is not None)


def tokenize_document(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text and its end; without those that begin it."""
    return tokenize(tokenizer, text)["input_ids"] + end_of(tokenizer)
