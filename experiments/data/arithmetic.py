"""Arithmetic with one right answer: problems in numbers and in words, at four levels.

    1  sums and differences of numbers up to 20                  What is 7 + 5?
    2  the same up to 99, and products up to 12 · 12             Compute 84 - 37.
    3  a story with one step, division among them                Ana has 12 shells and finds 30 more. How many …?
    4  two steps, in numbers and as a story                      What is (6 + 9) * 4?

They are generated, always the same ones. Each knows its calculation in a form that leaves out wording and the order of
summands and factors: "5+7" is that of 7 + 5 and of a story about 7 and 5. Whoever splits by it, as samples.py
does, has no calculation in both parts.
"""

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass

TASK = "Solve the problem. Answer with the number alone."
LEVELS = (1, 2, 3, 4)
PROBLEMS = 1000  # a level

NAMES = ("Ana", "Ben", "Chidi", "Dana", "Emil", "Fatma", "Goran", "Hana", "Ivan", "Jun")
THINGS = ("apples", "books", "cards", "coins", "eggs", "marbles", "pens", "shells", "stamps", "stones")
PHRASES = ("What is {}?", "Compute {}.", "{} = ?")


@dataclass(frozen=True)
class Problem:
    """A problem.

    Attributes:
        level: 1 to 4.
        question: as the model sees it.
        calculation: valid Python, in one form for all problems that calculate the same.
        answer: a whole number, 0 or more.
    """

    level: int
    question: str
    calculation: str
    answer: int


Draw = Callable[[random.Random], tuple[str, str, int]]  # → question, calculation, answer


def _commuting(operator: str, a: int, b: int) -> str:
    return f"{min(a, b)}{operator}{max(a, b)}"


def _simple(rng: random.Random, largest: int, smallest: int = 0, factors: bool = False) -> tuple[str, str, int]:
    """a + b, a - b or, with `factors`, a * b as a question, with its calculation and answer."""
    operator = rng.choice("+-*" if factors else "+-")
    if operator == "*":
        a, b = rng.randint(2, 12), rng.randint(2, 12)
        shown, calculation, answer = f"{a} * {b}", _commuting("*", a, b), a * b
    else:
        a, b = rng.randint(smallest, largest), rng.randint(smallest, largest)
        if operator == "+":
            shown, calculation, answer = f"{a} + {b}", _commuting("+", a, b), a + b
        else:
            a, b = max(a, b), min(a, b)
            shown, calculation, answer = f"{a} - {b}", f"{a}-{b}", a - b
    return rng.choice(PHRASES).format(shown), calculation, answer


def _story(rng: random.Random) -> tuple[str, str, int]:
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    kind = rng.choice(("more", "less", "groups", "share"))
    if kind == "more":
        a, b = rng.randint(2, 60), rng.randint(2, 39)
        text = f"{name} has {a} {things} and finds {b} more. How many {things} does {name} have now?"
        return text, _commuting("+", a, b), a + b
    if kind == "less":
        b = rng.randint(2, 60)
        a = b + rng.randint(1, 39)
        text = f"{name} had {a} {things} and gave {b} of them away. How many {things} are left?"
        return text, f"{a}-{b}", a - b
    a, b = rng.randint(2, 12), rng.randint(2, 12)
    if kind == "groups":
        text = f"{name} has {a} boxes with {b} {things} in each. How many {things} are that in all?"
        return text, _commuting("*", a, b), a * b
    text = f"{name} shares {a * b} {things} equally among {b} friends. How many {things} does each friend get?"
    return text, f"{a * b}//{b}", a


def _two_steps(rng: random.Random) -> tuple[str, str, int]:
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    a, b, c = rng.randint(2, 12), rng.randint(2, 12), rng.randint(2, 9)
    if rng.random() < 0.5:  # (a + b) * c
        calculation, answer = f"({_commuting('+', a, b)})*{c}", (a + b) * c
        story = f"{name} puts {a} red and {b} blue {things} into each of {c} bags. How many {things} is that in all?"
        shown = f"({a} + {b}) * {c}"
    else:  # a * b - c, never below 0
        c = rng.randint(1, a * b - 1)
        calculation, answer = f"{_commuting('*', a, b)}-{c}", a * b - c
        story = (
            f"{name} buys {a} boxes with {b} {things} in each and gives {c} {things} away. "
            f"How many {things} does {name} keep?"
        )
        shown = f"{a} * {b} - {c}"
    return (story if rng.random() < 0.5 else rng.choice(PHRASES).format(shown)), calculation, answer


_DRAW: dict[int, Draw] = {
    1: lambda rng: _simple(rng, largest=20),
    2: lambda rng: _simple(rng, largest=99, smallest=10, factors=True),
    3: _story,
    4: _two_steps,
}


@functools.cache
def problems(level: int) -> tuple[Problem, ...]:
    """The problems of `level`, no two with the same question."""
    rng = random.Random(f"arithmetic, level {level}")
    found: dict[str, Problem] = {}
    while len(found) < PROBLEMS:
        question, calculation, answer = _DRAW[level](rng)
        found.setdefault(question, Problem(level, question, calculation, answer))
    return tuple(found.values())
