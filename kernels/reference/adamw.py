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
    device_lr: Tensor | None = None,
    device_step: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    # torch.optim.AdamW(fused=True) calls the same, but counts the steps of each tensor by itself: a millisecond or two
    if device_step is None:
        device_step = torch.tensor(float(step), device=params[0].device)
    else:
        lr = device_lr.float() if device_lr.is_cuda else device_lr  # as torch's kernels read it
    torch._fused_adamw_(
        params, grads, exp_avgs, exp_avg_sqs, [], [device_step] * len(params), amsgrad=False,
        maximize=False, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, found_inf=found_inf,
    )  # fmt: skip
