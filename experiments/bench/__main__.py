"""`python -m experiments.bench`: see the package's docstring."""

import sys

import torch

from experiments.bench import arguments, cpu
from experiments.bench.gpu import driver
from experiments.errors import UserError
from experiments.system.cli import command


@command
def main() -> None:
    options = arguments.bench(sys.argv[1:])
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no CUDA device: leave it out to compare on this CPU")
    on_gpu = options.device != "cpu" and torch.cuda.is_available()
    if not (options.stages if on_gpu else options.cases):
        raise UserError(f"{' '.join(options.case)}: only measured on a {'CPU: add --device cpu' if on_gpu else 'GPU'}")
    (driver if on_gpu else cpu).run(options)


if __name__ == "__main__":
    main()
