"""Every benchmark by its op's name."""

from kernels.bench import absmax, blocks, dora_norm, linears, nf4, optimizers, products

BENCHES = {
    bench.kernel: bench
    for bench in (
        *(*nf4.BENCHES, *absmax.BENCHES, *products.BENCHES, *dora_norm.BENCHES, *linears.BENCHES),
        *(*blocks.BENCHES, *optimizers.BENCHES),
    )
}
