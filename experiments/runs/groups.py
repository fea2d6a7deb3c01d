"""Read the results in a folder, and sort them into groups that can be compared.

A result.json holds the configuration of its run, so the file alone is enough; the training curves come from the
metrics.jsonl, the layers' ranks from the spectrum.csv and the load of experts from the experts.csv beside it, where
there are such.
"""

import csv
import json
import math
import shutil
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.config import RENAMED_METHODS
from experiments.errors import UserError
from experiments.system.files import (
    EXPERTS,
    HELDOUT,
    METRICS,
    NAME_LENGTH,
    RESULT,
    SPECTRUM,
    STUDY,
    directory_atomically,
)
from modules.files.checked import verify_file

# Columns of the table, each with its unit where it has one. Everything else that a result.json measures follows them.
MEASURES = {
    "loss_before": "nats a token",
    "loss_after": "nats a token",
    "perplexity_after": "",
    "token_accuracy_after": "share",
    "train_seconds": "s",
    "total_seconds": "s",
    "tokens_per_s": "tokens/s",
    "peak_memory_bytes": "bytes",
    "trainable_params": "",
    "adapter_bytes": "bytes",
    "base_bytes": "bytes",
    "bits_per_weight": "bits",
}
NO_MEASURE = ("rank", "seed", "results_version")  # numbers of a result.json that its configuration has too
FILES = (RESULT, METRICS, SPECTRUM, EXPERTS)  # that a report reads
MACHINE = ("device", "threads")  # of a run, without which times cannot be compared


@dataclass
class Run:
    """One result.json.

    Attributes:
        name: its directory, relative to the folder of the report.
        identity: its config_hash.
        version: of the results' meaning.
        config: every value that it computed with, by full key.
        measures: every number that it measured, by name; those of a nested object as `object.name`.
        curve: the records of metrics.jsonl; none where that is missing.
        effective_ranks: of each adapted linear's update, by its name: spectrum.csv.
        expert_loads: of the busiest expert of each layer of experts, over its even share: experts.csv.
    """

    name: str
    identity: str
    version: int
    seed: int
    config: dict[str, Any]
    measures: dict[str, float]
    about: dict[str, str]  # commit, versions of packages, processor or card, threads
    crowded: bool = False  # other processes needed the cores too, so its times are too long
    shared_base: bool | None = None  # whether a sweep had packed its base before; None: it has a dense one
    curve: list[dict] = field(default_factory=list)
    effective_ranks: dict[str, float] = field(default_factory=dict)
    expert_loads: dict[str, float] = field(default_factory=dict)

    @property
    def method(self) -> str:
        return self.config["method.name"]


@dataclass
class Group:
    """Runs that can be compared: of one version of the results, one model and one data set.

    Attributes:
        varied: the keys in which they differ, besides the seed.
    """

    title: str
    runs: list[Run]
    varied: list[str]

    def settings(self) -> dict[str, list[Run]]:
        """The runs that differ in the seed only, by their label; numbers in their order."""
        settings = defaultdict(list)
        for run in sorted(self.runs, key=lambda run: [_order(run.config.get(key)) for key in self.varied]):
            settings[self.label(run)].append(run)
        return {label: sorted(runs, key=lambda run: run.seed) for label, runs in settings.items()}

    def label(self, run: Run, without: tuple[str, ...] = ()) -> str:
        """A run's name within the group: its method, then each varied key that it has, as on the command line."""
        keys = [key for key in self.varied if key in run.config and key not in without and key != "method.name"]
        method = [run.method] if "method.name" not in without else []
        return " ".join([*method, *(f"{key.removeprefix('trainer.')}={shown(run.config[key])}" for key in keys)])

    def name(self, run: Run) -> str:
        """A run among those of the group, such as "lora rank=8 seed=0"."""
        return f"{self.label(run)} seed={run.seed}"


def _order(value: Any) -> tuple[float, str]:
    return (value, "") if _is_number(value) else (-math.inf, shown(value))


def shown(value: Any) -> str:
    """A value of the configuration as on the command line."""
    if isinstance(value, list):
        return f"[{','.join(map(shown, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def read_runs(folder: Path) -> tuple[list[Run], list[str]]:
    """Every run under `folder`, each once, and a line for each file that was left out, which says why. The report of a
    study has no training curves, so theirs may be missing."""
    curves = not (folder / STUDY).exists()
    runs: dict[tuple[int, str], Run] = {}
    problems = []
    for path in sorted(folder.rglob(RESULT)):
        try:
            run = read_run(path, folder)
        except (OSError, ValueError) as error:
            problems.append(f"{path.relative_to(folder)}: {error}")
            continue
        first = runs.setdefault((run.version, run.identity), run)
        if first is not run:
            problems.append(f"{run.name}: the same run as {first.name}, which counts")
        elif curves and not run.curve:
            problems.append(f"{run.name}: no {METRICS} that can be read, so it is missing among the training curves")
    return list(runs.values()), problems


def copy_runs(groups: list[Group], folder: Path, copy: Path, of_study: bool = False) -> None:
    """Copy the files that a report reads from `folder` to `copy`, in place of an earlier copy. There a run's
    directory, and `run.name`, are named by its varied keys and its hash.

    Args:
        of_study: the report will be that of a study, which reads results and held-out samples alone. Its runs keep the
            names of their directories, which say more, and stay as they are when more keys vary.

    Raises:
        UserError: `copy` has a file in it that does not belong to a copy.
    """
    for path in [copy, *copy.rglob("*")] if copy.exists() else []:
        if not (path.is_dir() or path.name in (*FILES, HELDOUT, STUDY) or path.parent == copy / "report"):
            raise UserError(f"{path} does not belong to a copy of results: choose another folder than {copy}")
    with directory_atomically(copy) as directory:
        for among in groups:
            for run in among.runs:
                original = folder / run.name
                if of_study:
                    run.name = original.name
                else:
                    run.name = f"{among.name(run).replace(' ', ',').replace('/', '-')[:NAME_LENGTH]}_{run.identity}"
                (directory / run.name).mkdir()
                for name in (RESULT, HELDOUT) if of_study else (RESULT, HELDOUT, METRICS):
                    if (original / name).exists():
                        shutil.copyfile(original / name, directory / run.name / name)
                if not of_study:
                    _write_layers(run, directory / run.name)


def _write_layers(run: Run, directory: Path) -> None:
    # the singular values and the shares of all experts, which no report reads, are most of these files
    for name, column, values in (
        (SPECTRUM, "effective_rank", run.effective_ranks),
        (EXPERTS, "max_over_mean", run.expert_loads),
    ):
        if values:
            lines = [f"layer,{column}", *(f"{layer},{value:.4g}" for layer, value in values.items())]
            (directory / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_run(path: Path, folder: Path) -> Run:
    """Read a result.json. Raises ValueError if it is not the whole result of a run."""
    for name in FILES:
        verify_file(path.with_name(name))
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(result, dict):
        raise ValueError("not a JSON object")
    if "config" not in result or "results_version" not in result:
        raise ValueError("it does not say of which configuration it is: written by an older version, run it again")
    needed = {"config": dict, "config_hash": str, "results_version": int, "seed": int}
    wrong = [key for key, kind in needed.items() if not isinstance(result.get(key), kind)]
    wrong += [key for key in MEASURES if not _is_number(result.get(key))]
    wrong += [f"config: {key}" for key in ("method.name", "model.name", "data.name") if key not in result["config"]]
    if wrong:
        raise ValueError(f"missing or not a finite number: {', '.join(wrong)}")
    config, versions = result["config"], result.get("versions")
    machine = result["machine"] if isinstance(result.get("machine"), dict) else {}
    method = RENAMED_METHODS.get(config["method.name"], config["method.name"])
    measures = {name: value for name, value in _numbers(result) if name not in NO_MEASURE}
    if "second_loss_after" in measures:
        measures["second_loss_rise"] = measures["second_loss_after"] - measures["second_loss_before"]
    return Run(
        name=str(path.parent.relative_to(folder)),
        identity=result["config_hash"],
        version=result["results_version"],
        seed=result["seed"],
        config=config | {"method.name": method},
        measures=measures,
        about={
            "commit": result.get("commit") or "unknown",
            **(versions if isinstance(versions, dict) else {}),
            **{key: str(machine[key]) for key in MACHINE if key in machine},
        },
        crowded=machine.get("crowded") is True,
        shared_base=result.get("shared_base"),
        curve=_curve(path.parent / METRICS),
        effective_ranks=_by_layer(path.parent / SPECTRUM, "effective_rank"),
        expert_loads=_by_layer(path.parent / EXPERTS, "max_over_mean"),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _numbers(values: dict, prefix: str = ""):
    for key, value in values.items():
        if isinstance(value, dict) and prefix + key not in ("config", "versions"):
            yield from _numbers(value, f"{prefix}{key}.")
        elif _is_number(value):
            yield prefix + key, value


def _curve(path: Path) -> list[dict]:
    """The records of metrics.jsonl; a run that was killed may have left a half line, which does not count."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and _is_number(record.get("step")):
            records.append(record)
    return records


def _by_layer(path: Path, column: str) -> dict[str, float]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return {row["layer"]: float(row[column]) for row in csv.DictReader(file)}
    except (OSError, ValueError, KeyError, TypeError):  # not there, or not whole
        return {}


def group(runs: list[Run]) -> list[Group]:
    """The runs, kept apart where they cannot be compared."""
    apart = defaultdict(list)
    for run in runs:
        what = {key: value for key, value in run.config.items() if key.startswith(("model.", "data."))}
        apart[run.version, json.dumps(what, sort_keys=True)].append(run)
    groups = [Group(_title(members[0]), members, _varied(members)) for _, members in sorted(apart.items())]
    for one in groups:
        namesakes = [other.runs[0].config for other in groups if other.runs[0].version == one.runs[0].version]
        config = one.runs[0].config
        namesakes = [c for c in namesakes if all(c[k] == config[k] for k in ("model.name", "data.name"))]
        different = [
            k for k in config if k.startswith(("model.", "data.")) and any(c.get(k) != config[k] for c in namesakes)
        ]
        if different:
            one.title += f" ({', '.join(f'{key}={shown(config[key])}' for key in different)})"
    return groups


def _title(run: Run) -> str:
    return f"{run.config['model.name']} on {run.config['data.name']}, results of version {run.version}"


def _varied(runs: list[Run]) -> list[str]:
    """The keys in which runs differ and which a user chose; not those that follow from another one."""
    values = defaultdict(set)
    for run in runs:
        for key, value in run.config.items():
            values[key].add(json.dumps(value, sort_keys=True))
    follows = {"seed", "method.adapter", "method.lr", "trainer.name"}
    configs = [run.config for run in runs]
    if all(c.get("lora_alpha") == 2 * c["rank"] for c in configs if "rank" in c):
        follows.add("lora_alpha")
    if all(c.get("lr") == c.get("method.lr") for c in configs):
        follows.add("lr")
    quant = {(c["method.name"], c.get("quant.name")) for c in configs}
    if len({method for method, _ in quant}) == len(quant):
        follows.add("quant.name")
    order = ["method.name", "rank", *sorted(values)]
    return [key for key in dict.fromkeys(order) if len(values[key]) > 1 and key not in follows]


def why_times_differ(runs: list[Run]) -> str | None:
    """Why the times of the runs cannot be compared; None if nothing is known against it."""
    for key in MACHINE:
        if len({run.about.get(key) for run in runs}) > 1:
            return f"the runs were made with different {key}"
    if crowded := sum(run.crowded for run in runs):
        return f"other processes needed the cores during {crowded} of {len(runs)} runs"
    return None


def disagreements(runs: list[Run]) -> list[str]:
    """A line for each difference in how the compared runs were made."""
    lines = []
    for key in sorted({key for run in runs for key in run.about}):
        values = sorted({run.about.get(key, "unknown") for run in runs})
        if len(values) > 1:
            lines.append(f"made with different {key}: {', '.join(value[:40] for value in values)}")
    if {True, False} <= {run.shared_base for run in runs}:
        lines.append(
            "that packed their own base, which may be the peak of their memory, are beside others that began with one "
            "that their sweep had packed"
        )
    return lines
