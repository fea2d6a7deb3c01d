"""Every benchmark by its op's name."""

from kernels.bench import linears, nf4

BENCHES = {bench.kernel: bench for bench in (*nf4.BENCHES, *linears.BENCHES)}
