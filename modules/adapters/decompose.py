"""A matrix as a product of two thin ones: W [out, in] ≈ BA, B [out, rank], A [rank, in].

    svd         truncated singular value decomposition: the best there is, ‖W − BA‖² = Σ_{i>r} σ_i² (Eckart, Young 1936)
    randomized  the same from a random projection and POWER_ITERATIONS subspace iterations (Halko et al. 2011): nearly
                as good for a share of the work, the more so the faster singular values fall
    als         alternating least squares: A the best for B, then B the best for A, until the error stops falling.
                Reaches the same subspace as svd, slowly where σ_r and σ_{r+1} are close
    nuclear     min_X ½‖W − X‖² + τ‖X‖_*: singular values soft-thresholded, max(σ_i − τ, 0) (Cai et al. 2010), with
                τ = σ_{r+1}, the least that leaves rank r. Shrinks what it keeps: for denoising, not for the least error

Each half of a product has half of its weight: B = U√Σ, A = √ΣVᵀ.
"""

import torch
from torch import Tensor

METHODS = ("svd", "randomized", "als", "nuclear")
OVERSAMPLING = 8  # directions beyond the rank that a random projection keeps until the end
POWER_ITERATIONS = 4
ALS_TOLERANCE, ALS_SWEEPS = 1e-5, 100  # stop when a sweep lowers the error by less than this share, or after so many


@torch.no_grad()
def decompose(
    w: Tensor, rank: int, method: str = "svd", seed: int = 0, niter: int = POWER_ITERATIONS
) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] with BA ≈ `w`.

    Args:
        w: [out, in], any float dtype; the work is done in fp64 for fp64, else in fp32, and the result has that dtype.
        rank: 1 … min(out, in).
        method: one of METHODS.
        seed: of the random start of randomized and als; the same seed gives the same result.
        niter: subspace iterations of randomized.

    Raises:
        ValueError: not a matrix, values that are not finite, a rank it cannot have or an unknown method.
    """
    if w.dim() != 2 or not w.is_floating_point():
        raise ValueError(f"w must be a matrix of floats, not {w.dtype} {list(w.shape)}")
    if not 1 <= rank <= min(w.shape):
        raise ValueError(
            f"rank {rank} is out of range: a matrix of {w.shape[0]} × {w.shape[1]} takes 1 to {min(w.shape)}"
        )
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")
    w = w if w.dtype == torch.float64 else w.float()
    if not w.isfinite().all():
        raise ValueError("w holds values that are not finite")
    if method == "als":
        u, s, v = _als(w, rank, seed)
    elif method == "randomized":
        with torch.random.fork_rng(devices=[w.device] if w.is_cuda else []):
            torch.manual_seed(seed)
            u, s, v = torch.svd_lowrank(w, min(rank + OVERSAMPLING, *w.shape), niter=niter)
    else:
        u, s, vt = torch.linalg.svd(w, full_matrices=False)
        v = vt.t()
        if method == "nuclear" and rank < len(s):
            s = (s - s[rank]).clamp(min=0)
    root = s[:rank].sqrt()
    return root[:, None] * v[:, :rank].t(), u[:, :rank] * root


def _als(w: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(U, Σ, V) of the product. The factor that is held is orthonormal, so that the best other one is a product."""
    generator = torch.Generator(w.device).manual_seed(seed)
    b = w @ torch.randn(w.shape[1], rank, generator=generator, device=w.device, dtype=w.dtype)
    total = left = w.square().sum()
    for _ in range(ALS_SWEEPS):
        a = torch.linalg.qr(b).Q.t() @ w  # the best A for this B
        q = torch.linalg.qr(a.t()).Q
        b = w @ q  # the best B for this A
        before, left = left, total - b.square().sum()
        if before - left <= ALS_TOLERANCE * before:
            break
    u, s, vt = torch.linalg.svd(b, full_matrices=False)
    return u, s, q @ vt.t()
