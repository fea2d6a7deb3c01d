"""Parameters, gradients and settings that the tests of the optimizers and of paging share."""

import torch
from torch import nn

from modules import Paging

SHAPES = ((5,), (64, 100), (300,), (70, 71), (), (90, 64))  # three of 4096 elements or more
HYPER = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
STEPS = 6


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def train(optimizer: torch.optim.Optimizer, steps: range = range(STEPS)) -> None:
    """Steps with the gradients that belong to them; parameter 3 has none in step 1, parameter 2 never."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for i, p in enumerate(params):
            grad = torch.randn(p.shape, generator=generator).to(p.dtype) * 10.0 ** (i - 4)
            p.grad = None if i == 2 or (i == 3 and step == 1) else grad
        optimizer.step()


def paging(tmp_path, pages: int = 2) -> Paging:
    return Paging(4096 * pages, tmp_path, page_bytes=4096)
