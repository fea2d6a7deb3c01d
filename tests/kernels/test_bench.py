"""kernels.bench: it runs, writes its schema, and prints no time for a wrong result. Nothing here asserts a time."""

import csv
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from kernels.bench import card, experts, memory, timing
from kernels.bench.__main__ import main, run
from kernels.bench.machine import Machine
from kernels.bench.registry import NAMES, benches
from kernels.bench.report import Table
from kernels.bench.runner import Runner
from kernels.bench.spec import Unavailable

COLUMNS = "kernel,provider,mode,metric,x,p20,p50,p80,bytes,flops,roofline_share,config,device,versions,commit"


BENCHES = benches()
ON_CPU = [name for name, bench in BENCHES.items() if not bench.gpu_only]


@pytest.fixture(autouse=True)
def machine(monkeypatch) -> Machine:
    """A machine of known speed: measuring this one takes seconds."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # other tests interpret kernels; bench refuses to
    machine = Machine(torch.device("cpu"), "cpu", {"torch": "2"}, "abc", 1e9, {"fp32": 1e9, "bf16": 1e9})
    monkeypatch.setattr("kernels.bench.__main__.this_machine", lambda: machine)
    return machine


def read(path) -> list[dict]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def on_cpu(bench) -> list[str]:
    """The providers that run on a CPU."""
    return [name for name in bench.providers if name not in ("unsloth", "liger")]


def with_provider(kernel: str, **providers):
    """A benchmark with providers added, in one configuration."""
    bench = BENCHES[kernel]
    return dataclasses.replace(bench, providers={**bench.providers, **providers}, configs=bench.configs[:1])


def unchecked(kernel: str, **providers):
    """A benchmark of other providers, whose results are all taken as right."""
    return dataclasses.replace(BENCHES[kernel], providers=providers, check=lambda inputs: lambda result: None)


@pytest.mark.parametrize("kernel", ON_CPU)
def test_quick_run_writes_the_schema_and_a_plot(kernel, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    bench = BENCHES[kernel]
    assert main([kernel, "--quick", "--csv", str(tmp_path / "new" / "b.csv"), "--plot", str(tmp_path)]) == 0
    rows = read(tmp_path / "new" / "b.csv")
    assert ",".join(rows[0]) == COLUMNS
    cases = [(row["provider"], json.loads(row["config"]), int(row["x"])) for row in rows]
    assert cases == [(p, c, x) for c in bench.configs for x in bench.quick_sizes for p in on_cpu(bench)]
    for row in rows:
        assert (row["kernel"], row["mode"], row["metric"]) == (kernel, bench.mode, "time_ns")
        assert 0 < float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])
        assert int(row["bytes"]) > 0 and int(row["flops"]) > 0 and float(row["roofline_share"]) > 0
        assert json.loads(row["versions"]) == {"torch": "2"} and row["commit"] == "abc"
    assert (tmp_path / f"{kernel}.png").stat().st_size > 0
    table = capsys.readouterr().out
    assert table.count("ours") == len(rows) // len(on_cpu(bench)) + 1  # and the column time/ours


def test_cost_counts_what_the_tensors_hold():
    for bench in (BENCHES["nf4_quantize"], BENCHES["nf4_dequantize"]):
        for config in bench.configs:
            inputs = bench.inputs(4096, torch.device("cpu"), **config)
            tensors = [value for value in inputs.values() if torch.is_tensor(value)]
            if "state" in inputs:
                tensors += [value for value in vars(inputs["state"]).values() if torch.is_tensor(value)]
            tensors += bench.providers["ours"](inputs)().values()
            assert bench.cost(4096, **config)[0] == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("kernel", ON_CPU)
def test_a_wrong_result_gets_no_time(kernel, machine):
    ours = BENCHES[kernel].providers["ours"]

    def slightly_off(inputs):
        def run():
            name, *_ = result = ours(inputs)()
            off = result[name].clone()
            off.view(-1)[-1] += 1
            return result | {name: off}

        return run

    bench = with_provider(kernel, wrong=slightly_off)
    (case,) = Runner(machine, quick=True).cases(bench)
    assert [row.provider for row in case.rows] == on_cpu(BENCHES[kernel])
    assert case.refused["wrong"]
    (line,) = [line for line in Table(bench).lines(case) if "wrong" in line]
    assert line.split("wrong", 1)[1].strip() == f"no time: {case.refused['wrong']}"


def test_memory_stands_beside_the_times(machine):
    """Of the weights, and the peak: PEFT adds its update to a copy of the weights, ours has an expert dense."""
    bench = with_provider("experts_lora")
    (case,) = Runner(machine, quick=True).cases(bench)
    (packed, ours), (dense, peft) = case.memory["ours"], case.memory["peft"]
    weights, adapter = 16 * 3 * 768 * 384, 16 * 16 * (3 * 768 + 3 * 384)
    assert dense == 4 * weights and 4.12 < 8 * packed / weights < 4.15
    assert peft > 2 * dense and 0 < ours - packed - 4 * 2 * 768 * 384 < 3 * 4 * adapter
    lines = {name: line.split() for name, line in zip(case.memory, Table(bench).lines(case))}
    assert lines["ours"][-2:] == ["7.3", f"{ours / 1e6:.1f}"] and lines["peft"][-2:] == ["56.6", f"{peft / 1e6:.1f}"]
    assert Table(bench).header().endswith("weights, MB      peak, MB")


def test_the_peak_is_that_of_what_lives_at_once():
    def made():
        first = torch.empty(10**6)
        second = first * 2
        del first
        return second + 1

    for measured in (memory.highest, memory.highest_of_new_thread):  # numbers that torch holds for itself take bytes
        assert 8 * 10**6 <= measured(made) < 8 * 10**6 + 100


def test_a_large_layer_is_checked_in_part(machine, monkeypatch):
    """y and dx of some tokens, gradients of some experts: a wrong one is seen, by what PEFT and ours give too."""
    monkeypatch.setattr("kernels.bench.experts.CHECKED_WHOLE", 0)
    monkeypatch.setattr("kernels.bench.experts.CHECKED_TOKENS", 2)
    bench = BENCHES["experts_dora"]
    inputs = bench.inputs(4, torch.device("cpu"), **bench.configs[0])
    check, result = bench.check(inputs), bench.providers["ours"](inputs)()
    check(result)
    for name in result:
        wrong = result | {name: result[name].clone()}
        wrong[name][0] += 1
        with pytest.raises(AssertionError, match=f"{name}: error"):
            check(wrong)


UNSLOTH = """
import peft.tuners.lora.layer as layer
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3
calls = []

def changed(cls):
    own = cls.forward
    def forward(self, *args, **kwargs):
        calls.append(cls.__name__)
        return own(self, *args, **kwargs)
    cls.forward = forward

changed(layer.ParamWrapper)
changed(qwen3.Qwen3MoeExperts)
"""


def test_unsloth_computes_with_its_own_forwards_and_peft_with_peft_s(tmp_path, monkeypatch):
    """With a package that changes the classes that unsloth changes when it is imported. unsloth itself needs a GPU."""
    (tmp_path / "unsloth.py").write_text(UNSLOTH)
    monkeypatch.syspath_prepend(tmp_path)
    bench, forwards = BENCHES["experts_lora"], experts._forwards()
    inputs = bench.inputs(4, torch.device("cpu"), **bench.configs[0])
    check, peft = bench.check(inputs), bench.providers["peft"](inputs)
    try:
        unsloth = experts._timed_adapted(inputs, experts._forwards_of_unsloth())
        calls = sys.modules["unsloth"].calls
        check(peft())
        assert calls == [] and experts._forwards() == forwards
        check(unsloth())
        assert calls == ["ParamWrapper", "ParamWrapper", "Qwen3MoeExperts"]
        monkeypatch.setattr(experts, "_forwards", experts._forwards_of_unsloth)
        with pytest.raises(Unavailable, match="unsloth has changed ParamWrapper in this process"):
            bench.providers["peft"](inputs)
    finally:
        experts._forwards_of_unsloth.cache_clear()
        sys.modules.pop("unsloth", None)


def test_our_own_wrong_result_gets_no_time_and_fails_the_run(tmp_path, capsys):
    bench = with_provider("nf4_dequantize", ours=lambda inputs: lambda: {"w": torch.full((4096,), torch.nan)})
    assert run([bench], tmp_path / "b.csv", plots=None, quick=True) == 1
    assert "ours" not in {row["provider"] for row in read(tmp_path / "b.csv")}
    assert " of 16,384 bytes differ\n" in capsys.readouterr().out


def test_an_absent_package_is_said_once(machine):
    def absent(inputs):
        import no_such_package  # noqa: F401

    bench = unchecked("nf4_dequantize", ours=lambda inputs: dict, other=absent)
    runner = Runner(machine, quick=True)
    assert [row.provider for case in runner.cases(bench) for row in case.rows] == ["ours"] * len(bench.configs)
    assert runner.notes == ["other is left out: the package no_such_package is not installed"]


def test_gpu_only_is_left_out_and_said(machine):
    runner = Runner(machine, quick=True)
    assert not list(runner.cases(BENCHES["gemm"]))
    list(runner.cases(with_provider("nf4_dequantize")))
    gemm, unsloth = runner.notes
    assert gemm == "gemm is left out: it compares GPU kernels"
    assert unsloth == "unsloth is left out: unsloth runs on GPUs only"


def test_both_sides_of_the_gemm_are_right(monkeypatch):
    """In Triton's interpreter: what the benchmark on a GPU would time."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    bench = BENCHES["gemm"]
    inputs = bench.inputs(20, torch.device("cpu"), dtype="fp32", in_features=64, out_features=48, rank=16)
    check = bench.check(inputs)
    for provider in bench.providers.values():
        check(provider(inputs)())


def test_emulated_products_are_left_out(machine):
    slow = dataclasses.replace(machine, flops_per_s={"fp32": 1e11, "bf16": 1e9})
    runner = Runner(slow, quick=True)
    bench = unchecked("lora_linear", ours=lambda inputs: dict)
    assert {case.config["dtype"] for case in runner.cases(bench)} == {"fp32"}
    assert runner.notes == ["lora_linear in bf16 is left out: this machine emulates bf16 products"]


def test_names_are_those_of_the_benchmarks():
    assert list(BENCHES) == NAMES


def test_unknown_op_gives_one_line(tmp_path):
    with pytest.raises(SystemExit) as end:
        main(["nf5_quantize", "--csv", str(tmp_path / "b.csv")])
    assert end.value.code == f"error: no benchmark 'nf5_quantize': choose from {', '.join(NAMES)}"
    assert not (tmp_path / "b.csv").exists()


def test_interpreter_time_is_never_shown(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["nf4_quantize", "--csv", str(tmp_path / "b.csv")]) != 0
    shown = capsys.readouterr()
    assert shown.out == "" and not (tmp_path / "b.csv").exists()
    assert shown.err.startswith("error: TRITON_INTERPRET=1") and shown.err.count("\n") == 1


def test_a_busy_machine_is_noticed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("kernels.bench.__main__.OthersLoad.cores", lambda load: 1.26)
    assert main(["nf4_dequantize", "--quick", "--csv", str(tmp_path / "b.csv")]) == 0
    assert "others kept 1.3 cores of this machine busy meanwhile: measure again without them" in capsys.readouterr().out


class TestOnAGpu:
    """What a GPU adds, with a fake machine and fake clocks."""

    @pytest.fixture
    def on_gpu(self, machine, monkeypatch):
        """A runner with graph times: a call takes 4 µs, in a graph 2 µs. Providers named "waits" cannot be captured."""

        def graph_times(functions, device, seconds):
            return [[] if function.__name__ == "waits" else [2e-6] * 5 for function in functions]

        runner = Runner(machine, quick=True)
        runner.timers = {"time_ns": lambda functions, *_: [[4e-6] * 5 for _ in functions], "graph_ns": graph_times}
        return runner

    def test_graph_times_stand_beside_the_times_of_calls(self, on_gpu):
        def waits():
            return {}

        bench = unchecked(
            "rms_norm", ours=lambda inputs: dict, peer=lambda inputs: lambda: {}, other=lambda inputs: waits
        )
        case = next(on_gpu.cases(bench))
        metrics = [(row.provider, row.metric, row.p50) for row in case.rows]
        times = [(name, "time_ns", 4000.0) for name in ("ours", "peer", "other")]
        assert metrics == [*times, ("ours", "graph_ns", 2000.0), ("peer", "graph_ns", 2000.0)]
        floor = 5 * 4 * 8 * 576 / 1e9  # x, y, dy, x and dx in fp32 of 8 tokens at 1 GB/s
        assert [row.roofline_share for row in case.rows[::3]] == pytest.approx([floor / 4e-6, floor / 2e-6])
        assert "other of rms_norm cannot be captured in a CUDA graph: it has no graph time" in on_gpu.notes
        table = Table(bench, graphs=True)
        assert table.header().split("\n")[2].split()[-3:] == ["ns", "graph/ours", "roofline"]
        ours, peer, other = table.lines(case)
        assert ours.split()[-3:-1] == peer.split()[-3:-1] == ["250.0", "1.00"] and len(other.split()) < len(
            peer.split()
        )

    def test_shapes_of_real_models(self):
        """Llama-3's linears at both ranks, for 512 to 8192 tokens."""
        for kernel in ("lora_linear", "dora_linear", "gemm", "project", "outer"):
            bench = BENCHES[kernel].of_models()
            assert {512, 2048, 8192} <= set(bench.sizes)
            shapes = {(c["out_features"], c["in_features"], c["rank"]) for c in bench.configs}
            assert shapes == {(*s, r) for s in ((4096, 4096), (14336, 4096), (28672, 8192)) for r in (16, 64)}
        for bench in BENCHES.values():
            for config in bench.of_models().configs:
                n_bytes, flops = bench.cost(512, **config)
                assert n_bytes > 0 and flops > 0

    def test_the_flushes_are_subtracted(self):
        assert timing.per_call(graph=0.0035, flushes=0.0030) == pytest.approx(50e-6)
        assert timing.per_call(graph=0.0029, flushes=0.0030) > 0

    @pytest.mark.parametrize("kernel", ["project", "outer"])
    def test_thin_products_are_right(self, kernel, monkeypatch):
        """In Triton's interpreter."""
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        bench = BENCHES[kernel]
        inputs = bench.inputs(20, torch.device("cpu"), dtype="fp32", in_features=64, out_features=48, rank=16)
        for provider in bench.providers.values():
            bench.check(inputs)(provider(inputs)())


class TestCard:
    def test_without_a_gpu_it_says_so(self, capsys):
        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
        assert card.main([]) == 1
        assert capsys.readouterr().err.startswith("error: no GPU: ")

    def test_a_stage_that_fails_or_hangs_costs_itself_alone(self, tmp_path, monkeypatch, capfd):
        monkeypatch.setattr(card, "RESULTS", tmp_path)
        rows = [
            f'gemm,{provider},forward,graph_ns,{x},1,{p50},3,8,9,0.5,"{{""rank"": 16}}",card,{{}},abc'
            for x, provider, p50 in ((512, "ours", 1000), (2048, "ours", 4000), (2048, "library", 2000))
        ]
        write = f"open({str(tmp_path / 'a.csv')!r}, 'w').write({COLUMNS + chr(10) + chr(10).join(rows)!r})"
        stages = (
            card.Stage("works", ("-c", write), 60),
            card.Stage("fails", ("-c", "raise SystemExit(3)"), 60),
            card.Stage("hangs", ("-c", "import time; time.sleep(60)"), 1),
        )
        assert card.run(stages) == 1
        out = capfd.readouterr().out
        assert "works      passed\nfails      failed with exit code 3\nhangs      stopped after 1 s\n" in out
        assert out.rstrip().split("\n")[-1].split() == ["gemm", "2,048", "4.0", "50%", "library", "0.50", "rank=16"]

    def test_its_stages_name_what_there_is(self):
        assert tuple(stage.name for stage in card.STAGES) == card.card_arguments.STAGES
        for stage in card.STAGES:
            values = {stage.arguments[i + 1] for i, a in enumerate(stage.arguments) if a in ("-k", "--seconds")}
            for argument in [a for a in stage.arguments[2:] if a not in values]:
                if argument.startswith("tests/"):
                    assert Path(argument).exists()
                elif not argument.startswith(("-", str(card.RESULTS))):
                    assert argument in BENCHES
        assert sum(stage.limit for stage in card.STAGES) <= 7 * 60
