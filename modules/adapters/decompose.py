"""Decompose a matrix into a product of two thin ones: W [out, in] ≈ BA, B [out, rank], A [rank, in].

    svd         truncated singular value decomposition. The error is the least possible: ‖W − BA‖² = Σ_{i>r} σ_i²
                (Eckart, Young 1936)
    randomized  an approximate svd by a random projection and POWER_ITERATIONS subspace iterations (Halko et al. 2011).
                It does a fraction of the work. The faster the singular values fall, the nearer it is to svd
    als         alternating least squares: the best A for B, then the best B for A, until the error stops falling. It
                reaches the same subspace as svd, but slowly if σ_r and σ_{r+1} are close
    nuclear     min_X ½‖W − X‖² + τ‖X‖_*: singular values are soft-thresholded, max(σ_i − τ, 0) (Cai et al. 2010).
                τ = σ_{r+1}, the smallest that leaves rank r. It shrinks the values that it keeps, so it suits
                denoising, not the least error

Both factors get the same share of the singular values: B = U√Σ, A = √ΣVᵀ.
"""

import torch
from torch import Tensor

METHODS = ("svd", "randomized", "als", "nuclear")
OVERSAMPLING = 8  # a random projection keeps so many directions more than the rank; the last step drops them
POWER_ITERATIONS = 4
ALS_TOLERANCE = 1e-5  # stop when a sweep lowers the squared error by less than this share
ALS_SWEEPS = 100  # and after so many sweeps at the latest


@torch.no_grad()
def decompose(
    w: Tensor, rank: int, method: str = "svd", seed: int = 0, niter: int = POWER_ITERATIONS
) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] with BA ≈ `w`.

    Args:
        w: [out, in], any float dtype. fp64 is decomposed in fp64, other dtypes in fp32; the result has that dtype.
        rank: 1 … min(out, in).
        method: one of METHODS.
        seed: of the random start of randomized and als. The same seed gives the same result.
        niter: number of subspace iterations of randomized.

    Raises:
        ValueError: `w` is not a finite float matrix, the rank is out of range, or the method is unknown.
    """
    if w.dim() != 2 or not w.is_floating_point():
        raise ValueError(f"w must be a matrix of floats, not {w.dtype} {list(w.shape)}")
    if not 1 <= rank <= min(w.shape):
        raise ValueError(
            f"rank {rank} is out of range: a matrix of {w.shape[0]} × {w.shape[1]} can have 1 to {min(w.shape)}"
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
    """(U, Σ, V) of the product BA. The fixed factor is orthonormal, so the best other factor is one product."""
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
