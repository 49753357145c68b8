"""Rewards and costs that are plain functions of text, and their weighted sum."""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32


@runtime_checkable
class RewardFunction(Protocol):
    """Any f(prompts, completions, **columns) that gives one number per row.

    `columns` holds further columns of the data set, one value per row; a function takes those
    it needs by name and ignores the rest.
    """

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], /, **columns: Any
    ) -> Sequence[float] | Float32[np.ndarray, " N"]: ...


def evaluate(
    function: RewardFunction,
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    name: str = "reward",
    **columns: Any,
) -> Float32[np.ndarray, " N"]:
    """Calls a reward and checks its shape; what NaNs mean is for the caller to decide.

    Raises:
      ValueError: prompts and completions differ in number, or the function returned another
        number of values.

    >>> evaluate(lambda prompts, completions, **_: [len(c) for c in completions], ["a"], ["four"])
    array([4.], dtype=float32)
    """
    if len(prompts) != len(completions):
        raise ValueError(
            f"every completion needs its prompt: got {len(prompts)} prompts and "
            f"{len(completions)} completions; repeat the prompts group by group"
        )
    values = np.asarray(function(prompts, completions, **columns), np.float32)
    if values.shape != (len(completions),):
        raise ValueError(
            f"{name} must return one number per completion: got shape {values.shape} for "
            f"{len(completions)} completions"
        )
    return values


def weighted(parts: Mapping[str, tuple[RewardFunction, float]]) -> RewardFunction:
    """Σ weight · function, of functions and learned models alike.

    Args:
      parts: (function, weight) by name; the name appears in errors.

    Raises:
      ValueError: no parts, or a weight that is not finite.

    >>> fluent = weighted({"length": (brevity(max_words=2), 1.0), "fluency": (fluency, 0.5)})
    >>> fluent(["q", "q"], ["a fine answer indeed", "ok ok"])
    array([-1.,  0.], dtype=float32)
    """
    if not parts:
        raise ValueError("a weighted reward needs at least one part: got none")
    for name, (_, weight) in parts.items():
        if not np.isfinite(weight):
            raise ValueError(f"weights must be finite: {name!r} has {weight}")

    def combined(
        prompts: Sequence[str], completions: Sequence[str], /, **columns: Any
    ) -> Float32[np.ndarray, " N"]:
        total = np.zeros(len(completions), np.float32)
        for name, (function, weight) in parts.items():
            values = evaluate(function, prompts, completions, name=name, **columns)
            total += np.float32(weight) * values
        return total

    return combined


def brevity(*, max_words: int) -> RewardFunction:
    """0 up to `max_words`, then linearly down to -1 at twice as many; also -1 for no words.

    Learned rewards tend to grow with length; this guards against it.
    """
    if max_words < 1:
        raise ValueError(f"max_words must be ≥ 1: {max_words=}")

    def score(
        prompts: Sequence[str], completions: Sequence[str], /, **columns: Any
    ) -> Float32[np.ndarray, " N"]:
        words = np.array([len(text.split()) for text in completions], np.float32)
        excess = np.clip((words - max_words) / max_words, 0, 1)
        return np.where(words == 0, np.float32(-1), -excess).astype(np.float32)

    return score


def fluency(
    prompts: Sequence[str], completions: Sequence[str], /, **columns: Any
) -> Float32[np.ndarray, " N"]:
    """0 for ordinary text, down to -2 for repetition and stray symbols, -2 for no words.

    The share of words that repeat an earlier pair or triple of words, plus the share of
    characters that are neither letters, digits, spaces nor usual punctuation; each counts as a
    fault only beyond what ordinary English has.

    >>> fluency(["q"] * 3, ["A calm, plain answer.", "na na na na na na na na na", ""])
    array([ 0., -1., -2.], dtype=float32)
    """
    return np.array([_fluency(text) for text in completions], np.float32)


_USUAL = re.compile(r"[\w\s.,:;!?'\"()\-–—’“”%$/&*#`@+=\[\]<>]")
_REPEATED_PAIRS_IN_ENGLISH = 0.1
_ODD_CHARACTERS_IN_ENGLISH = 0.02


def _fluency(text: str) -> float:
    words = text.lower().split()
    if not words:
        return -2.0
    pairs = list(itertools.pairwise(words))
    repeated = 1 - len(set(pairs)) / len(pairs) if pairs else 0.0
    odd = 1 - len(_USUAL.findall(text)) / len(text)
    fault = max(0.0, repeated - _REPEATED_PAIRS_IN_ENGLISH) / (1 - _REPEATED_PAIRS_IN_ENGLISH)
    fault = min(1.0, 1.2 * fault)
    return 0.0 - fault - min(1.0, 10 * max(0.0, odd - _ODD_CHARACTERS_IN_ENGLISH))


# Openings of refusals in public model outputs; HarmBench and XSTest use similar string matches.
_UNABLE = r"can ?not|can'?t|won'?t|will not|do not|don'?t|must|would not|wouldn'?t|refuse to"
_DEEDS = (
    "help|assist|provide|fulfil|fulfill|answer|comply|support|condone|decline|engage|offer|"
    "participate|encourage|recommend|give|share|write|create|promote|do that"
)
_REFUSAL = re.compile(
    rf"\b(?:i|we) (?:{_UNABLE})(?: \w+){{0,3}}? (?:{_DEEDS})\b"
    r"|\b(?:i|we)(?:'m| am|'re| are)(?: very| so| really)? (?:sorry(?! (?:to|for|about))|afraid)\b"
    r"|\b(?:i|we)(?:'m| am|'re| are) (?:unable|not able|not going|just an ai|an ai)\b"
    r"|\bi (?:strongly )?condemn\b|^sorry\b|^i apologi[sz]e\b"
    r"|\bas an? (?:responsible|ethical|ai language) "
    r"|\b(?:is|are|be|'s|was) (?:illegal|unethical|inappropriate|never acceptable)\b"
    r"|\b(?:not|never) (?:\w+ or )?(?:appropriate|ethical|acceptable)\b",
    re.IGNORECASE,
)
_REFUSAL_WINDOW = 200
"""Characters; who refuses does so at once, and long answers use these words otherwise."""


def is_refusal(
    prompts: Sequence[str], completions: Sequence[str], /, **columns: Any
) -> Bool[np.ndarray, " N"]:
    """True where an English text opens like a refusal, by string matching.

    >>> is_refusal(["q"] * 2, ["I'm sorry, but I can't help with that.", "Boil it for an hour."])
    array([ True, False])
    """
    texts = [text.strip().replace("’", "'")[:_REFUSAL_WINDOW] for text in completions]
    return np.array([bool(_REFUSAL.search(text)) for text in texts], bool)


def compose(
    function: RewardFunction, change: Callable[[Float32[np.ndarray, " N"]], Any]
) -> RewardFunction:
    """`change` applied to the values of `function`, e.g. to clip or to scale a reward.

    >>> compose(fluency, np.negative)(["q"], [""])
    array([2.], dtype=float32)
    """

    def composed(
        prompts: Sequence[str], completions: Sequence[str], /, **columns: Any
    ) -> Float32[np.ndarray, " N"]:
        return np.asarray(change(evaluate(function, prompts, completions, **columns)), np.float32)

    return composed
