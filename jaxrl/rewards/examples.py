"""What learned rewards and costs learn from: sequences, and which of them are compared."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, Int32
from sklearn.metrics import roc_auc_score


@runtime_checkable
class PairRow(Protocol):
    """Two responses to one prompt; see `jaxrl.data.Pair`."""

    @property
    def prompt(self) -> str: ...
    @property
    def better(self) -> str: ...
    @property
    def worse(self) -> str: ...
    @property
    def better_is_unsafe(self) -> bool | None: ...
    @property
    def worse_is_unsafe(self) -> bool | None: ...


@runtime_checkable
class SafetyRow(Protocol):
    """A response with its safety label; see `jaxrl.data.LabelledResponse`."""

    @property
    def prompt(self) -> str: ...
    @property
    def response(self) -> str: ...
    @property
    def is_unsafe(self) -> bool: ...


@runtime_checkable
class GradedRow(Protocol):
    """A response with its compliance label; see `jaxrl.data.ComplianceRow`."""

    @property
    def prompt(self) -> str: ...
    @property
    def response(self) -> str: ...
    @property
    def label(self) -> str: ...


COMPLIANCE = {"full": 1.0, "partial": 0.5, "refusal": 0.0}
"""Targets of `label_loss`: a refusal in part is halfway."""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Sequences, each once, and the groups of K that one example compares.

    Attributes:
      prompts: of each sequence, E.
      completions: of each sequence, E.
      groups: sequences of each example; K = 2 for pairs, 1 for single labels.
      targets: what the loss is told of each sequence of an example.
    """

    prompts: tuple[str, ...]
    completions: tuple[str, ...]
    groups: Int32[np.ndarray, "M K"]
    targets: Float32[np.ndarray, "M K"]

    @classmethod
    def of(cls, rows: Iterable[tuple[str, Sequence[str], Sequence[float]]]) -> "Examples":
        """From (prompt, completions, targets) rows, K completions and targets in each.

        Raises:
          ValueError: no rows, or rows of different K.

        >>> Examples.of([("p", ("a", "b"), (-1.0, 1.0)), ("p", ("c", "b"), (0.0, 1.0))]).groups
        array([[0, 1],
               [2, 1]], dtype=int32)
        """
        index: dict[tuple[str, str], int] = {}
        groups, targets = [], []
        for prompt, completions, labels in rows:
            groups.append([index.setdefault((prompt, c), len(index)) for c in completions])
            targets.append(list(labels))
        sizes = {len(row) for row in (*groups, *targets)}
        if len(sizes) != 1 or 0 in sizes:
            raise ValueError(
                "examples need rows of one size, with a target for each completion: got "
                f"{len(groups)} rows of sizes {sorted(sizes)}; is a part of the data empty?"
            )
        prompts, completions = zip(*index, strict=True)
        return cls(
            prompts=prompts,
            completions=completions,
            groups=np.asarray(groups, np.int32),
            targets=np.asarray(targets, np.float32),
        )


def cost_examples(pairs: Iterable[PairRow]) -> Examples:
    """Pairs ordered by safety, with targets +1 unsafe, -1 safe, 0 unknown: for `cost_loss`."""
    signs = {True: 1.0, False: -1.0, None: 0.0}
    return Examples.of(
        (
            pair.prompt,
            (pair.better, pair.worse),
            (signs[pair.better_is_unsafe], signs[pair.worse_is_unsafe]),
        )
        for pair in pairs
    )


def preference_examples(pairs: Iterable[PairRow]) -> Examples:
    """Pairs ordered by helpfulness, the better first (target 1): for `reward_loss`."""
    return Examples.of((pair.prompt, (pair.better, pair.worse), (1.0, 0.0)) for pair in pairs)


def safety_examples(rows: Iterable[SafetyRow]) -> Examples:
    """Single responses with target +1 unsafe, -1 safe: to validate a cost model."""
    return Examples.of(
        (row.prompt, (row.response,), (1.0 if row.is_unsafe else -1.0,)) for row in rows
    )


def compliance_examples(rows: Iterable[GradedRow]) -> Examples:
    """Single responses with target 1 full compliance, ½ partial, 0 refusal: for `label_loss`."""
    return Examples.of((row.prompt, (row.response,), (COMPLIANCE[row.label],)) for row in rows)


def auc(scores: Float[np.ndarray, "M K"], targets: Float[np.ndarray, "M K"]) -> float:
    """Area under the ROC curve of all scores; positive are targets above 0.

    Raises:
      ValueError: targets of one class only.

    >>> auc(np.array([[0.2], [0.1], [0.9]]), np.array([[1.0], [-1.0], [1.0]]))
    1.0
    """
    positive = (targets > 0).ravel()
    if positive.all() or not positive.any():
        raise ValueError(
            f"AUC needs both classes: {int(positive.sum())} of {positive.size} targets are "
            "positive; use another split"
        )
    return float(roc_auc_score(positive, scores.ravel()))


def pair_accuracy(scores: Float[np.ndarray, "M 2"], targets: Float[np.ndarray, "M 2"]) -> float:
    """Share of pairs whose first sequence scores higher; a tie counts ½.

    >>> pair_accuracy(np.array([[2.0, 1.0], [1.0, 1.0]]), np.zeros((2, 2)))
    0.75
    """
    first, second = scores.T
    return float(np.mean((first > second) + 0.5 * (first == second)))
