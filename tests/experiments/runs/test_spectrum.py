"""The rank that an update uses: singular values and effective rank, by layer."""

import pytest
import torch
from torch import nn

from experiments.runs.spectrum import effective_rank, singular_values, spectra
from modules import DoRALinear, LoRALinear, attach
from modules.adapters.init import initialise


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
@pytest.mark.parametrize(("out_features", "in_features", "rank"), [(24, 17, 5), (9, 33, 9), (16, 16, 1)])
def test_singular_values_are_those_of_the_update(kind, out_features, in_features, rank):
    torch.manual_seed(0)
    layer = kind(nn.Linear(in_features, out_features), rank, lora_alpha=3.0)
    nn.init.normal_(layer.lora_B)
    update = layer.scaling * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    expected = torch.linalg.svdvals(update)
    found = singular_values(layer)
    torch.testing.assert_close(found, expected[: len(found)], rtol=1e-10, atol=1e-12)
    assert len(found) == min(rank, out_features, in_features)


def test_the_part_that_an_initialisation_took_of_the_weight_is_no_update():
    layer = LoRALinear(nn.Linear(20, 12), 4, lora_alpha=4.0)
    initialise(layer, "pissa")
    assert singular_values(layer).max() < 1e-5
    with torch.no_grad():
        layer.lora_B[:, 0] += 1
    found = singular_values(layer)
    assert len(found) == 8 and effective_rank(found) < 1.01  # twice the rank, one direction in use


def test_effective_rank_of_known_spectra():
    assert effective_rank(torch.ones(6).double()) == pytest.approx(6)
    assert effective_rank(torch.tensor([3.0, 0, 0]).double()) == pytest.approx(1)
    assert effective_rank(torch.zeros(3).double()) == 0
    shares = torch.tensor([0.5, 0.25, 0.25]).double()  # entropy 1.5 bits
    assert effective_rank(7 * shares) == pytest.approx(2**1.5)


def test_a_new_adapter_has_no_spectrum():
    model = nn.Sequential(nn.Linear(8, 6))
    attach(model, "lora", 2)
    [row] = spectra(model)
    assert row["effective_rank"] == row["stable_rank"] == row["rank_90"] == row["relative_norm"] == 0
    with torch.no_grad():
        nn.init.orthogonal_(model[0].lora_A)
        nn.init.orthogonal_(model[0].lora_B)
    [row] = spectra(model)  # two equal singular values: s = lora_alpha / rank = 2
    assert [row[key] for key in ("effective_rank", "stable_rank", "rank_90")] == pytest.approx([2, 2, 2])
    weight_norm = model[0].base.weight.norm().item()
    assert row["norm"] == pytest.approx(8**0.5) and row["relative_norm"] == pytest.approx(8**0.5 / weight_norm)
