"""Microbenchmarks: our ops beside other implementations of the same thing, in the same run.

    python -m kernels.bench [op …] [--csv FILE] [--plot DIR] [--quick]

`registry.py` names the benchmarks, which the files of the ops state (see spec.py). `runner.py` measures: it checks each
result before it times the provider, alternates the repetitions of all providers, and reports the median and its
spread. Compare ratios within one run, never times of two runs.
"""

import logging

# Beside this project bitsandbytes takes our `kernels` for Hugging Face's package of that name, and warns that a kernel
# for its own evaluation mode is missing there. Nothing here uses it.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
