"""The comparison on a GPU, on a CPU: both sides train and decode alike; what fails or differs gets no ratio."""

import csv
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from experiments.bench import arguments
from experiments.bench.gpu import driver, profile, report, trace
from experiments.bench.gpu.report import Results, apart
from experiments.bench.gpu.stages import LINEAR, PEAK, STAGES, STEP, TARGETS, Case, Stage
from experiments.errors import UserError

SMALL = {
    **{"model_type": "llama", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128},
}


def test_sides_agree_and_one_that_fails_costs_itself_alone(monkeypatch, tmp_path, capsys):
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(driver, "architecture_of", lambda preset: dict(SMALL))
    monkeypatch.setattr(driver, "PROMPT", 8)
    monkeypatch.setattr(driver, "NEW", 3)
    monkeypatch.setattr(driver, "EAGER", (16, 2))
    monkeypatch.setattr(driver, "NEEDS", driver.NEEDS | {"unsloth": ()})
    small = {"batch": 2, "length": 16, "rank": 4}
    case = Case("qlora", **small, decodes=True, products=True, sides=("ours", "peft", "unsloth"))
    dora = Case("qdora", **small, alone=True)
    monkeypatch.setattr(report, "TARGETS", [of_case(target, case) for target in TARGETS])
    results = Results("no card", "cpu")
    driver.run_stage(Stage("small", 300, (dora, case), linear=True), results, steps=2)
    assert not results.differ
    assert [(name, side) for name, side, _ in results.failures] == [("small", "unsloth"), (str(case), "unsloth")]
    assert "No module named 'unsloth'" in results.failures[0][2]
    for one in (dora, case):
        ours, theirs = (results.losses[one, side] for side in ("ours", "peft"))
        assert len(ours) == driver.CHECKED and ours == pytest.approx(theirs, rel=1e-3) and ours[-1] < ours[0]
    assert results.first_tokens[case, "ours", 16] == results.first_tokens[case, "peft", 16]
    measured = {(side, metric) for name, side, metric in results.samples if name != str(dora)}
    both = {(side, m) for side in ("ours", "peft") for m in (STEP, "prefill_1", "decode_1", "prefill_16", "decode_16")}
    assert measured == both | {("ours", "products_ms"), ("ours", "host_us"), ("torch", "host_us")}
    lines = report.table(results)
    assert any("–" in line and "unsloth: ModuleNotFoundError" in line for line in lines)
    report.write(tmp_path / "new" / "a.csv", results)
    report.plot(tmp_path / "new" / "a.png", results)
    with (tmp_path / "new" / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["card"] for row in rows} == {"no card"} and f"torch {torch.__version__}" in rows[0]["versions"]
    assert "unsloth: ModuleNotFoundError" in capsys.readouterr().out


def of_case(target, case):
    """The target, of `case` in place of its own."""
    cells = (dataclasses.replace(c, case=c.case if c.case == LINEAR else case) for c in (target.ours, target.other))
    return dataclasses.replace(target, **dict(zip(("ours", "other"), cells)))


def full() -> Results:
    """Results in which ours takes half of everything."""
    results = Results("a card", "cuda")
    for target in TARGETS:
        for cell, value in ((target.ours, 1.0), (target.other, 2.0)):
            results.add(cell.case, cell.side, cell.metric, [value])
            if isinstance(cell.case, Case):
                results.losses[cell.case, cell.side] = [5.0, 4.0, 3.0]
                for rows in driver.BATCHES:
                    results.first_tokens[cell.case, cell.side, rows] = [7] * rows
    return results


def test_targets_and_their_table():
    results = full()
    told = dict(zip((target.name for target in TARGETS), report.table(results)[1:], strict=True))
    assert told["QLoRA, 8 layers, over unsloth"].split()[-4:] == ["0.500", "≤", "0.7", "yes"]
    assert told["QDoRA over PEFT + bitsandbytes"].split()[-4:] == ["0.500", "≤", "0.3", "no"]
    assert told["decoding, batch 16, tokens/s over peft"].split()[-4:] == ["0.500", "≥", "8", "no"]
    assert told["QDoRA over our QLoRA"].split()[-2:] == ["1.07", "yes"]


def test_losses_that_differ_and_other_texts_get_no_ratio():
    results = full()
    target = next(target for target in TARGETS if target.name == "QDoRA over PEFT + bitsandbytes")
    case = target.ours.case
    results.losses[case, "peft"] = [5.0, 4.2, 3.0]
    results.compare(case)
    assert results.refusal(target) == "the losses differ at step 1: 4.0000 and 4.2000"
    decoding = next(target for target in TARGETS if target.name == "decoding, batch 16, tokens/s over peft")
    results.first_tokens[decoding.other.case, "peft", 16] = [7] * 11 + [8] * 5
    assert results.refusal(decoding) == "11 of 16 first tokens are the same"


def test_apart():
    assert apart([11.0, 10.0, 9.0], [11.0, 10.1, 9.05]) is None
    assert apart([11.0, 10.95], [11.0, 10.9]) == "over 2 steps the loss falls by 0.0500 and 0.1000"
    assert apart([11.0, math.nan], [11.0, 10.9]).startswith("the losses differ at step 1")


def test_a_side_that_hangs_is_ended_and_begun_anew(monkeypatch, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, sys, time\nfrom multiprocessing.connection import Connection\n"
        "pipe = Connection(int(sys.argv[2]))\npipe.send(({'torch': '1'}, None))\n"
        "while pipe.recv()[0] != 'hang':\n    pipe.send((True, None))\ntime.sleep(60)\n"
    )
    monkeypatch.setattr(driver.worker, "__file__", str(script))
    results = Results("a card", "cpu")
    sides = driver.Sides(results, deadline=math.inf, unsloth=None)
    try:
        sides.start("a", ["ours"])
        assert sides.ask("a", "ours", "work") is True
        assert sides.ask("a", "ours", "hang", seconds=1) is None
        assert results.failures == [("a", "ours", "no answer in 1 s")]
        assert sides.ask("a", "ours", "work") is None
        sides.start("b", ["ours"])
        assert sides.ask("b", "ours", "work") is True
    finally:
        sides.close()


def event(name, device=DeviceType.CPU, microseconds=0, annotation=False):
    span = SimpleNamespace(elapsed_us=lambda: microseconds)
    more = {"self_device_time_total": 0, "cpu_parent": None, "kernels": []}
    return SimpleNamespace(name=name, device_type=device, time_range=span, is_user_annotation=annotation, **more)


def test_busy_time_is_the_sum_of_kernels():
    busy = trace.busy(
        [
            event("aten::mm", microseconds=900),
            event("cudaLaunchKernelExC"),
            event("cudaGraphLaunch"),
            event("cudaDeviceSynchronize"),
            event("gemm", DeviceType.CUDA, 30),
            event("gemm", DeviceType.CUDA, 20),
            event("Memcpy HtoD", DeviceType.CUDA, 10),
            event("Optimizer.step", DeviceType.CUDA, 60, annotation=True),
        ]
    )
    assert (busy.seconds, busy.kernels, busy.launches) == (pytest.approx(60e-6), 3, 2)
    assert list(busy.by_name) == ["gemm", "Memcpy HtoD"] and busy.idle_share(240e-6) == pytest.approx(0.75)
    results = Results("a card", "cuda")
    case = Case("lora")
    results.add(case, "ours", STEP, [0.24])
    results.busy(case, "ours", dataclasses.asdict(busy))
    assert results.median(case, "ours", "gpu_idle_share") == pytest.approx(0.75)
    assert results.median(case, "ours", "launches") == 2


def test_stages_fit_beside_the_checks_and_name_presets_that_there_are():
    from kernels.bench.card import STAGES as CHECKS

    assert sum(stage.limit for stage in (*STAGES, *CHECKS)) <= 14 * 60
    cases = [case for stage in STAGES for case in stage.cases]
    for target in TARGETS:
        assert all(cell.case in (*cases, LINEAR) for cell in (target.ours, target.other))
        assert all(cell.case == LINEAR or cell.side in cell.case.sides for cell in (target.ours, target.other))
        assert target.ours.metric != PEAK or target.other.metric == PEAK
    for preset in {case.preset for case in cases}:
        assert driver.architecture_of(preset)["model_type"] == "llama"
    with pytest.raises(UserError, match=r"no preset smollm2: choose gemma-3-1b, .*, smollm2-135m$"):
        driver.architecture_of("smollm2")


def test_time_of_ops_goes_to_ours_and_to_the_optimizer():
    def call(name, microseconds=0, parent=None, kernels=1):
        made = event(name)
        made.self_device_time_total, made.cpu_parent, made.kernels = microseconds, parent, [None] * kernels
        return made

    linear, step = call("qdora::lora_linear", 5, kernels=2), call("Optimizer.step#AdamW.step")
    events = [
        linear,
        call("aten::mm", 20, parent=call("aten::matmul", parent=linear)),
        call("aten::mm", 4),
        call("aten::add_", 3, parent=step),
        step,
        event("gemm", DeviceType.CUDA, 20),
    ]
    ops = trace.by_op(events)
    assert list(ops) == ["qdora::lora_linear", "aten::mm", "Optimizer.step#AdamW.step"]
    assert [kernels for _, kernels in ops.values()] == [3, 1, 1]
    assert [seconds for seconds, _ in ops.values()] == pytest.approx([25e-6, 4e-6, 3e-6])


def test_a_profile_describes_a_step(monkeypatch):
    def events_of(step):
        step()
        mm = event("aten::mm")
        mm.self_device_time_total = 300
        return [mm, event("cudaGraphLaunch"), event("gemm", DeviceType.CUDA, 300)]

    monkeypatch.setattr(driver, "architecture_of", lambda preset: dict(SMALL))
    monkeypatch.setattr(trace, "events_of", events_of)
    monkeypatch.setattr(profile, "STEPS", 1)
    text = profile.lines(Case("qdora", batch=1, length=8, rank=2), "cpu")
    assert text[1].startswith("a step ")
    assert text[1].split()[-2:] == ["1", "1"]
    assert any(line.split() == ["aten::mm", "0.30", "100.0%", "1"] for line in text)
    assert any(line.split() == ["gemm", "0.30", "100.0%"] for line in text)
    many = {f"op{i}": (1.0, 2) for i in range(profile.SHOWN + 3)}
    assert profile._largest(many)[-1] == ("3 others", (3.0, 6))


def test_the_command_ends_with_the_table_and_keeps_what_it_has(monkeypatch, tmp_path, capsys):
    def run_stage(stage, results, steps, unsloth):
        assert steps == 20 and unsloth is None
        if stage.name == "small":
            case = stage.cases[0]
            for side, time in (("ours", 20.0), ("peft", 500.0)):
                results.add(case, side, STEP, [time])
            results.versions = {"ours": {"torch": "2"}, "peft": {"torch": "2", "peft": "1"}}
            return
        assert "smollm2" in (tmp_path / "a.csv").read_text(), "written before the next stage"
        results.failed(LINEAR, "ours", "no answer in 25 s")

    monkeypatch.setattr(driver, "run_stage", run_stage)
    monkeypatch.setattr(driver.torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(driver.machine, "describe", lambda device, dtype: "bfloat16 on a card")
    driver.run(arguments.bench(["small", "linear", "--csv", str(tmp_path / "a.csv")]))
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("a card; torch 2, peft 1 (peft)")
    told = [line for line in lines[start:] if "  no" in line or "25 s" in line]
    assert told[0].startswith("SmolLM2's shape, 8×128, QDoRA over PEFT") and told[0].split()[-4] == "0.040"
    assert told[1].startswith("eager linear") and told[1].endswith("– ours: no answer in 25 s")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "a.csv").open() as file:
        assert ("not met", "a card") in {(row["note"], row["card"]) for row in csv.DictReader(file)}
