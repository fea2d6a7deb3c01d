"""Do the runs of a study: a search, a pilot, and as many final runs as its differences need.

    python -m experiments.study study=fair dry_run=true       how many runs, and how many hours
    python -m experiments.study study=fair                    only what is missing, and so again after a stop
    python -m experiments.report outputs/study                the answers

study=fair                 a file of conf/study/, or another one: FILE.yaml
output_dir=outputs/study   of all runs
dry_run=true               say what is done, what is missing and how many hours that takes; do nothing

Runs are jobs of a sweep (experiments/runs/sweep.py). Several processes may work on one folder: each does runs that no
other one does. What is compared is in conf/study/ (experiments/studies/definition.py).
"""

import copy
import shutil
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from experiments.errors import UserError
from experiments.runs import sweep
from experiments.runs.model_files import ADAPTER, BASE, MODEL
from experiments.studies import definition
from experiments.studies.definition import Study
from experiments.studies.plan import FINAL, SEARCH, Job, Plan, Results, pace, plan
from experiments.system.cli import command, read_options
from experiments.system.files import STUDY, writable_dir, write_atomically

WAIT = 5.0  # seconds between looks at what another process does


@dataclass
class StudyOptions:
    study: str = "fair"  # a file of conf/study/, or another one: FILE.yaml
    output_dir: str = "outputs/study"  # of all runs
    dry_run: bool = False  # say which runs there are and how long they take; do none


def study_runs(options: StudyOptions) -> None:
    """Do what is missing.

    Raises:
        UserError: the definition is wrong, the folder is another study's, or runs have failed.
    """
    study, folder = definition.read(options.study), Path(options.output_dir)
    results = Results(folder)
    results.refresh()
    if options.dry_run:
        print(state(study, plan(study, results), results))
        return
    _claim_folder(study, folder)
    print(state(study, plan(study, results), results))
    failed = _work(study, results, folder)
    results.refresh()
    made = plan(study, results, failed)
    print(f"\n{state(study, made, results)}\nread the answers: python -m experiments.report {folder}")
    lost = [f"{made.jobs[identity].name}: {reason}" for identity, reason in failed.items() if identity in made.jobs]
    for line in lost:
        print(f"failed: {line}", file=sys.stderr)
    if any(made.jobs[identity].stage == FINAL for identity in failed if identity in made.jobs):
        raise UserError("final runs have failed: start the study again, and it does only what is missing")


def _claim_folder(study: Study, folder: Path) -> None:
    """Keep the definition beside the runs, whose report reads it."""
    writable_dir(folder, "set output_dir to a folder")
    text, kept = Path(study.where).read_text(encoding="utf-8"), folder / STUDY
    if kept.exists() and kept.read_text(encoding="utf-8") != text:
        print(f"note: {kept} was of another version of {study.where}: runs that both have are kept", file=sys.stderr)
    write_atomically(kept, text)


def _work(study: Study, results: Results, folder: Path) -> dict[str, str]:
    """Do runs until none is missing but those that failed; returns these with the reasons."""
    failed: dict[str, str] = {}
    while True:
        results.refresh()
        left = [job for job in plan(study, results, failed).missing(results) if job.identity not in failed]
        if not left:
            return failed
        for job in left:
            outcome = _do(job, folder)
            if outcome.status != sweep.ELSEWHERE:
                results.refresh()
                if results.of(job) is None:
                    unread = f"the results in {outcome.directory} cannot be read: delete it"
                    failed[job.identity] = outcome.reason or unread
                    print(f"failed: {job.name}: {failed[job.identity]}", file=sys.stderr)
                break  # what comes next may depend on it
        else:
            time.sleep(WAIT)  # others do them all, and more may follow from their results


def _do(job: Job, folder: Path) -> sweep.Outcome:
    cfg = copy.deepcopy(job.cfg)
    cfg.output_dir = str(folder)
    try:
        outcome = sweep.job(cfg, job.name)
    except KeyboardInterrupt as stop:
        stop.args = (f"go on with the same command and output_dir={folder}",)
        raise
    if outcome.status == sweep.DONE:
        for name in (ADAPTER, MODEL, BASE):  # hundreds of runs: their numbers are kept
            shutil.rmtree(Path(outcome.directory) / name, ignore_errors=True)
    return outcome


def state(study: Study, made: Plan, results: Results) -> str:
    """A table of what is done and what is missing, and the hours that it takes."""
    measured, behind = pace(study, made, results)
    done, missing, later, seconds = (defaultdict(int) for _ in range(4))
    for job in made.jobs.values():
        if results.of(job) is not None:
            done[job.question, job.stage] += 1
        else:
            missing[job.question, job.stage] += 1
            seconds[job.question, job.stage] += measured.seconds(job.stage, job.task, job.cfg.trainer.steps)
    for (stage, task, _, steps, _), (name, count) in made.later.items():
        later[name, stage] += count
        seconds[name, stage] += count * measured.seconds(stage, task, steps)
    width = max(12, *map(len, study.questions))
    lines = [f"{'question':<{width}}  stage     done  missing  after these   hours"]
    for name in study.questions:
        for stage in (SEARCH, FINAL):
            counts = done[name, stage], missing[name, stage], later[name, stage]
            hours = seconds[name, stage] / 3600
            lines.append(f"{name:<{width}}  {stage:<6}{counts[0]:>8}{counts[1]:>9}{counts[2]:>13}{hours:>8.1f}")
    runs, hours = sum(missing.values()) + sum(later.values()), sum(seconds.values()) / 3600
    how = f"as {behind} runs here took" if behind else "as the definition says"
    settings = [(task, setting) for setting in study.definition.settings for task in study.tasks_of(setting)]
    steps = sum(study.budget(setting) for _, setting in settings)
    lines += [
        f"{runs} runs are missing, {hours:.1f} hours of one process, {how}; two at a time take about half as long.",
        f"The search has {steps:,} steps in all: {len(settings)} learning rates to find, each at the price of "
        f"{steps / max(1, len(settings)) / study.search.steps[-1]:.1f} final runs.",
        f"Final runs are counted with {study.size.pilot} seeds; the pilot may ask for up to {study.size.most}.",
    ]
    return "\n".join(lines)


@command
def main() -> None:
    options, _ = read_options(StudyOptions, __file__, changes=())
    study_runs(options)


if __name__ == "__main__":
    main()
