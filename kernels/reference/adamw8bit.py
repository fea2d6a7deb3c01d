"""8-bit AdamW in plain torch: see kernels/adamw8bit.py.

Each operation is rounded to nearest on its own, so that the results are the Triton kernel's bit for bit. That is why a
sum of products is two calls (torch may fuse it), and why roots are taken in float64: torch's fp32 root on a CPU is off
by a unit in the last place now and then; that of a float64 root, rounded, never is. Results do not depend on where a
tensor is cut between blocks of 256.
"""

from itertools import pairwise

import torch
from torch import Tensor

from kernels.adamw import Coefficients, coefficients, device_coefficients
from kernels.adamw8bit import BLOCKSIZE
from kernels.codebook import dynamic_bins, dynamic_bounds, dynamic_map

CHUNK = 2**18  # elements at a time: temporaries stay in the processor's cache


def _chunks(n: int) -> list[slice]:
    return [slice(a, b) for a, b in pairwise([*range(0, n, CHUNK), n])]


def adamw8bit(
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
    if device_step is None:
        by = coefficients(lr, beta1, beta2, eps, weight_decay, step)
    else:
        by = Coefficients(*device_coefficients(device_lr, beta1, beta2, eps, weight_decay, device_step).unbind())
    arguments = (params, grads, exp_avgs, exp_avg_sqs, exp_avg_absmax, exp_avg_sq_absmax)
    for p, g, m_codes, v_codes, m_absmax, v_absmax in zip(*arguments):
        for part in _chunks(p.numel()):
            blocks = slice(part.start // BLOCKSIZE, -(-part.stop // BLOCKSIZE))
            codes, absmax = (m_codes.view(-1)[part], v_codes.view(-1)[part]), (m_absmax[blocks], v_absmax[blocks])
            m, v = (dequantize_state(*state, signed) for *state, signed in zip(codes, absmax, (True, False)))
            _update(p.view(-1)[part], g.view(-1)[part], m, v, by, found_inf)
            for x, code, scale, signed in zip((m, v), codes, absmax, (True, False)):
                new_code, new_scale = quantize_state(x, signed)
                _set(code, new_code, found_inf)
                _set(scale, new_scale, found_inf)


def _set(tensor: Tensor, value: Tensor, found_inf: Tensor | None) -> None:
    """Give `tensor` the value, unless the step is skipped."""
    tensor.copy_(value if found_inf is None else torch.where(found_inf == 0, value, tensor))


def _update(p: Tensor, g: Tensor, m: Tensor, v: Tensor, by: Coefficients, found_inf: Tensor | None) -> None:
    m.mul_(by.beta1).add_(g * by.one_minus_beta1)
    v.mul_(by.beta2).add_((g * g).mul_(by.one_minus_beta2))
    denominator = v.double().sqrt_().float().mul_(by.denominator_scale).add_(by.eps)
    _set(p, (p * by.decay).sub_((m / denominator).mul_(by.step_size)), found_inf)


def dequantize_state(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """fp32 [n] of uint8 codes [n] and fp32 absmax [ceil(n / 256)]."""
    x = dynamic_map(codes.device, signed).index_select(0, codes.int())
    return _by_block(x, absmax)


def _by_block(x: Tensor, scale: Tensor) -> Tensor:
    """x, of a block each times that block's scale, in place."""
    full = x.numel() // BLOCKSIZE
    x[: full * BLOCKSIZE].view(-1, BLOCKSIZE).mul_(scale[:full, None])
    if full < scale.numel():
        x[full * BLOCKSIZE :].mul_(scale[full:])
    return x


def quantize_state(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """(codes, absmax) of fp32 [n]. x is lost."""
    full = x.numel() // BLOCKSIZE * BLOCKSIZE
    absmax = x[:full].view(-1, BLOCKSIZE).abs().amax(dim=1)
    if full < x.numel():
        absmax = torch.cat([absmax, x[full:].abs().amax().view(1)])
    _by_block(x, 1.0 / absmax.clamp(min=torch.finfo(torch.float32).tiny))
    bins = (x.view(torch.int32) >> 16).bitwise_and_(0xFFFF)
    below = dynamic_bins(x.device, signed).index_select(0, bins)
    bound = dynamic_bounds(x.device, signed).index_select(0, below.int())
    return below.add_(x > bound), absmax
