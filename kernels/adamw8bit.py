"""AdamW with blockwise 8-bit state, every tensor in one call.

    m = map_s[c_m] · absmax_m                  of each block of 256 values: the state in fp32
    v = map_u[c_v] · absmax_v
    m, v, p as in adamw.py, p from the m and v that are not yet quantized
    absmax = max |m|,  c_m = code of the value of map_s nearest to m / absmax;  likewise v with map_u

Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", §2: bitsandbytes' AdamW8bit. map_s and map_u are
its signed and unsigned dynamic maps. 16.06 bytes move per parameter; no fp32 state is materialised.

Rounding. Codes are those of the nearest value, as the paper says and bitsandbytes' GPU kernels do; its CPU library
looks codes up at 65536 points of [-1, 1] and is off by up to 1/65535 of absmax. Half-way the lower code is taken. The
quotient m / absmax is m · (1 / absmax), where absmax counts as no less than 2⁻¹²⁶. A NaN in a block makes its absmax,
and so the block, NaN.

Memory layout: codes have the parameter's elements in its order; absmax [ceil(n / 256)]; the last block may be partial.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.adamw import check_tensors, split_tensors
from kernels.op import define_op

BLOCKSIZE = 256  # bitsandbytes has no other for optimizer state


@define_op(mutates=("params", "exp_avgs", "exp_avg_sqs", "exp_avg_absmax", "exp_avg_sq_absmax"))
def _adamw8bit(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    exp_avg_absmax: list[Tensor],
    exp_avg_sq_absmax: list[Tensor],
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
    return None


def state_blocks(n: int) -> int:
    """Blocks of the state of `n` parameters."""
    return -(-n // BLOCKSIZE)


def adamw8bit(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    exp_avg_absmax: Sequence[Tensor],
    exp_avg_sq_absmax: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    step: int | Tensor,
    found_inf: Tensor | None = None,
) -> None:
    """One step of 8-bit AdamW on every tensor of `params`, in place.

    Args:
        params, grads: fp32; all tensors are contiguous and on one device.
        exp_avgs, exp_avg_sqs: uint8 codes, as many as the parameter has elements. Zeros before the first step.
        exp_avg_absmax, exp_avg_sq_absmax: fp32 [ceil(elements / 256)]. Zeros before the first step.
        lr, betas, eps, weight_decay: as torch.optim.AdamW's.
        step: this step's number, from 1.
        found_inf: as `adamw`'s.

    All but grads are updated.

    Raises:
        ValueError: tensors that do not fit.
    """
    values, absmax = (params, grads, exp_avgs, exp_avg_sqs), (exp_avg_absmax, exp_avg_sq_absmax)
    dtypes = (torch.float32, torch.float32, torch.uint8, torch.uint8)
    check_tensors(params, zip(("params", "grads", "exp_avgs", "exp_avg_sqs"), values, dtypes))
    names = ("exp_avg_absmax", "exp_avg_sq_absmax")
    check_tensors(params, ((name, tensors, torch.float32) for name, tensors in zip(names, absmax)), state_blocks)
    if params:
        lr, step, *tensors = split_tensors(lr, step)
        _adamw8bit(*map(list, values + absmax), lr, *betas, eps, weight_decay, step, *tensors, found_inf)
