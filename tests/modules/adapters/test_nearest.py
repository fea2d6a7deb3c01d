"""nearest_lora and nearest_dora: a change of rank r is found exactly, DoRA is never further than LoRA, bad input."""

import pytest
import torch

from modules.adapters.nearest import nearest_dora, nearest_lora


def dora_weight(w, lora_A, lora_B, magnitude):
    v = w + lora_B @ lora_A
    return magnitude[:, None] * v / v.norm(dim=1, keepdim=True)


@pytest.fixture
def w():
    return torch.randn(40, 64, generator=torch.Generator().manual_seed(0))


def low_rank(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(40, 4, generator=generator) @ torch.randn(4, 64, generator=generator)


def test_a_change_of_that_rank_comes_back(w):
    tuned = w + low_rank(1)
    lora_A, lora_B = nearest_lora(w, tuned, 4)
    torch.testing.assert_close(w + lora_B @ lora_A, tuned, atol=1e-5, rtol=0)
    torch.testing.assert_close(dora_weight(w, *nearest_dora(w, tuned, 4)), tuned, atol=1e-5, rtol=0)


def test_dora_takes_up_new_lengths_of_rows_in_the_magnitude(w):
    lengths = 1 + 0.2 * torch.rand(40, 1, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(dora_weight(w, *nearest_dora(w, lengths * w, 1)), lengths * w, atol=1e-4, rtol=0)
    tuned = lengths * (w + low_rank(1))
    lora_A, lora_B = nearest_lora(w, tuned, 4)
    by_lora = (tuned - w - lora_B @ lora_A).norm()
    by_dora = (tuned - dora_weight(w, *nearest_dora(w, tuned, 4))).norm()
    assert by_dora < 0.2 * by_lora


@pytest.mark.parametrize("rank", [1, 3, 10, 40])
def test_dora_is_never_further_than_lora(w, rank):
    tuned = w + 0.1 * torch.randn(40, 64, generator=torch.Generator().manual_seed(3))
    lora_A, lora_B = nearest_lora(w, tuned, rank)
    by_lora = (tuned - w - lora_B @ lora_A).norm()
    assert (tuned - dora_weight(w, *nearest_dora(w, tuned, rank))).norm() <= by_lora * (1 + 1e-5) + 1e-4


def test_no_change_and_rows_of_zeros(w):
    w[3] = 0
    lora_A, lora_B, magnitude = nearest_dora(w, w, 2)
    assert torch.equal(lora_B @ lora_A, torch.zeros_like(w)) and magnitude.isfinite().all()
    torch.testing.assert_close(magnitude, w.norm(dim=1))


def test_shapes_that_differ_are_refused(w):
    with pytest.raises(ValueError, match=r"the weight is \[40, 64\], but the tuned weight is \[64, 40\]"):
        nearest_lora(w, w.t(), 2)
