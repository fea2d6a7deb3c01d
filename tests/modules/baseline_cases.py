"""Settings of each baseline, and models that have one."""

import torch

from modules import attach, quantize
from tests.modules.architectures import dense_model

BASELINE_SETTINGS = {
    "bitfit": {},
    "houlsby": {"rank": 3, "rank_pattern": {"layers.1.self_attn.o_proj": 5}},
    "prefix_embed": {"prefix_tokens": 3, "infix_tokens": 2},
    "prefix_layer": {"prefix_tokens": 3},
}


def with_baseline(architecture: str, adapter: str, packed: bool = False, **settings):
    model = dense_model(architecture)
    if packed:
        quantize(model)
    torch.manual_seed(0)
    attach(model, adapter, **settings)
    return model
