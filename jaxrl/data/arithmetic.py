"""Arithmetic word problems: made from a seed in graded difficulty, or read from GSM8K's files.

    Ann has 7 pens. She buys 5 more. Their number grows 2 times. How many pens …?
    7 + 5 = 12. 12 * 2 = 24.

A problem is a chain of operations told as a story. Its level is the number of operations, and no
chain of the training problems is among the held-out ones, under whatever names and things.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl.data.files import DataError, Row, read_rows
from jaxrl.rewards import RewardFunction
from jaxrl.rewards.verifier import last_number, numeric_verifier
from jaxrl.tokenizers import ChatTemplate

PROBLEM = ChatTemplate(name="problem", prefix="[MATH TASK] Problem:\n", suffix="\nSolution:")
"""The prompt form of TBA and of VinePPO for GSM8K (arXiv:2410.01679)."""

LARGEST = 30
"""No number of a generated problem, intermediate results included, is above this."""

_MOST_MISSES = 3000
"""Draws in a row that bring nothing new before a level counts as exhausted."""

Operation = tuple[str, int]
Chain = tuple[int, tuple[Operation, ...]]
"""A starting number and what is done to it: (7, (("+", 5), ("*", 2)))."""

_PEOPLE = (
    ("Ann", "She"), ("Ben", "He"), ("Cora", "She"), ("Dan", "He"), ("Eva", "She"), ("Finn", "He"),
    ("Gina", "She"), ("Hugo", "He"), ("Iris", "She"), ("Jack", "He"),
)  # fmt: skip
_THINGS = (
    "apples", "pens", "books", "coins", "cards", "shells", "stamps", "stones", "tickets", "cups",
)  # fmt: skip
_EVENTS: Mapping[str, tuple[str, ...]] = {
    "+": ("{who} buys {n} more.", "{who} finds {n} more.", "A friend brings {n} more."),
    "-": ("{who} loses {n}.", "{who} sells {n}.", "{who} gives {n} away."),
    "*": ("Their number grows {n} times.",),
    "/": ("{who} keeps only one in every {n}.",),
}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A question with a worked answer.

    Attributes:
      question: as a reader sees it.
      solution: the steps; its last number is the answer.
      answer: the number alone.
      level: how hard it is: operations of a generated problem, 0 where that is not known.
    """

    question: str
    solution: str
    answer: str
    level: int = 0


@dataclass(frozen=True, kw_only=True)
class Problems:
    """Problems to train and to evaluate on; no question stands in both.

    Attributes:
      name: what a report calls them.
      train: for supervised fine-tuning, by their solutions, and for RL, by the verifier.
      heldout: for evaluation only.
    """

    name: str
    train: tuple[Problem, ...]
    heldout: tuple[Problem, ...]

    def __post_init__(self) -> None:
        for part in ("train", "heldout"):
            if not getattr(self, part):
                raise ValueError(f"problems are needed to train and to evaluate on: no {part} ones")
        shared = {p.question for p in self.train} & {p.question for p in self.heldout}
        if shared:
            raise ValueError(
                f"train and held-out questions must differ: {len(shared)} stand in both, first "
                f"{min(shared)[:80]!r}; leave them out of one"
            )

    def verifier(self) -> RewardFunction:
        """1 for a right answer to one of these questions, 0 for a wrong one."""
        return numeric_verifier({p.question: p.answer for p in (*self.train, *self.heldout)})


def make_problems(
    seed: int, *, train: int = 4096, heldout: int = 256, levels: Sequence[int] = (1, 2, 3)
) -> Problems:
    """Generated problems; a function of the arguments.

    Args:
      seed: of chains, stories and the split.
      train: how many to train on.
      heldout: how many to evaluate on.
      levels: numbers of operations; each is as frequent as the others.

    Raises:
      ValueError: a level below 1, none at all, or fewer distinct problems than asked for.
    """
    if not levels or min(levels) < 1:
        raise ValueError(f"levels are numbers of operations, 1 or more: {levels=}")
    rng = np.random.default_rng([seed, 1])
    kept = _distinct(rng, levels, heldout, key=lambda chain, problem: chain, without=frozenset())
    trained = _distinct(
        rng, levels, train, key=lambda chain, problem: problem.question, without=frozenset(kept)
    )
    return Problems(name="arithmetic", train=tuple(trained.values()), heldout=tuple(kept.values()))


def _distinct(
    rng: np.random.Generator,
    levels: Sequence[int],
    count: int,
    *,
    key: Callable[[Chain, Problem], Any],
    without: frozenset[Chain],
) -> dict[Any, Problem]:
    """`count` problems that differ in their keys, level after level in turn."""
    found: dict[Any, Problem] = {}
    missed = 0
    while len(found) < count:
        chain = _chain(rng, levels[len(found) % len(levels)])
        problem = _tell(chain, rng)
        identity = key(chain, problem)
        is_new = chain not in without and identity not in found
        missed = 0 if is_new else missed + 1
        if is_new:
            found[identity] = problem
        elif missed > _MOST_MISSES:
            raise ValueError(
                f"levels {tuple(levels)} have too few distinct problems for {count} of them "
                f"(found {len(found)}); ask for fewer or add a level"
            )
    return found


def _chain(rng: np.random.Generator, length: int) -> Chain:
    first = value = int(rng.integers(2, 16))
    operations: list[Operation] = []
    while len(operations) < length:
        sign = "+-*/"[rng.choice(4, p=(0.35, 0.35, 0.2, 0.1))]
        choices = _operands(sign, value)
        if choices:
            operand = int(rng.choice(choices))
            operations.append((sign, operand))
            value = _apply(sign, value, operand)
    return first, tuple(operations)


def _operands(sign: str, value: int) -> list[int]:
    """What may stand behind a sign so that the result is whole, from 1 to `LARGEST`."""
    candidates: Mapping[str, Sequence[int]] = {
        "+": range(2, 10),
        "-": range(2, 10),
        "*": range(2, 5),
        "/": range(2, 5),
    }
    return [
        n
        for n in candidates[sign]
        if 1 <= _apply(sign, value, n) <= LARGEST and (sign != "/" or value % n == 0)
    ]


def _apply(sign: str, value: int, operand: int) -> int:
    operations: Mapping[str, Callable[[int, int], int]] = {
        "+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__,
    }  # fmt: skip
    return operations[sign](value, operand)


def _tell(chain: Chain, rng: np.random.Generator) -> Problem:
    """A story of the chain, and its steps."""
    value, operations = chain
    name, who = _PEOPLE[rng.integers(len(_PEOPLE))]
    things = _THINGS[rng.integers(len(_THINGS))]
    story, steps = [f"{name} has {value} {things}."], []
    for sign, operand in operations:
        told = _EVENTS[sign][rng.integers(len(_EVENTS[sign]))]
        story.append(told.format(who=who, n=operand, things=things))
        result = _apply(sign, value, operand)
        steps.append(f"{value} {sign} {operand} = {result}.")
        value = result
    story.append(f"How many {things} does {who.lower()} have now?")
    return Problem(
        question=" ".join(story),
        solution=" ".join(steps),
        answer=str(value),
        level=len(operations),
    )


_CALCULATOR = re.compile(r"<<[^<>]*>>")


def read_gsm8k(source: str | Path) -> tuple[Problem, ...]:
    """Problems of a file in the form of GSM8K (arXiv:2110.14168).

    Each row has "question" and "answer"; the answer ends in "#### n". Calculator annotations
    such as <<48/2=24>> are left out of the solution.

    Raises:
      FileNotFoundError: no such file.
      DataError: a field is missing, or an answer does not end in "#### n"; names the row.
    """
    return tuple(_gsm8k(row) for row in read_rows(source))


def _gsm8k(row: Row) -> Problem:
    question, worked = row.text("question").strip(), row.text("answer")
    steps, mark, final = worked.rpartition("####")
    if not mark or last_number(final) is None:
        raise DataError(
            f'{row.where}: field "answer" must end in "#### n" with the number n, got '
            f"{worked[-40:]!r}"
        )
    solution = f"{_CALCULATOR.sub('', steps).strip()}\n#### {final.strip()}".strip()
    return Problem(question=question, solution=solution, answer=str(last_number(final)))


def load_problems(
    source: str | Path,
    *,
    heldout: str | Path | None = None,
    seed: int = 0,
    heldout_share: float = 0.1,
) -> Problems:
    """GSM8K's problems from files.

    Args:
      source: to train on; see `read_gsm8k`.
      heldout: to evaluate on; without it, a share of the questions of `source`.
      seed: of that split.
      heldout_share: in (0, 1).

    Repeated questions count once; those of the held-out file are left out of the training ones.

    Raises:
      ValueError: a share outside (0, 1), or too few questions to split.
    """
    if not 0 < heldout_share < 1:
        raise ValueError(f"heldout_share must be above 0 and below 1: {heldout_share=}")
    train = {p.question: p for p in read_gsm8k(source)}
    if heldout is not None:
        kept = {p.question: p for p in read_gsm8k(heldout)}
    else:
        questions = sorted(train)
        count = round(heldout_share * len(questions))
        chosen = np.random.default_rng([seed, 2]).permutation(len(questions))[:count]
        kept = {questions[i]: train[questions[i]] for i in sorted(chosen)}
    trained = tuple(p for question, p in train.items() if question not in kept)
    return Problems(name=Path(source).stem, train=trained, heldout=tuple(kept.values()))
