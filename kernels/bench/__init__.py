"""Microbenchmarks: our ops beside other implementations of the same thing, in the same run.

    python -m kernels.bench [op …] [--csv FILE] [--plot DIR] [--quick]

`registry.py` names the ops, one file a family states them (see spec.py), `runner.py` measures: every result is checked
before it is timed, repetitions of all providers alternate, and what is reported is the median and its spread.
Compare ratios within one run, never times of two runs.
"""

import logging

# Beside this project bitsandbytes takes our `kernels` for Hugging Face's package of that name, and warns that a kernel
# for its own evaluation mode is missing there. Nothing here uses it.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
