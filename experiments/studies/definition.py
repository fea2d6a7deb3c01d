"""A study as data: the questions in a file of conf/study/, the settings that they compare, and how much is spent.

    tasks       each a name and overrides as on the command line
    settings    likewise, with the grid of learning rates that is searched for each on each task
    questions   pairs of settings that differ in one thing, on some tasks

Stages: on each task each setting's learning rate is searched by successive halving (Jamieson and Talwalkar 2016, "Non-
stochastic Best Arm Identification and Hyperparameter Optimization") on the validation part. Of the last round's rates
that are level with the best, a setting gets its reference's or else the lowest, so that two settings do not differ in
their rates by chance. A pilot of some seeds measures variances on the held-out part; these say how many seeds the final
runs need. Pilot runs are the first final ones.
"""

import copy
import functools
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from experiments.config import Config, resolve
from experiments.errors import UserError
from experiments.runs.identity import config_hash
from experiments.studies.differences import differences, told
from experiments.system.cli import CONF, composed

FOLDER = Path(CONF) / "study"


@dataclass
class Search:
    """Attributes:
    steps: of each round; those of the last one are a final run's.
    keep: so many learning rates go on after each round but the last.
    samples: of the validation part, at most. All learning rates are judged by the same ones.
    seed: of all of them; no final run has it.
    """

    steps: list[int] = MISSING
    keep: list[int] = MISSING
    samples: int = 100
    seed: int = 1000


@dataclass
class Size:
    """How many seeds.

    Attributes:
        pilot: of the pilot.
        most: of a final comparison at most.
        loss, exact_match: the differences that it shall see.
    """

    pilot: int = 3
    most: int = 8
    loss: float = 0.01
    exact_match: float = 0.02


@dataclass
class Pace:
    """Seconds, until runs of the study itself tell: of a training step; of all else of a search run and a final one."""

    step: float = MISSING
    search: float = MISSING
    final: float = MISSING


@dataclass
class Setting:
    set: list[str] = MISSING  # overrides
    lr: str = MISSING  # the name of a grid


@dataclass
class Question:
    """Attributes:
    asks: the question.
    tasks: on which.
    compare: pairs of settings: [reference, other].
    equal_parameters: the sizes of different adapters are chosen for equal parameters.
    forgetting: compare what is forgotten at equal gain, along learning rates that are so many times the best.
    """

    asks: str = MISSING
    tasks: list[str] = MISSING
    compare: list[list[str]] = MISSING
    equal_parameters: bool = False
    forgetting: list[float] | None = None

    @property
    def settings(self) -> list[str]:
        return list(dict.fromkeys(itertools.chain.from_iterable(self.compare)))


@dataclass
class Definition:
    about: str = MISSING
    common: list[str] = MISSING  # overrides of every run
    lr: dict[str, list[float]] = MISSING  # grids by name
    search: Search = field(default_factory=Search)
    size: Size = field(default_factory=Size)
    pace: Pace = field(default_factory=Pace)
    tasks: dict[str, list[str]] = MISSING
    settings: dict[str, Setting] = MISSING
    questions: dict[str, Question] = MISSING


class Study:
    """A definition with the configurations that it means.

    Raises:
        UserError: it names something that is not there, or compares settings that differ in more than one thing.
    """

    def __init__(self, definition: Definition, where: str):
        self.definition, self.where = definition, where
        self.search, self.size, self.questions = definition.search, definition.size, definition.questions
        self._check_names()
        self._check_search()
        for name, question in self.questions.items():
            for a, b in question.compare:
                self._check_pair(f"{where}: {name}", question, a, b)

    def tasks_of(self, setting: str) -> list[str]:
        questions = [question for question in self.questions.values() if setting in question.settings]
        return [task for task in self.definition.tasks if any(task in question.tasks for question in questions)]

    def reference_of(self, task: str, setting: str) -> str | None:
        """The setting that this one is held against in the first comparison of it on the task; None: in that one it is
        the reference itself."""
        pairs = (pair for q in self.questions.values() if task in q.tasks for pair in q.compare if setting in pair)
        reference, _ = next(pairs)
        return None if reference == setting else reference

    def grid(self, setting: str) -> list[float]:
        return sorted(self.definition.lr[self.definition.settings[setting].lr])

    @functools.cache  # noqa: B019 a study lives as long as its process
    def _base(self, task: str, setting: str) -> Config:
        definition = self.definition
        given = [*definition.common, *definition.tasks[task], *definition.settings[setting].set]
        try:
            return resolve(composed(*given, "output_dir=unused"))
        except (UserError, OmegaConfBaseException) as error:
            raise UserError(f"{self.where}: {setting} on {task}: {error}") from error

    @functools.cache  # noqa: B019
    def run(self, task: str, setting: str, lr: float, seed: int, steps: int, search: bool) -> tuple[Config, str]:
        """The configuration of a run, not to be changed, and its hash. A search measures the validation loss alone."""
        cfg = copy.deepcopy(self._base(task, setting))
        cfg.lr, cfg.seed, cfg.trainer.steps = lr, seed, steps
        if search:
            cfg.data.part, cfg.data.answer_tokens, cfg.second = "validation", 0, Config().second
            cfg.data.max_heldout = min(cfg.data.max_heldout or self.search.samples, self.search.samples)
        return cfg, config_hash(cfg)

    def budget(self, setting: str) -> int:
        """The training steps of the search for a setting on one task."""
        counts = [len(self.grid(setting)), *self.search.keep]
        return sum(count * steps for count, steps in zip(counts, self.search.steps))

    def _check_names(self) -> None:
        there = self.definition
        wrong = [
            *(("setting", one) for q in self.questions.values() for one in q.settings if one not in there.settings),
            *(("task", one) for q in self.questions.values() for one in q.tasks if one not in there.tasks),
            *(("grid of learning rates", s.lr) for s in there.settings.values() if s.lr not in there.lr),
        ]  # fmt: skip
        for what, name in wrong:
            raise UserError(f"{self.where}: no {what} is called {name}")
        for name, question in self.questions.items():
            if wrong := [pair for pair in question.compare if len(pair) != 2]:
                raise UserError(f"{self.where}: {name}: compare {wrong[0]}: give pairs, [reference, other]")

    def _check_search(self) -> None:
        search, grids = self.search, self.definition.lr
        if len(search.keep) != len(search.steps) - 1 or search.steps != sorted(search.steps):
            raise UserError(f"{self.where}: search: steps rise from round to round, and keep has one number fewer")
        for name, grid in grids.items():
            counts = [len(grid), *search.keep]
            if counts != sorted(counts, reverse=True) or min(counts) < 1 or min(grid, default=0) <= 0:
                raise UserError(
                    f"{self.where}: lr: {name}: {len(grid)} learning rates, all above 0, of which {search.keep} stay"
                )
        if self.size.pilot < 2 or self.size.most < self.size.pilot or search.seed < self.size.most:
            raise UserError(
                f"{self.where}: size: the pilot has two seeds or more, most is no fewer, search.seed is none of them"
            )

    def _check_pair(self, where: str, question: Question, a: str, b: str) -> None:
        one, other = (self._base(question.tasks[0], setting) for setting in (a, b))
        found = differences(one, other, question.equal_parameters)
        if len(found) != 1:
            how = "" if not found else ": compare them one at a time, by settings in between"
            raise UserError(f"{where}: {a} and {b} differ in {told(found)}, not in one thing{how}")


def read(name: str) -> Study:
    """The study of a file of conf/study/, by its name, or of any file.

    Raises:
        UserError: no such file, or not the definition of a study.
    """
    path = Path(name) if name.endswith(".yaml") else FOLDER / f"{name}.yaml"
    try:
        return Study(_parsed(path.read_text(encoding="utf-8")), str(path))
    except FileNotFoundError as error:
        there = ", ".join(sorted(one.stem for one in FOLDER.glob("*.yaml")))
        raise UserError(f"study={name}: no such file {path}; there are {there}") from error
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: {(str(error).splitlines() or ['?'])[0]}") from error


def _parsed(text: str) -> Definition:
    values: Any = OmegaConf.merge(OmegaConf.structured(Definition), OmegaConf.create(text))
    return OmegaConf.to_object(values)
