"""Every benchmark by its op's name."""

from kernels.bench import double_quant, linears, nf4, norms, optimizers, products

BENCHES = {
    bench.kernel: bench
    for bench in (
        *(*nf4.BENCHES, *double_quant.BENCHES, *products.BENCHES, *norms.BENCHES, *linears.BENCHES),
        *optimizers.BENCHES,
    )
}
