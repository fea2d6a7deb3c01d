"""Studies: what is compared, what is run next, and what the report says of results that are known."""

import dataclasses
import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
from omegaconf import OmegaConf

from experiments import report, study
from experiments.config import resolve
from experiments.errors import UserError
from experiments.report import __main__ as report_command
from experiments.runs import sweep
from experiments.runs.heldout import Samples
from experiments.studies import comparisons, definition
from experiments.studies.answers import answers, common_gain
from experiments.studies.comparisons import rise_at
from experiments.studies.differences import differences, told
from experiments.studies.plan import FINAL, SEARCH, Results, plan
from experiments.system.cli import composed
from tests.experiments.helpers import result
from tests.experiments.studies.made_up_study import write_job, write_study

QUICK = definition.FOLDER / "quick.yaml"


def changed(folder: Path, **values) -> str:
    """The quick study with other values, as a file."""
    text = OmegaConf.to_container(OmegaConf.load(QUICK))
    for key, value in values.items():
        OmegaConf.update(made := OmegaConf.create(text), key.replace("__", "."), value, merge=False)
        text = OmegaConf.to_container(made)
    path = folder / "mine.yaml"
    OmegaConf.save(OmegaConf.create(text), path)
    return str(path)


@pytest.mark.parametrize(
    ("a", "b", "things"),
    [
        ("+method=lora rank=4", "+method=dora rank=4", {"method.adapter"}),
        ("+method=lora rank=4", "+method=lora rank=64 lr=1", {"rank"}),
        ("+method=lora rank=4", "+method=lora rank=64 lora_alpha=16", {"rank", "lora_alpha"}),
        ("+method=lora rank=4", "+method=lora rank=4 rslora=true lora_alpha=16", {"rslora"}),
        ("+method=lora", "+method=qlora", {"quant.name"}),
        ("+method=lora", "+method=qdora", {"quant.name", "method.adapter"}),
        ("+method=qlora", "+method=qlora quant.blocksize=32", {"quant.blocksize"}),
        ("+method=qlora", "+method=qlora quant=tuned quant.map=x", {"quant.map"}),
        ("+method=qlora", "+method=qlora quant=fp4 quant.blocksize=32", {"quant.name", "quant.blocksize"}),
        ("+method=qlora", "+method=qlora init=loftq seed=3", {"init"}),
        ("+method=full", "+method=lora rank=8", {"method.adapter"}),
        ("+method=lora", "+method=lora target_modules=[q_proj]", {"target_modules"}),
        ("+method=lora", "+method=lora trainer.steps=7 data.part=validation", {"trainer.steps", "data.part"}),
    ],
)
def test_differences_are_counted_by_thing(a, b, things):
    one, other = (resolve(composed(*given.split(), "output_dir=x")) for given in (a, b))
    assert set(differences(one, other)) == set(differences(other, one)) == things
    assert not differences(one, one)


def test_sizes_of_other_methods_follow_where_parameters_are_equal():
    given = "+method=lora rank=16", "+method=houlsby rank=70"
    one, other = (resolve(composed(*args.split(), "output_dir=x")) for args in given)
    assert set(differences(one, other)) >= {"method.adapter", "rank"}
    assert set(differences(one, other, equal_parameters=True)) == {"method.adapter"}
    assert told({"rank": ("1", "2"), "init": ("a", "b")}) == "rank (1, 2) and init (a, b)"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"settings__dora__set": ["+method=qdora", "rank=2"]},
            "differ in quant.name (none, nf4) and method.adapter (lora",
        ),
        ({"settings__dora__set": ["+method=lora", "rank=2"]}, "lora and dora differ in nothing, not in one thing"),
        ({"questions__dora__compare": [["lora", "lola"]]}, "no setting is called lola"),
        ({"questions__dora__tasks": ["sums"]}, "no task is called sums"),
        ({"settings__dora__lr": "high"}, "no grid of learning rates is called high"),
        ({"search__keep": [2, 1]}, "keep has one number fewer"),
        ({"lr__low_rank": [1e-3, -1.0]}, "all above 0"),
        ({"size__most": 1}, "most is no fewer"),
        ({"settings__dora__set": ["+method=dora", "rank=0"]}, "dora on arithmetic: rank=0: choose 1 or more"),
        ({"sise": 3}, "Key 'sise' not in 'Definition'"),
    ],
)
def test_definitions_that_cannot_be(tmp_path, values, message):
    with pytest.raises(UserError) as told_of:
        definition.read(changed(tmp_path, **values))
    assert message in str(told_of.value) and "\n" not in str(told_of.value)


def test_a_study_that_is_not_there(terminal):
    code, text = terminal(study, "study=unfair")
    assert code == 1 and "there are fair, quick" in text and "Traceback" not in text


def test_halving_sees_no_held_out_sample_and_final_runs_see_no_other_seed(tmp_path):
    given = {"lr__low_rank": [1e-4, 1e-3, 1e-2, 1e-1], "search__steps": [1, 2, 4], "search__keep": [2, 1]}
    given["search__samples"] = 7
    one = definition.read(changed(tmp_path, **given, size__most=5))
    jobs = write_study(tmp_path / "runs", one, {}, best=1e-2)
    searches = [job for job in jobs if job.stage == SEARCH]
    assert {job.cfg.data.part for job in searches} == {"validation"} and {job.cfg.seed for job in searches} == {1000}
    assert {job.cfg.data.max_heldout for job in searches} == {7}
    for setting in ("lora", "dora"):
        own = [job for job in searches if job.setting == setting]
        tried = {steps: {job.cfg.lr for job in own if job.cfg.trainer.steps == steps} for steps in (1, 2, 4)}
        assert len(tried[1]) == 4 and len(tried[2]) == 2 and tried[4] == {1e-2}, "one factor of ten away costs 0.05"
        assert sum(job.cfg.trainer.steps for job in own) == one.budget(setting) == 4 + 2 * 2 + 4
    finals = [job for job in jobs if job.stage == FINAL]
    assert {job.cfg.data.part for job in finals} == {"heldout"} and {job.cfg.trainer.steps for job in finals} == {4}
    assert {job.cfg.data.max_heldout for job in finals} == {12}
    assert {job.cfg.lr for job in finals} == {0.5e-2, 1e-2}, "those of the forgetting question, too"
    assert 0 in {job.cfg.seed for job in finals} and max(job.cfg.seed for job in finals) < 5
    assert not {job.cfg.seed for job in finals} & {job.cfg.seed for job in searches}


@pytest.mark.parametrize(
    ("excess", "level"),
    [
        ({1e-4: 0.5, 1e-3: 0.009, 1e-2: 0.0}, [1e-3, 1e-2]),  # the standard error of its difference is 0.1 / √100
        ({1e-4: 0.5, 1e-3: 0.011, 1e-2: 0.0}, [1e-2]),
        ({1e-4: 0.5, 1e-3: 0.0, 1e-2: 0.009}, [1e-3, 1e-2]),
        ({1e-4: 0.008, 1e-3: 0.004, 1e-2: 0.0}, [1e-4, 1e-3, 1e-2]),
    ],
)
def test_the_learning_rates_that_are_level_with_the_best(excess, level):
    samples = {}
    for lr, more in excess.items():
        noise = numpy.tile([-0.1, 0.1], 50) * math.sqrt(0.99) if more else 0.0
        losses = 2.0 + numpy.linspace(0, 3, 100) + noise + more
        samples[lr] = Samples([f"{n}" for n in range(100)], {"loss": losses}, {"loss": numpy.full(100, 7.0)})
    runs = {
        lr: SimpleNamespace(name=f"lr={lr}", lr=lr, measures={"loss_after": float(one.values["loss"].mean())})
        for lr, one in samples.items()
    }
    assert comparisons.level(runs, lambda run: samples[run.lr]) == level
    samples[1e-4].names[3] = "another"
    with pytest.raises(UserError, match="were measured on different samples: delete one"):
        comparisons.level(runs, lambda run: samples[run.lr])


@pytest.mark.parametrize(
    ("noise", "chosen"),
    [(1.0, 1e-2), (0.05, 1e-3)],  # of DoRA's samples: its loss is 0.05 higher at LoRA's rate, which may be noise
)
def test_a_setting_gets_the_learning_rate_of_its_reference_where_that_is_level(tmp_path, noise, chosen):
    one = definition.read(changed(tmp_path, search__steps=[1, 2], search__keep=[2]))
    assert (one.reference_of("arithmetic", "lora"), one.reference_of("arithmetic", "dora")) == (None, "lora")
    results = Results(tmp_path / "runs")
    for dora_first in (True, False):
        for _ in one.search.steps:
            for job in plan(one, results).missing(results):
                if job.stage == SEARCH and (job.setting == "dora") == dora_first:
                    about = {"noise": noise, "best": 1e-3} if dora_first else {"noise": 0.05, "best": 1e-2}
                    write_job(tmp_path / "runs", job, **about)
            results.refresh()
        assert not dora_first or not plan(one, results).choices, "DoRA's depends on LoRA's"
    made = plan(one, results)
    assert made.choices == {("arithmetic", "lora"): 1e-2, ("arithmetic", "dora"): chosen}


def test_a_setting_whose_reference_has_no_learning_rate_gets_its_own(tmp_path):
    one, results = definition.read("quick"), Results(tmp_path)
    lost = {job.identity for job in plan(one, results).jobs.values() if job.setting == "lora"}
    for _ in one.search.steps:
        for job in plan(one, results, lost).missing(results):
            if job.identity not in lost:
                write_job(tmp_path, job, best=1e-2)
        results.refresh()
    assert plan(one, results, lost).choices == {("arithmetic", "dora"): 1e-2}


def test_a_run_whose_samples_are_damaged_is_missing(tmp_path, monkeypatch):
    one, results = definition.read("quick"), Results(tmp_path)
    job = next(iter(plan(one, results).jobs.values()))
    write_job(tmp_path, job)
    (held_out,) = tmp_path.rglob("heldout.csv")
    text = held_out.read_text()
    held_out.write_text(text[: len(text) // 2 - 3] + "?")
    results.refresh()
    assert results.of(job) is None
    before = sweep.Outcome(sweep.DONE_BEFORE, directory=str(held_out.parent))  # its result.json is whole
    monkeypatch.setattr(study, "_do", lambda *_: before)
    failed = study._work(one, results, tmp_path)
    assert failed[job.identity] == f"the results in {held_out.parent} cannot be read: delete it"
    held_out.write_text(text)
    results.refresh()
    assert results.of(job) is not None


@pytest.mark.parametrize(("noise", "seeds"), [(0.001, {2, 3}), (0.05, {3, 4, 5}), (0.5, {9})])
def test_the_pilot_says_how_many_seeds(tmp_path, noise, seeds):
    """Seeds of a setting vary by 0.002, so two differ by 0.0028; samples by `noise`, of 120."""
    one = definition.read(changed(tmp_path, size__most=9))
    jobs = write_study(tmp_path / "runs", one, {}, noise=noise, answers=False)
    counted = {job.cfg.seed for job in jobs if job.stage == FINAL and job.factor == 1.0}
    assert len(counted) in seeds and counted == set(range(len(counted)))


def test_failed_runs_lose_and_the_rest_goes_on(tmp_path):
    one = definition.read("quick")
    results = Results(tmp_path)
    first = plan(one, results)
    bad = [job for job in first.jobs.values() if job.cfg.lr == 1e-2 and job.setting == "lora"]
    for job in first.jobs.values():
        if job not in bad:
            write_job(tmp_path, job, best=1e-2)
    results.refresh()
    after = plan(one, results, {job.identity for job in bad})
    assert after.missing(results) and not after.choices
    [later] = [j for j in after.missing(results) if j.setting == "lora" and j.identity not in {b.identity for b in bad}]
    assert (later.cfg.lr, later.cfg.trainer.steps) == (1e-3, 2)


def test_the_report_says_what_was_made_up(tmp_path, terminal):
    """DoRA is made 0.03 nats better, and to forget 0.3 nats less."""
    folder = tmp_path / "runs"
    one = definition.read(changed(tmp_path, size__most=4, size__pilot=4))
    write_study(folder, one, {"dora": -0.03}, best=1e-2)
    (folder / "study.yaml").write_text(Path(one.where).read_text())
    code, text = terminal(report_command, str(folder), "--to", str(tmp_path / "copy"))
    assert code == 0, text
    assert (tmp_path / "copy" / "study.yaml").exists() and len(list((tmp_path / "copy").rglob("heldout.csv"))) > 10
    copied = {path.name for path in (tmp_path / "copy").glob("*_*/*")}
    assert copied == {"result.json", "heldout.csv"}, "hundreds of runs: what no study reads stays away"
    runs, copies = ({path.parent.name for path in place.rglob("result.json")} for place in (folder, tmp_path / "copy"))
    assert copies == runs
    code, text = terminal(report_command, str(tmp_path / "copy"))
    assert code == 0 and "note:" not in text, text
    page = (tmp_path / "copy" / "report" / "report.md").read_text()
    assert "## Does DoRA beat LoRA?\n" in page and "dora has a lower loss than lora on arithmetic by 0.0" in page
    assert "The study is not done" not in page and "commit 000000000000" in page
    assert "The best learning rate is at the edge of the grid: lora on arithmetic (0.01)" in page
    for name in ("dora-differences", "dora-learning-rates", "forgetting-forgetting", "forgetting-differences"):
        assert f"]({name}.png)" in page and (tmp_path / "copy" / "report" / f"{name}.png").stat().st_size > 5000
    results = Results(folder)
    results.refresh()
    [loss, right] = answers(one, plan(one, results), results, one.questions["dora"])
    assert loss.low < -0.03 < loss.high and loss.told_apart and loss.samples == 120 and loss.seeds == 4
    assert right.measure == "exact_match" and right.mean > 0
    code, text = terminal(report_command, str(tmp_path / "copy"))
    assert code == 0 and (tmp_path / "copy" / "report" / "report.md").read_text() == page, "from the copy the same"


def test_nothing_is_made_up_where_nothing_differs(tmp_path):
    one = definition.read("quick")
    write_study(tmp_path, one, {}, best=1e-2)
    results = Results(tmp_path)
    results.refresh()
    loss, *_ = answers(one, plan(one, results), results, one.questions["dora"])
    assert not loss.told_apart and loss.low < 0 < loss.high and loss.visible < 0.05
    assert report.study.sentence([loss]).startswith("**Loss**: lora and dora on arithmetic are not told apart: ")
    three = [dataclasses.replace(loss, task=task, low=-0.02, high=0.01) for task in ("arithmetic", "facts", "facts")]
    three[2].high = 0.03
    assert report.study.sentence(three) == (
        "**Loss**: 1 of 1 comparisons on arithmetic find no difference, and no 95 % interval goes beyond 0.0200 nats a "
        "token; 2 of 2 comparisons on facts find no difference, and no 95 % interval goes beyond 0.0300 nats a token."
    )


def test_what_is_forgotten_is_read_where_a_path_first_reaches_the_gain():
    path = [(0.2, 0.1), (0.4, 0.5), (0.3, 0.9)]
    assert [rise_at(path, gain) for gain in (0.1, 0.2, 0.3, 0.5)] == [
        pytest.approx(0.05),
        0.1,
        pytest.approx(0.3),
        None,
    ]
    assert common_gain([{0: path, 1: [(0.35, 0)]}, {0: [(0.5, 0)]}]) == 0.35 and common_gain([{}, {}]) == 0
    assert common_gain([{0: [(-0.1, 0.2)]}]) == 0, "it has learned nothing"


def test_a_study_of_real_runs_from_end_to_end(tmp_path, terminal):
    """Two settings at one learning rate, two seeds: search, pilot, report; a second start has nothing to do."""
    given = {"lr__low_rank": [1e-2], "search__steps": [1], "search__keep": [], "size__most": 2}
    questions = OmegaConf.to_container(OmegaConf.load(QUICK).questions)
    where = [
        f"study={changed(tmp_path, **given, questions={'dora': questions['dora']})}",
        f"output_dir={tmp_path / 'o'}",
    ]
    code, text = terminal(study, *where, "dry_run=true")
    assert code == 0 and "6 runs are missing" in text and not (tmp_path / "o").exists()
    code, text = terminal(study, *where)
    assert code == 0 and "0 runs are missing, 0.0 hours of one process, as 6 runs here took" in text, text
    runs = [path.parent for path in (tmp_path / "o").glob("*/result.json")]
    assert len(runs) == 6 and not any((run / "adapter").exists() for run in runs) and result(runs[0])["config"]
    code, text = terminal(study, *where)
    assert code == 0 and "held out" not in text, "nothing is done again"
    code, text = terminal(report_command, str(tmp_path / "o"))
    assert (
        code == 0
        and "lora and dora on arithmetic are not told apart" in (tmp_path / "o" / "report" / "report.md").read_text()
    )


def test_the_fair_study_is_in_order():
    """Its pairs differ in one thing (else it could not be read), and each setting is asked about."""
    fair = definition.read("fair")
    asked = set(itertools.chain.from_iterable(question.settings for question in fair.questions.values()))
    assert asked == set(fair.definition.settings)
