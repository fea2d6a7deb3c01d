"""Linears of experts in plain torch, one after the other: see kernels/experts.py."""

from functools import partial

from torch.nn.functional import linear

from kernels import expert_loop
from kernels.reference.dora import dora_linear, dora_linear_backward, dora_norm
from kernels.reference.lora import lora_linear, lora_linear_backward
from kernels.reference.nf4 import dense

experts_linear = partial(expert_loop.experts_linear, dense, linear)
experts_linear_backward = partial(expert_loop.experts_linear_backward, dense, linear)
experts_lora = partial(expert_loop.experts_lora, dense, lora_linear)
experts_lora_backward = partial(expert_loop.experts_lora_backward, dense, lora_linear_backward)
experts_dora = partial(expert_loop.experts_dora, dense, dora_linear)
experts_dora_backward = partial(expert_loop.experts_dora_backward, dense, dora_linear_backward)
experts_norm = partial(expert_loop.experts_norm, dense, dora_norm)
