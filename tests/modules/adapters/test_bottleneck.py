"""Houlsby's adapter against the paper's formula in float64, over dense and packed weights."""

import pytest
import torch
from torch.nn import functional as F

from modules import attach, detach, quantize, trainable_parameters
from tests.modules.architectures import ARCHITECTURES, dense_model, logits, scramble


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "nf4"])
def test_houlsby_is_the_papers_network_behind_attention_and_mlp(architecture, packed):
    model = dense_model(architecture)
    if packed:
        quantize(model)
    without, d, r = logits(model), 64, 3
    torch.manual_seed(0)
    names = attach(model, "houlsby", rank=r)
    assert len(names) == 4 and torch.equal(logits(model), without)
    assert sum(p.numel() for p in trainable_parameters(model).values()) == 4 * (2 * d * r + r + d)
    scramble(model)
    found = logits(model)
    weights = {name: {k: p.double() for k, p in model.get_submodule(name).own_parameters().items()} for name in names}
    detach(model)
    assert torch.equal(logits(model), without)

    def network(w):
        def hook(_, args, h):
            down = F.gelu(h.double() @ w["adapter_down"].T + w["adapter_down_bias"])
            return (h.double() + down @ w["adapter_up"].T + w["adapter_up_bias"]).to(h.dtype)

        return hook

    for name, w in weights.items():
        model.get_submodule(name).register_forward_hook(network(w))
    torch.testing.assert_close(found, logits(model), rtol=1e-4, atol=1e-5)
