"""Which part of its rank an adapter uses: the singular values of its update ΔW = s·BA, layer by layer.

Of DoRA, ΔW is the update of the direction, before the magnitude scales its rows. ΔW is never made: with the QR
factors of B and Aᵀ its singular values are those of an r × r matrix.

    effective rank   exp(H), H the entropy of the singular values' shares in their sum: r if all are equal, 1 if one
                     is all. Roy and Vetterli 2007, "The effective rank"
    stable rank      ‖ΔW‖²_F / σ₁²
    rank for 90 %    how many singular values, largest first, hold 90 % of ‖ΔW‖²_F

Of experts each has a row: `….down_proj.7` is expert 7's.
"""

import torch
from torch import Tensor, nn

from modules import LoRALinear, adapted_linears
from modules.linear import dense_weight

COLUMNS = ("layer", "rank", "effective_rank", "stable_rank", "rank_90", "norm", "relative_norm", "singular_values")


@torch.no_grad()
def singular_values(layer: LoRALinear) -> Tensor:
    """Of the layer's ΔW [out, in], the largest first: float64 [r] on the CPU; of experts [experts, r]."""
    lora_A, lora_B = (factor.detach().double().cpu() for factor in layer.factors())
    r_a, r_b = torch.linalg.qr(lora_A.mT, mode="r").R, torch.linalg.qr(lora_B, mode="r").R
    return torch.linalg.svdvals(layer.scaling * r_b @ r_a.mT)


def effective_rank(sigma: Tensor) -> float:
    """exp of the entropy of σ / Σσ; 0 for ΔW = 0."""
    if not sigma.sum():
        return 0.0
    shares = sigma / sigma.sum()
    return torch.special.entr(shares).sum().exp().item()


@torch.no_grad()
def spectra(model: nn.Module) -> list[dict]:
    """A row of COLUMNS for each adapted linear of `model`; `relative_norm` is ‖ΔW‖_F / ‖W‖_F."""
    rows = []
    for name, layer in adapted_linears(model).items():
        sigmas, weight = singular_values(layer), dense_weight(layer.base)
        if weight.dim() == 2:
            rows.append(_row(name, layer.rank, sigmas, weight))
        else:
            numbers = range(len(weight)) if layer.chosen is None else layer.chosen.tolist()
            rows += [_row(f"{name}.{number}", layer.rank, sigmas[number], weight[number]) for number in numbers]
    return rows


def _row(name: str, rank: int, sigma: Tensor, weight: Tensor) -> dict:
    squares = sigma.square()
    total = squares.sum().item()
    weight_norm = torch.linalg.vector_norm(weight.float()).item()
    values = (
        name,
        rank,
        effective_rank(sigma),
        total / squares[0].item() if total else 0.0,
        int((squares.cumsum(0) < 0.9 * total).sum()) + 1 if total else 0,
        total**0.5,
        total**0.5 / weight_norm if weight_norm else 0.0,
        " ".join(f"{value:.4g}" for value in sigma.tolist()),
    )
    return dict(zip(COLUMNS, values))


def summary(rows: list[dict]) -> dict[str, float | None]:
    """For result.json: the mean of the layers' effective ranks; None without an adapter."""
    ranks = [row["effective_rank"] for row in rows]
    return {"effective_rank": sum(ranks) / len(ranks) if ranks else None}
