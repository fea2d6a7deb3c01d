"""Models with a prefix, batches of texts, and a float64 reference of one text at a time."""

import torch

from modules import attach, detach, trainable_parameters
from modules.adapters.targets import decoder_blocks
from tests.modules.architectures import dense_model, scramble

TEXTS = [[5, 9, 40, 12, 7], [20, 21, 22, 23, 24, 25, 26, 27], [33, 8]]


def with_prefix(architecture: str, kind: str, prefix_tokens: int = 3, infix_tokens: int = 2):
    model = dense_model(architecture)
    torch.manual_seed(0)
    attach(model, kind, prefix_tokens=prefix_tokens, infix_tokens=infix_tokens)
    scramble(model)
    return model


def batch_of(texts: list[list[int]], left: bool) -> dict[str, torch.Tensor]:
    longest = max(map(len, texts))
    pads = [[0] * (longest - len(text)) for text in texts]
    rows = [pad + text if left else text + pad for text, pad in zip(texts, pads)]
    ones = [[1] * len(text) for text in texts]
    mask = [pad + one if left else one + pad for one, pad in zip(ones, pads)]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


@torch.no_grad()
def reference(model, text: list[int], prompt_length: int, prefix_tokens: int = 3) -> torch.Tensor:
    """float64 logits [tokens, vocabulary] of one text: every row written out, blocks' inputs overwritten by hooks."""
    trained = [p.detach().double() for p in trainable_parameters(model).values()]
    _, blocks = decoder_blocks(model)
    detach(model)
    model.double()
    last = max(prompt_length - 1, 0)
    embedded = model.get_input_embeddings()(torch.tensor(text))
    first, rest = trained[0][:prefix_tokens], trained[0][prefix_tokens:]
    x = torch.cat([first, embedded[:last], rest, embedded[last:]])
    virtual = [*range(prefix_tokens), *range(prefix_tokens + last, prefix_tokens + last + len(rest))]

    def overwrite(prefix):
        def hook(_, args):
            hidden = args[0].clone()
            for row, vector in zip(virtual, prefix):
                hidden[0, row] = vector
            return hidden, *args[1:]

        return hook

    if len(trained) > 1:
        for block, prefix in zip(blocks, trained):
            model.get_submodule(block).register_forward_pre_hook(overwrite(prefix))
    out = model(inputs_embeds=x[None]).logits[0]
    return out[[row for row in range(len(x)) if row not in virtual]]
