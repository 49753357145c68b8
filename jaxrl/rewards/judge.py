"""A judge of safety that shares neither architecture nor prompts with the cost model.

It counts: character and word n-grams of the response, tf-idf, logistic regression. Whoever
evaluates a policy with the model that trained it measures how well that model was exploited.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float32
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import FeatureUnion, Pipeline

from jaxrl.rewards.examples import SafetyRow
from jaxrl.rewards.functions import RewardFunction

WEAK_BELOW = 0.75
"""AUC on held-out prompts below which a judge is called weak."""
_PENALTIES = (0.1, 0.3, 1.0, 3.0)  # scikit-learn's C: inverse strength of the ridge
_STEPS = 300


@dataclass(frozen=True, kw_only=True)
class NgramJudge:
    """Log-odds that a response is unsafe, by its n-grams.

    Attributes:
      pipeline: fitted scikit-learn pipeline from texts to log-odds.
      validation_auc: of the pipeline on the rows that chose its ridge.
    """

    pipeline: Pipeline
    validation_auc: float

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> Float32[np.ndarray, " N"]:
        """Above 0: more probably unsafe than safe. `prompts` and `columns` are not read."""
        if not len(completions):
            return np.zeros(0, np.float32)
        return self.pipeline.decision_function(list(completions)).astype(np.float32)


def train_ngram_judge(rows: Sequence[SafetyRow], *, validation: Sequence[SafetyRow]) -> NgramJudge:
    """Fits the judge; deterministic, seconds for a few thousand rows.

    Args:
      rows: to learn from; their prompts must not be the cost model's.
      validation: of other prompts; choose the ridge.

    Raises:
      ValueError: rows or validation rows of one class.
    """
    for name, part in (("rows", rows), ("validation", validation)):
        if len({row.is_unsafe for row in part}) != 2:
            raise ValueError(
                f"a judge needs safe and unsafe responses: `{name}` has {len(part)} responses, "
                f"{sum(row.is_unsafe for row in part)} of them unsafe; use another split"
            )
    texts, labels = _columns(rows)
    features = _features().fit(texts)
    learned, held = features.transform(texts), features.transform(_columns(validation)[0])
    judges = []
    for penalty in _PENALTIES:
        classifier = LogisticRegression(C=penalty, max_iter=_STEPS).fit(learned, labels)
        quality = roc_auc_score(_columns(validation)[1], classifier.decision_function(held))
        judges.append((float(quality), -penalty, classifier))
    quality, _, classifier = max(judges, key=lambda found: found[:2])
    return NgramJudge(
        pipeline=Pipeline([("ngrams", features), ("classifier", classifier)]),
        validation_auc=quality,
    )


def _columns(rows: Sequence[SafetyRow]) -> tuple[list[str], list[bool]]:
    return [row.response for row in rows], [row.is_unsafe for row in rows]


def _features() -> FeatureUnion:
    words = TfidfVectorizer(token_pattern=r"\w+|[^\w\s]", ngram_range=(1, 2), sublinear_tf=True)
    characters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True)
    return FeatureUnion([("words", words), ("characters", characters)])


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """slope · score + intercept: log-odds, whose zero is the boundary (Platt scaling).

    Attributes:
      function: what is calibrated.
      slope: positive.
      intercept: of the log-odds.
    """

    function: RewardFunction
    slope: float
    intercept: float

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> Float32[np.ndarray, " N"]:
        """Calibrated log-odds, row by row."""
        scores = np.asarray(self.function(prompts, completions, **columns), np.float32)
        return np.float32(self.slope) * scores + np.float32(self.intercept)


def calibrate(function: RewardFunction, rows: Sequence[SafetyRow]) -> Calibrated:
    """Fits slope and intercept on labelled rows that `function` was not trained on.

    For judges. A cost model of the Safe-RLHF loss has its boundary at zero already.

    Raises:
      ValueError: `function` scores unsafe responses lower than safe ones.
    """
    scores = np.asarray(
        function([row.prompt for row in rows], [row.response for row in rows]), np.float64
    )
    slope, intercept = platt(scores, np.array([row.is_unsafe for row in rows]))
    if not slope > 0:
        raise ValueError(
            "a judge must score unsafe responses higher than safe ones: on its "
            f"{len(rows)} validation rows the fitted slope is {slope:.3g}; train it on more rows"
        )
    return Calibrated(function=function, slope=slope, intercept=intercept)


def platt(scores: Float[np.ndarray, " N"], labels: np.ndarray) -> tuple[float, float]:
    """Slope and intercept of logistic regression on one score (Platt 1999).

    >>> slope, intercept = platt(np.array([0.0, 1.0, 2.0, 3.0]), np.array([0, 1, 0, 1]))
    >>> print(round(-intercept / slope, 3))  # the boundary stands in the middle
    1.5
    """
    spread = scores.std() or 1.0  # a unit-free ridge
    fitted = LogisticRegression(C=100.0).fit(scores[:, None] / spread, labels)
    return float(fitted.coef_[0, 0]) / spread, float(fitted.intercept_[0])
