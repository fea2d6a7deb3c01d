"""Search for the settings with the lowest validation loss, with Optuna: learning rate, rank, block size, any keys.

    python -m experiments.search +method=qdora "lr=log(1e-4,1e-2)" rank=4,16,64 quant.blocksize=64,256 \\
        trials=20 output_dir=outputs/search

key=a,b,c             one of these
"key=log(a,b)"        between a and b on a logarithmic scale; whole numbers if both bounds are
"key=uniform(a,b)"    likewise on a linear scale
trials=20             how many, those of earlier starts included
everything else       as for experiments.run

Trials are measured on the validation part of the data (data.part=validation). The held-out samples stay unseen, so the
settings that are found can be compared on them.

A trial is a job of a sweep (experiments/runs/sweep.py), so `python -m experiments.report DIR` compares them. One whose
loss at an evaluation (trainer.eval_every) is above the median of earlier trials there is stopped, from the
sixth on. DIR/study.db keeps the study: started again with the same output_dir the search goes on, and a trial that was
cut off is done again. It has a checksum of each trial, so that damage shows. The sampler is Optuna's TPE: Bergstra et
al. 2011, "Algorithms for Hyper-Parameter Optimization".
"""

import contextlib
import json
import re
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser

from experiments.config import Config, resolve
from experiments.errors import UserError
from experiments.runs import sweep
from experiments.system.cli import command, composed, takes_keys
from experiments.system.files import RESULT, claim, writable_dir
from modules.files.checked import checksum_of

try:
    import optuna
except ImportError:
    optuna = None

STUDY = "study.db"
SEED = 0  # of the sampler; trials that are there already shift it, or a search that goes on would repeat itself
CHECKSUMS = "checksums"  # of the trials by number, an attribute of the study
REASON = "reason"  # why a trial failed; one that was cut off has none
PART = "data.part=validation"  # who chooses by the held-out samples cannot compare on them


def parse(arguments: list[str]) -> tuple[dict[str, Callable], list[str], int]:
    """Read the command line: the search space, the fixed overrides and the number of trials.

    Returns:
        By key a function that draws a value from an Optuna trial; the other overrides; trials.

    Raises:
        UserError: bounds that are not numbers, no key to search, no method, or trials= not a number.
    """
    space, fixed, trials = {}, [], 20
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key == "trials":
            if not value.isdigit() or not int(value):
                raise UserError(f"{argument}: choose 1 or more")
            trials = int(value)
        elif key == "data.part":
            if argument != PART:
                raise UserError(f"{argument}: a search measures on validation samples: leave it out")
        elif key in ("sweep", "launcher"):
            raise UserError(f"{argument}: a search makes its own jobs, one after the other")
        elif found := re.fullmatch(r"(log|uniform)\((.*)\)", value):
            space[key] = _range(argument, found[1] == "log", found[2].split(","))
        else:
            [override] = OverridesParser.create().parse_overrides([argument])
            if override.is_sweep_override():
                space[key] = _choice(key, list(override.sweep_string_iterator()))
            else:
                fixed.append(argument)
    if not space:
        raise UserError('nothing to search: give a key several values, rank=4,16, or a range, "lr=log(1e-4,1e-2)"')
    if not any(argument.startswith("+method=") for argument in arguments):
        raise UserError("no method: add one, +method=qdora, or several to choose from, +method=lora,qdora")
    return space, [*fixed, PART], trials


def _range(argument: str, log: bool, bounds: list[str]) -> Callable:
    key = argument.partition("=")[0]
    try:
        whole = all(bound.strip().isdigit() for bound in bounds)
        low, high = (int(bound) if whole else float(bound) for bound in bounds)
    except ValueError as error:
        raise UserError(f"{argument}: a range has two numbers, low and high") from error
    if not (0 if log else float("-inf")) < low < high:
        raise UserError(f"{argument}: a range goes from low to high{', above 0 on a logarithmic scale' * log}")
    if whole:
        return lambda trial: trial.suggest_int(key, low, high, log=log)
    return lambda trial: trial.suggest_float(key, low, high, log=log)


def _choice(key: str, values: list[str]) -> Callable:
    return lambda trial: trial.suggest_categorical(key, values)


def open_study(folder: Path, arguments: list[str]) -> "optuna.Study":
    """The study in `folder`, a new one if there is none; trials that were cut off wait to be done again.

    Raises:
        UserError: it is of other arguments, or damaged, or not a file of Optuna's.
    """
    path = folder / STUDY
    named = {"storage": f"sqlite:///{path}", "study_name": "search"}
    try:
        study = optuna.load_study(**named) if _is_whole(path) else optuna.create_study(**named)
        was = study.user_attrs.get("arguments", arguments)
        study.set_user_attr("arguments", was)
        wrong = _damaged(study)
    except Exception as error:  # Optuna and SQLAlchemy meet damaged files with any error
        told = (str(error).splitlines() or [""])[0]
        raise UserError(f"{path} cannot be read: {told}") from error
    if wrong:
        raise UserError(f"{path} is damaged: trial {wrong[0]} is not the one that was written")
    if PART not in was:
        raise UserError(f"{path} is of before searches measured on validation samples: choose another output_dir")
    if was != arguments:
        raise UserError(f"{path} is of other arguments, {' '.join(was)}: give the same, or another output_dir")
    study.sampler = optuna.samplers.TPESampler(seed=SEED + len(study.trials))
    for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
        study.enqueue_trial(trial.params)
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        _keep_checksum(study, trial.number)
    return study


def _is_whole(path: Path) -> bool:
    """Whether there is a database. Raises sqlite3.DatabaseError if it is damaged as far as SQLite can tell."""
    if not path.exists():
        return False
    with contextlib.closing(sqlite3.connect(path)) as database:
        found = [line for (line,) in database.execute("pragma integrity_check(1)")]
    if found != ["ok"] or not path.stat().st_size:
        raise sqlite3.DatabaseError("the file is empty: delete it to start anew" if found == ["ok"] else found[0])
    return True


def _keep_checksum(study: "optuna.Study", number: int) -> None:
    """Keep the checksum of a trial as it is now."""
    kept = study.user_attrs.get(CHECKSUMS, {})
    study.set_user_attr(CHECKSUMS, kept | {str(number): _checksum(study.trials[number])})


def _checksum(trial: "optuna.trial.FrozenTrial") -> str:
    """Of a trial's settings; of one that has ended also of its state, values and attributes."""
    more = [trial.state.name, trial.values, trial.intermediate_values, trial.user_attrs]
    return _checksum_as_drawn(trial, *(more if trial.state.is_finished() else []))


def _checksum_as_drawn(trial: "optuna.trial.FrozenTrial", *more: object) -> str:
    kinds = {key: repr(kind) for key, kind in trial.distributions.items()}
    return checksum_of(json.dumps([trial.number, trial.params, kinds, *more], sort_keys=True))


def _damaged(study: "optuna.Study") -> list[int]:
    """The numbers of the trials that are not as they were written; none in a study of before there were checksums."""
    kept = study.user_attrs.get(CHECKSUMS)
    if kept is None:
        return []
    begun = [trial for trial in study.trials if trial.state != optuna.trial.TrialState.WAITING]
    wrong = {int(number) for number in kept} - {trial.number for trial in begun}
    for trial in begun:
        allowed = [_checksum(trial)]
        if trial is begun[-1]:  # it may have been cut off before its checksum
            allowed += [None, _checksum_as_drawn(trial)]
        if kept.get(str(trial.number)) not in allowed:
            wrong.add(trial.number)
    return sorted(wrong)


def do_trial(study: "optuna.Study", space: dict[str, Callable], fixed: list[str], folder: Path) -> str:
    """Draw settings, run them, tell the study; returns how it ended, in words."""
    trial = study.ask()
    chosen = {key: draw(trial) for key, draw in space.items()}
    _keep_checksum(study, trial.number)
    print(f"\ntrial {trial.number}: {' '.join(_shown(chosen))}")
    try:
        cfg = resolve(composed(*fixed, *(f"{key}={value}" for key, value in chosen.items()), f"output_dir={folder}"))
    except UserError as error:
        outcome = sweep.Outcome(sweep.FAILED, str(error))
    else:

        def watch(record: dict) -> bool:
            trial.report(record["heldout_loss"], record["step"])
            return record["step"] < cfg.trainer.steps and trial.should_prune()

        outcome = sweep.job(cfg, ",".join(_shown(chosen)), watch)
    told = _tell(study, trial, outcome)
    _keep_checksum(study, trial.number)
    return told


def _tell(study: "optuna.Study", trial: "optuna.Trial", outcome: sweep.Outcome) -> str:
    """Tell the study how the trial ended; returns it in words."""
    if outcome.directory:
        loss = json.loads((Path(outcome.directory) / RESULT).read_text(encoding="utf-8"))["loss_after"]
        study.tell(trial, loss)
        return f"validation loss {loss:.4f}"
    if outcome.status == sweep.STOPPED:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        return f"stopped {outcome.reason}"
    trial.set_user_attr(REASON, outcome.reason or outcome.status)
    study.tell(trial, state=optuna.trial.TrialState.FAIL)
    return f"failed: {outcome.reason or outcome.status}"


def search(arguments: list[str]) -> None:
    """Search as `arguments` say.

    Raises:
        UserError: Optuna is missing, an argument is wrong, or no trial succeeded.
    """
    if optuna is None:
        raise UserError("a search needs Optuna: pip install optuna==5.0.0")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space, fixed, trials = parse(arguments)
    # a mistake in the fixed overrides shows here, before anything is written
    folder = Path(resolve(composed(*fixed, *_any_values(space))).output_dir)
    fixed = [argument for argument in fixed if not argument.startswith("output_dir=")]
    writable_dir(folder, "set output_dir to a folder")
    with claim(folder / ".locks" / STUDY) as claimed:
        if not claimed:
            raise UserError(f"another search is at work in {folder}: choose another output_dir")
        told = {argument for argument in arguments if not argument.startswith(("trials=", "output_dir="))}
        study = open_study(folder, sorted({*told, PART}))
        while sum(_counts(trial) for trial in study.trials) < trials:
            print(do_trial(study, space, fixed, folder))
    _summarize(study, folder)


def _any_values(space: dict[str, Callable]) -> list[str]:
    trial = optuna.create_study().ask()
    return [f"{key}={draw(trial)}" for key, draw in space.items()]


def _counts(trial: "optuna.trial.FrozenTrial") -> bool:
    return (
        trial.state in (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED) or REASON in trial.user_attrs
    )


def _summarize(study: "optuna.Study", folder: Path) -> None:
    """Print every trial, best first, and how to confirm the best."""
    states = optuna.trial.TrialState
    complete = sorted(study.get_trials(states=(states.COMPLETE,)), key=lambda trial: trial.value)
    pruned = study.get_trials(states=(states.PRUNED,))
    failed = [trial for trial in study.get_trials(states=(states.FAIL,)) if REASON in trial.user_attrs]
    print(
        f"\n{len(complete)} trials ended, {len(pruned)} were stopped, {len(failed)} failed; all are in {folder / STUDY}"
    )
    for trial in failed:
        print(f"failed: trial {trial.number}: {trial.user_attrs[REASON]}", file=sys.stderr)
    if not complete:
        raise UserError("no trial ended with a result")
    for trial in complete[:10]:
        print(f"{trial.value:.4f}  trial {trial.number}: {' '.join(_shown(trial.params))}")
    print(
        f"compare them: python -m experiments.report {folder}\nThe best was chosen by this loss on validation samples, "
        f"which flatters it; confirm it on the held-out ones: {' '.join(_shown(complete[0].params))} seed=1,2,3"
    )


def _shown(params: dict) -> list[str]:
    return [f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in params.items()]


@command
@takes_keys("config", Config, ("trials",))
def main() -> None:
    search(sys.argv[1:])


if __name__ == "__main__":
    main()
