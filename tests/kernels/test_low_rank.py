"""The thin products in Triton: split sums, their memory and bits, and the bytes that a backward reads."""

import pytest
import torch

from kernels.triton.case import meta
from kernels.triton.gemm import gemm_kernel
from kernels.triton.launch import recording
from kernels.triton.lora import lora_linear_backward
from kernels.triton.low_rank import WORKSPACE_SHARE, project, project_kernel, split_sum
from kernels.triton.outer import outer_kernel, outers
from kernels.weight import Weight
from tests.kernels.linear_cases import assert_as_accurate, randn
from tests.kernels.nf4_cases import embedded, guarded_memory, needs_triton

triton = [needs_triton, pytest.mark.usefixtures("on_triton_device")]
H100 = torch.device("meta")  # tensors on no GPU are launched for an H100, of 132 multiprocessors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
class TestSplitSums:
    pytestmark = triton

    def test_project(self, dtype, monkeypatch):
        """A split of columns with a tail, into columns of a wider result."""
        tokens, columns, rank = 70, 1600, 18
        x, v = randn(tokens, columns, seed=1, dtype=dtype), randn(columns, rank, seed=2) / columns**0.5
        x, v = embedded(x, 64), embedded(v, 64)

        def into_columns():
            wide = torch.full((tokens, 40), 7.0, dtype=dtype)
            project(x, v, 1.5, out=wide[:, 8 : 8 + rank])
            return wide

        with recording() as launches:
            into_columns()
        assert launches[0].kernel is project_kernel and launches[0].grid[2] > 1 and len(launches) == 2
        again = into_columns()
        with guarded_memory(monkeypatch):
            got = into_columns()
        assert torch.equal(got, again)
        assert (got[:, :8] == 7).all() and (got[:, 8 + rank :] == 7).all()
        exact, by_torch = 1.5 * (x.double() @ v.double()), 1.5 * (x @ v.to(dtype))
        assert_as_accurate({"s": got[:, 8 : 8 + rank]}, {"s": by_torch}, {"s": exact}, dtype)

    @pytest.mark.parametrize("linears", [1, 2, 3])
    def test_outers(self, dtype, linears, monkeypatch):
        """A split of tokens with a tail, of linears of different sizes and ranks."""
        tokens, columns, outs, ranks = 1100, 70, (66, 20, 131)[:linears], (18, 5, 16)[:linears]
        x = embedded(randn(tokens, columns, seed=1, dtype=dtype), 64)
        s_all, ds = (embedded(randn(tokens, sum(ranks), seed=seed, dtype=dtype), 64) for seed in (2, 3))
        dys = [embedded(randn(tokens, out, seed=4 + i, dtype=dtype), 64) for i, out in enumerate(outs)]
        ss = s_all.split(ranks, 1)
        dtypes = torch.float32, [torch.float32] * linears
        with recording() as launches:
            outers(x, ds, dys, ss, dtypes)
        assert launches[0].kernel is outer_kernel and launches[0].grid[1] > 1 and len(launches) == 2
        dA, dBs = outers(x, ds, dys, ss, dtypes)
        with guarded_memory(monkeypatch):
            again_dA, again_dBs = outers(x, ds, dys, ss, dtypes)
        for first, second in zip((dA, *dBs), (again_dA, *again_dBs)):
            assert torch.equal(first, second)
        pairs = {"dA": (ds, x)} | {f"dB{i}": (dy, s) for i, (dy, s) in enumerate(zip(dys, ss))}
        exact = {name: a.double().t() @ b.double() for name, (a, b) in pairs.items()}
        by_torch = {name: a.t() @ b for name, (a, b) in pairs.items()}
        assert_as_accurate({"dA": dA} | {f"dB{i}": dB for i, dB in enumerate(dBs)}, by_torch, exact, dtype)


def test_splits_follow_the_rule():
    """Programs for every multiprocessor; long enough splits; a small workspace."""
    read = 2048 * 14336 * 2
    assert split_sum(14336, 64, 32, read, 2048 * 16, H100) == (896, 16)  # ⌈528 / 32⌉ = 17, in whole tiles
    assert split_sum(14336, 64, 32, read, 2048 * 64, H100) == (1024, 14)  # the workspace allows 14
    assert split_sum(576, 64, 16, 1024 * 576 * 2, 1024 * 16, H100) == (576, 1)  # two would have 4 tiles each
    assert split_sum(14336, 64, 600, read, 2048 * 16, H100) == (14336, 1)  # programs enough
    assert split_sum(0, 64, 4, 0, 100, H100) == (64, 1)
    for length, rank in ((4096, 16), (14336, 64), (28672, 256)):
        of_one, splits = split_sum(length, 64, 32, 2048 * length * 2, 2048 * rank, H100)
        assert (splits - 1) * of_one < length <= splits * of_one and of_one % 64 == 0
        assert splits == 1 or splits * 2048 * rank * 8 <= WORKSPACE_SHARE * 2048 * length * 2


@pytest.mark.parametrize("rank", [16, 64, 128])
@pytest.mark.parametrize(("features_in", "features_out"), [(4096, 14336), (14336, 4096), (4096, 4096)])
def test_a_backward_of_lora_reads_dy_three_times_and_x_once(features_in, features_out, rank):
    """Bytes, of 2048 tokens in bf16: 3·T·out for dxa, dB and dX, and T·in for dA, each element times 2 bytes. A launch
    reads an operand once for each of its tiles along the rank. The partial sums add at most a quarter."""
    x, dy = meta(2048, features_in, dtype="bf16"), meta(2048, features_out, dtype="bf16")
    xa, weight = meta(2048, rank, dtype="bf16"), Weight(meta(features_out, features_in, dtype="bf16"))
    with recording() as launches:
        lora_linear_backward(dy, x, xa, weight, meta(rank, features_in), meta(features_out, rank), 2.0, 0.0, None, True)
    reads = {id(dy): 0, id(x): 0}
    workspace = 0
    for launch in launches:
        arguments = launch.arguments
        if launch.kernel is project_kernel:
            tiles = {"x_ptr": launch.grid[1]}
        elif launch.kernel is outer_kernel:
            tiles = {"x_ptr": -(-rank // arguments["BLOCK_A"]), "dy0_ptr": -(-rank // arguments["BLOCK_B"])}
        else:
            tiles = {"x_ptr": 1} if launch.kernel is gemm_kernel else {}  # its tiles read again from the L2 cache
            workspace += 8 * arguments["partial_ptr"].numel() if "partial_ptr" in arguments else 0
        for name, count in tiles.items():
            reads[id(arguments[name])] += count * arguments[name].nbytes
    assert reads == {id(dy): 3 * dy.nbytes, id(x): x.nbytes}
    assert workspace <= WORKSPACE_SHARE * (2 * dy.nbytes + x.nbytes)
