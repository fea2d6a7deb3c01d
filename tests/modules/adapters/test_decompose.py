"""decompose: exact against numpy where it should be, near the best where it may be, bad input."""

import numpy as np
import pytest
import torch

from modules.adapters.decompose import METHODS, decompose

SHAPES = [(48, 80), (80, 48), (33, 33)]


def matrix(shape, decay=0.8, dtype=torch.float64):
    """Random singular vectors, singular values decay^i."""
    generator = torch.Generator().manual_seed(shape[0])
    u, _ = torch.linalg.qr(torch.randn(shape[0], min(shape), generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(shape[1], min(shape), generator=generator, dtype=torch.float64))
    return ((u * decay ** torch.arange(min(shape))) @ v.t()).to(dtype)


def numpy_svd(w, rank):
    u, s, vt = np.linalg.svd(w.double().numpy(), full_matrices=False)
    return u, s, vt, (u[:, :rank] * s[:rank]) @ vt[:rank]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [1, 5, 33])
def test_svd_is_numpys(shape, rank):
    w = matrix(shape)
    a, b = decompose(w, rank, "svd")
    assert a.shape == (rank, shape[1]) and b.shape == (shape[0], rank) and a.dtype == torch.float64
    np.testing.assert_allclose((b @ a).numpy(), numpy_svd(w, rank)[3], atol=1e-12)
    np.testing.assert_allclose((a @ a.t()).numpy(), (b.t() @ b).numpy(), atol=1e-12)  # half of the weight each


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [1, 5, 33])
def test_nuclear_is_the_proximal_point_of_the_nuclear_norm(shape, rank):
    w = matrix(shape)
    a, b = decompose(w, rank, "nuclear")
    x = (b @ a).numpy()
    u, s, vt, _ = numpy_svd(w, rank)
    tau = s[rank] if rank < len(s) else 0.0
    np.testing.assert_allclose(x, (u * np.maximum(s - tau, 0)) @ vt, atol=1e-12)
    # Optimal if W − X is τ times a subgradient of the nuclear norm at X: UVᵀ on X's subspaces, of norm ≤ 1 off them.
    gradient = w.numpy() - x
    np.testing.assert_allclose(u[:, :rank].T @ gradient @ vt[:rank].T, tau * np.eye(rank), atol=1e-12)
    assert np.linalg.norm(gradient, 2) <= tau + 1e-12


@pytest.mark.parametrize("method", ["randomized", "als"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("decay, slack", [(0.8, 1e-3), (0.99, 0.02)], ids=["falling", "nearly flat"])
def test_the_others_come_near_the_best(method, shape, decay, slack):
    w = matrix(shape, decay)
    for rank in (1, 5, 20):
        best = np.linalg.norm(numpy_svd(w, rank)[1][rank:])
        a, b = decompose(w, rank, method)
        error = torch.linalg.norm(w - b @ a).item()
        assert best * (1 - 1e-9) <= error <= best * (1 + slack)
        again = decompose(w, rank, method)
        assert torch.equal(again[0], a) and torch.equal(again[1], b)


@pytest.mark.parametrize("method", METHODS)
def test_a_matrix_of_that_rank_is_found_exactly(method):
    w = matrix((48, 80), 0.7)
    a, b = decompose(w, 4, "svd")
    w = b @ a
    a, b = decompose(w, 4, method)
    torch.testing.assert_close(b @ a, w, rtol=0, atol=1e-12)
    torch.testing.assert_close(decompose(torch.zeros(8, 9), 2, method)[1], torch.zeros(8, 2))


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_is_decomposed_in_fp32_and_the_generator_is_left_alone(method):
    w = matrix((48, 80), dtype=torch.bfloat16)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    a, b = decompose(w, 8, method)
    assert torch.equal(torch.rand(1), expected)
    assert a.dtype == b.dtype == torch.float32
    exact_a, exact_b = decompose(w.double(), 8, method)
    torch.testing.assert_close(b @ a, (exact_b @ exact_a).float(), atol=1e-2, rtol=0)


def test_bad_input():
    w = torch.ones(4, 6)
    with pytest.raises(ValueError, match="rank 5 is out of range: a matrix of 4 × 6 can have 1 to 4"):
        decompose(w, 5)
    with pytest.raises(ValueError, match="rank 0 is out of range"):
        decompose(w, 0)
    with pytest.raises(ValueError, match="method 'qr' is not one of svd, randomized, als, nuclear"):
        decompose(w, 1, "qr")
    with pytest.raises(ValueError, match=r"w must be a matrix of floats, not torch.float32 \[4\]"):
        decompose(torch.ones(4), 1)
    with pytest.raises(ValueError, match="not finite"):
        decompose(torch.full((4, 4), torch.nan), 1)
