"""The report on results that are made up, so that what it must say is known."""

import base64
import csv
import json
import re
from dataclasses import replace

import pytest

from experiments.report import __main__ as command
from experiments.report.plots import band, pictures
from experiments.runs.groups import read_runs
from tests.experiments.made_up_results import groups_of, write_run


def test_everything_is_written_and_the_page_needs_nothing_beside_it(terminal, results):
    code, text = terminal(command, str(results))
    assert code == 0 and "15 runs compared" in text, text
    names = {path.name for path in (results / "report").iterdir()}
    drawn = {"1-settings.png", "1-rank.png", "1-cost.png", "1-curves.png"}
    assert names == {"report.html", "report.md", "runs.csv"} | drawn
    page = (results / "report" / "report.html").read_text()
    embedded = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert {base64.b64decode(image) for image in embedded} == {
        (results / "report" / name).read_bytes() for name in drawn
    }
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "<li>" in page and "<li>" not in re.sub("<ul>(<li>.*?</li>)+</ul>", "", page)
    hashes = {json.loads(path.read_text())["config_hash"] for path in results.glob("*/result.json")}
    captions = re.findall(r"<figcaption>.*?</figcaption>", page)
    assert len(captions) == 4 and all(h in caption for caption in captions for h in hashes)
    markdown = (results / "report" / "report.md").read_text()
    assert all(f"]({name})" in markdown for name in drawn)
    assert "Lowest held-out loss: **lora rank=16**, 2.8233 ± 0.0252 nats a token" in markdown

    with (results / "report" / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 15 and {row["config_hash"] for row in rows} == hashes
    [row] = [r for r in rows if (r["method.name"], r["rank"], r["seed"]) == ("qdora", "16", "1")]
    assert (row["loss_after"], row["quant.blocksize"], row["quant.double"]) == ("2.845", "64", "true")
    assert {r["rank"] for r in rows if r["method.name"] == "full"} == {""}
    assert terminal(command, str(results))[0] == 0  # again, over the first


def test_a_band_has_the_steps_that_all_curves_have():
    curves = [[{"step": s, "loss": s + k, "lr": 0} for s in range(1, 4 + k)] + [{"step": 9}] for k in range(2)]
    steps, middle, deviation = band(curves, "loss")
    assert (steps, middle.tolist()) == ([1, 2, 3], [1.5, 2.5, 3.5])
    assert deviation == pytest.approx([0.5**0.5] * 3)


def test_block_sizes_are_drawn_with_their_bits(tmp_path):
    for blocksize in (32, 256, 4096):
        for double in (True, False):
            write_run(tmp_path, "qlora", 0, 2.8 + blocksize / 1e5, quant__blocksize=blocksize, quant__double=double)
    write_run(tmp_path, "lora", 0, 2.79)
    [one] = groups_of(tmp_path)
    drawn = {picture.name: picture for picture in pictures(one)}
    assert drawn.keys() == {"settings", "block_size", "cost", "curves"} and len(drawn["block_size"].runs) == 6
    panels = drawn["block_size"].figure.axes
    assert [axes.get_xlabel() for axes in panels] == ["block size (weights that share an absmax)"] * 3
    assert [axes.get_ylabel() for axes in panels][2] == "bits a weight"
    bits = panels[2].get_lines()[0].get_xydata().tolist()
    assert [x for x, _ in bits] == [32, 256, 4096] and bits[0][1] == pytest.approx(4 + 8.127 / 32)


def test_what_else_was_measured_is_drawn_and_told(terminal, tmp_path):
    for row, (method, modules) in enumerate([("lora", ["q_proj"]), ("lora", "all-linear"), ("bitfit", None)]):
        for seed in range(2):
            changes = {"target_modules": modules} if modules else {}
            path = write_run(tmp_path, method, seed, 2.9 - row / 10 + seed / 100, second__name="arithmetic", **changes)
            result = json.loads((path / "result.json").read_text())
            result |= {"exact_match_before": 0.0, "exact_match_after": 0.5 + row / 10, "second_loss_before": 2.0}
            result |= {"second_loss_after": 2.1 - row / 20, "cpu_energy_joules": None}
            result |= {f"exact_match_level_{n}_{when}": 0.5 for n in (1, 2) for when in ("before", "after")}
            (path / "result.json").write_text(json.dumps(result))
            if modules:
                result["effective_rank"] = 3.0
                (path / "result.json").write_text(json.dumps(result))
                ranks = "".join(f"model.layers.{n}.self_attn.q_proj,{2 + n}\n" for n in range(3))
                (path / "spectrum.csv").write_text(f"layer,effective_rank\n{ranks}")
                loads = "".join(f"model.layers.{n}.mlp.experts,4,{1 + n},0,1\n" for n in range(3))
                (path / "experts.csv").write_text(f"layer,experts,max_over_mean,without_tokens,shares\n{loads}")
                result |= {"expert_imbalance": 2.0, "experts_without_tokens": 3}
                (path / "result.json").write_text(json.dumps(result))
    [one] = groups_of(tmp_path)
    drawn = {picture.name: picture for picture in pictures(one)}
    assert drawn.keys() == {
        *("settings", "target_modules", "cost", "exact_match", "forgetting", "rank_in_use", "expert_load", "curves"),
    }
    assert [len(drawn[name].runs) for name in ("target_modules", "rank_in_use", "exact_match")] == [4, 4, 6]
    by_kind, by_depth = drawn["rank_in_use"].figure.axes
    assert [line.get_ydata().tolist() for line in by_depth.get_lines()[:1]] == [[2, 3, 4]]
    assert by_kind.get_lines()[0].get_ydata().tolist() == [3]
    assert drawn["expert_load"].figure.axes[0].get_lines()[0].get_ydata().tolist() == [1, 2, 3]
    assert [label.get_text() for label in drawn["exact_match"].figure.axes[0].get_xticklabels()] == [
        *("all", "level 1", "level 2"),
    ]
    copy = tmp_path / "copy"
    assert terminal(command, str(tmp_path), "--to", str(copy))[0] == 0
    markdown = (copy / "report" / "report.md").read_text()
    assert "Most right answers: **bitfit**, 70.0 %." in markdown and "exact match | second loss rose by |" in markdown
    assert "Least forgotten (rise of the loss on the second domain): **bitfit**, 0.000." in markdown
    assert [run.effective_ranks for run in read_runs(copy)[0]] == [run.effective_ranks for run in one.runs]
    assert [run.expert_loads for run in read_runs(copy)[0]] == [run.expert_loads for run in one.runs]
    assert "busiest expert over its even share | experts without a token |" in markdown and "2.00 | 3.0 |" in markdown
    assert "energy" not in markdown  # nobody measured it


def test_models_data_and_versions_are_kept_apart_and_it_is_said(terminal, results):
    write_run(results, "lora", 0, 1.0, model__name="other")
    write_run(results, "lora", 0, 1.1, results_version=2)
    write_run(results, "lora", 0, 1.2, data__max_length=256, versions={"torch": "2.12.0"})
    write_run(results, "lora", 1, 1.2, data__max_length=256)
    write_run(results, "qlora", 0, 1.3, data__max_length=256, shared_base=True)
    write_run(results, "qlora", 1, 1.3, data__max_length=256, shared_base=False)
    code, text = terminal(command, str(results))
    assert code == 0, text
    markdown = (results / "report" / "report.md").read_text()
    assert "of 4 kinds that cannot be compared" in markdown
    for title in (
        "## smollm2 on docstrings, results of version 1 (data.max_length=192)",
        "## smollm2 on docstrings, results of version 1 (data.max_length=256)",
        "## smollm2 on docstrings, results of version 2",
        "## other on docstrings, results of version 1",
    ):
        assert f"{title}\n" in markdown
    assert "Compare with care: runs made with different torch: 2.12.0, 2.13.0" in markdown
    assert "Compare with care: runs that packed their own base, which may be the peak of their memory" in markdown
    assert "**lora rank=16**, 2.8233" in markdown  # as without them


def test_files_that_are_no_results_are_named_and_left_out(terminal, results):
    bad = {
        "half": '{"method": "lo',
        "list": "[]",
        "old": '{"method": "lora", "loss_after": 2}',
        "nan": (next(results.glob("lora*")) / "result.json")
        .read_text()
        .replace('"loss_after": 2.', '"loss_after": NaN, "x": 2.'),
        "binary": b"\xff\xfe",
    }
    for name, content in bad.items():
        (results / name).mkdir()
        (results / name / "result.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    copied = next(results.glob("full*seed=0*"))
    (results / "z_copy").mkdir()
    (results / "z_copy" / "result.json").write_bytes((copied / "result.json").read_bytes())
    write_run(results, "lora", 9, 2.9, curve=False, rank=4)
    code, text = terminal(command, str(results))
    assert code == 0 and "16 runs compared" in text
    markdown = (results / "report" / "report.md").read_text()
    for said in (
        "half/result.json: not JSON: ",
        "list/result.json: not a JSON object",
        "old/result.json: it does not say of which configuration it is",
        "nan/result.json: missing or not a finite number: loss_after",
        "binary/result.json: not UTF-8",
        f"z_copy: the same run as {copied.name}, which counts",
        "no metrics.jsonl that can be read, so it is missing among the training curves",
    ):
        assert said in text and said in markdown, said


def test_a_copy_holds_what_a_report_reads_and_replaces_a_copy_only(terminal, results, tmp_path_factory):
    copy = tmp_path_factory.mktemp("to") / "copy"
    for run in results.glob("*"):
        (run / "adapter").mkdir()
        (run / "adapter" / "adapter_model.safetensors").touch()
    first = sorted(results.glob("full*"))[0]
    for _ in range(2):
        code, text = terminal(command, str(results), "--to", str(copy))
        assert code == 0 and f"open {copy / 'report' / 'report.html'}" in text, text
    assert not (results / "report").exists()
    copied = {path.name for path in copy.rglob("*") if path.is_file()}
    assert {"result.json", "metrics.jsonl", "report.html", "runs.csv"} < copied and "adapter" not in copied
    runs, originals = ({run.identity: run for run in read_runs(folder)[0]} for folder in (copy, results))
    identity = json.loads((first / "result.json").read_text())["config_hash"]
    there = copy / runs[identity].name
    assert there.name.startswith("full") and there.name.endswith(f"_{identity}")
    assert (there / "metrics.jsonl").read_bytes() == (first / "metrics.jsonl").read_bytes()
    assert runs == {identity: replace(run, name=runs[identity].name) for identity, run in originals.items()}
    assert terminal(command, str(copy))[0] == 0
    code, text = terminal(command, str(copy), "--to", str(results))
    assert code == 1 and f"does not belong to a copy of results: choose another folder than {results}" in text


@pytest.mark.parametrize("content", [None, "{"])
def test_nothing_to_report_is_one_line(terminal, tmp_path, content):
    if content:
        (tmp_path / "result.json").write_text(content)
    code, text = terminal(command, str(tmp_path))
    assert code == 1 and text.startswith(f"error: {tmp_path}: no results: ") and text.count("\n") <= 1
    assert ("not JSON" if content else "no result.json in it or below") in text
    assert not (tmp_path / "report").exists()
    code, text = terminal(command, str(tmp_path / "nowhere"))
    assert code == 1 and "nowhere: no such folder" in text


def test_one_run_is_a_report_without_comparisons(terminal, tmp_path):
    write_run(tmp_path, "qdora", 0, 2.8)
    assert terminal(command, str(tmp_path))[0] == 0
    markdown = (tmp_path / "report" / "report.md").read_text()
    assert "**qdora**, 2.8000 nats a token (one seed, so no spread is known)" in markdown
    assert {path.name for path in (tmp_path / "report").glob("*.png")} == {"1-curves.png"}


@pytest.mark.parametrize(
    "second, why",
    [
        ({}, None),
        ({"crowded": True}, "other processes needed the cores during 1 of 2 runs"),
        ({"threads": 1}, "the runs were made with different threads"),
        ({"device": "H100"}, "the runs were made with different device"),
    ],
)
def test_times_are_compared_only_if_the_machine_allows(terminal, tmp_path, second, why):
    machine = {"device": "EPYC", "threads": 2, "others_cores": 0.5, "crowded": False}
    write_run(tmp_path, "lora", 0, 2.9, machine=machine)
    write_run(tmp_path, "dora", 0, 2.8, machine=machine | second)
    assert terminal(command, str(tmp_path))[0] == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert ("the least training time" in text) == (why is None)
    assert why is None or f"- Training times are not compared: {why}." in text
    with (tmp_path / "report" / "runs.csv").open() as file:
        assert {row["machine.others_cores"] for row in csv.DictReader(file)} == {"0.5"}


def test_a_setting_has_one_look_and_a_search_its_learning_rates(tmp_path):
    for row, lr in enumerate((1e-4, 1e-3, 1e-2)):
        for method in ("lora", "full"):
            write_run(tmp_path, method, 0, 2.9 - row / 10, lr=lr, peak_memory_bytes=(5 + row) * 10**9)
    [one] = groups_of(tmp_path)
    drawn = {picture.name: picture for picture in pictures(one)}
    [axes] = drawn["learning_rate"].figure.axes
    assert axes.get_xscale() == "log" and {line.get_label() for line in axes.get_lines()} == {"lora", "full"}
    assert sorted(axes.get_lines()[0].get_xdata()) == [1e-4, 1e-3, 1e-2]

    def colours(axes) -> dict[str, str]:
        handles, labels = axes.get_legend_handles_labels()
        return {label: getattr(handle, "lines", [handle])[0].get_color() for handle, label in zip(handles, labels)}

    cost, curves = colours(drawn["cost"].figure.axes[0]), colours(drawn["curves"].figure.axes[1])
    assert len(curves) == 6 and all(cost[label] == colour for label, colour in curves.items())
    assert len(set(curves.values())) == 6


def test_costs_that_are_the_same_have_no_winner(terminal, tmp_path):
    for method, memory in (("lora", 0.670e9), ("dora", 0.671e9)):
        for seed, loss in enumerate((2.8, 2.9)):
            path = write_run(tmp_path, method, seed, loss + (method == "dora") * (-1) ** seed * 0.01) / "result.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"peak_memory_bytes": memory}))
    assert terminal(command, str(tmp_path))[0] == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "- Of those none has the least memory: they are no more than 1% apart, 0.67" in text, text
