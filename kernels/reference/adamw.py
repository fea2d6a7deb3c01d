"""AdamW in plain torch: torch's own, one pass over each tensor. See kernels/adamw.py."""

import torch
from torch import Tensor


def adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    # torch.optim.AdamW(fused=True) calls the same, but counts the steps of each tensor by itself: a millisecond or two
    steps = [torch.tensor(float(step), device=params[0].device)] * len(params)
    torch._fused_adamw_(
        params, grads, exp_avgs, exp_avg_sqs, [], steps, amsgrad=False, maximize=False,
        lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay,
    )  # fmt: skip
