"""The dropout mask is a pure function of (row, column, p, seed) and looks random in every direction."""

import pytest
import torch

from kernels.dropout import dropout, keep_mask, new_seed
from kernels.triton.dropout import dropout as triton_dropout
from tests.kernels.nf4_cases import guarded_memory, needs_triton, triton_device

SEED = torch.tensor(1234)


def test_same_seed_same_mask_and_another_seed_another():
    mask = keep_mask(64, 96, 0.5, SEED)
    assert torch.equal(mask, keep_mask(64, 96, 0.5, SEED.clone()))
    differing = (mask != keep_mask(64, 96, 0.5, SEED + 1)).float().mean().item()
    assert abs(differing - 0.5) < 0.03


def test_known_values():
    """The mask is part of a run's reproducibility: it must not change between versions."""
    rows = ["11001111", "00110001", "01110100"]
    assert keep_mask(3, 8, 0.5, SEED).int().tolist() == [[int(bit) for bit in row] for row in rows]


def test_a_part_of_the_mask_is_the_mask_of_the_part():
    assert torch.equal(keep_mask(64, 96, 0.3, SEED)[:10, :7], keep_mask(10, 7, 0.3, SEED))


@pytest.mark.parametrize("p", [0.01, 0.05, 0.1, 0.5, 0.9])
def test_rate(p):
    rows, cols = 512, 768
    dropped = 1 - keep_mask(rows, cols, p, SEED).double()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(dropped.mean().item() - p) < 4 * deviation / (rows * cols) ** 0.5
    # each row and each column has the rate too: 6 standard deviations, over 1280 of them
    assert (dropped.mean(1) - p).abs().max() < 6 * deviation / cols**0.5
    assert (dropped.mean(0) - p).abs().max() < 6 * deviation / rows**0.5


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_rows_and_columns_are_independent(p):
    n = 512
    dropped = (1 - keep_mask(n, n, p, SEED).double() - p) / (p * (1 - p)) ** 0.5
    for gram in (dropped @ dropped.t() / n, dropped.t() @ dropped / n):
        correlation = gram - torch.diag(gram.diag())
        assert correlation.abs().max() < 6.5 / n**0.5  # the largest of 130,000 nearly normal values
        assert abs(correlation.mean().item()) < 1e-3
        # the mean square of n² independent correlations is 1/n
        assert abs(correlation.square().mean().item() * n - 1) < 0.05


def test_seeds_that_are_neighbours_give_independent_masks():
    masks = torch.stack([keep_mask(32, 32, 0.5, SEED + i).double().flatten() for i in range(64)]) * 2 - 1
    correlation = masks @ masks.t() / 1024 - torch.eye(64, dtype=torch.float64)
    assert correlation.abs().max() < 6 / 1024**0.5


def test_dropout_scales_what_it_keeps():
    x = torch.ones(16, 32)
    y = dropout(x, 0.25, SEED)
    assert torch.equal(y != 0, keep_mask(16, 32, 0.25, SEED))
    assert torch.allclose(y[y != 0], torch.tensor(4 / 3))


def test_without_a_rate_nothing_is_dropped():
    x = torch.ones(4, 4)
    assert dropout(x, 0.0, None) is x
    assert keep_mask(64, 64, 0.0, SEED).all()


def test_the_generator_decides_the_seed():
    torch.manual_seed(7)
    first = new_seed(torch.device("cpu"))
    torch.manual_seed(7)
    assert torch.equal(first, new_seed(torch.device("cpu")))
    assert not torch.equal(first, new_seed(torch.device("cpu")))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1025), (70, 33)], ids=str)
def test_the_triton_kernel_is_the_reference_bit_for_bit(shape, dtype, monkeypatch):
    x = torch.randn(shape, dtype=dtype, device=triton_device())
    for p in (0.1, 0.5):
        with guarded_memory(monkeypatch):
            y = triton_dropout(x, p, SEED.to(x.device))
        assert torch.equal(y, dropout(x, p, SEED.to(x.device)))
