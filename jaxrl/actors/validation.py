"""What is checked of rollouts before anybody trains on them: nothing is taken on trust."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from jaxrl.actors.work import Refusal, Result, WorkItem
from jaxrl.data.batches import PromptSet
from jaxrl.types import REFERENCE_VERSION, Rollouts

SHAPE, NOT_FINITE, PROMPTS, TOKENS, VERSION, STALE = (
    "shape",
    "not finite",
    "prompts",
    "tokens",
    "version",
    "stale",
)
"""Reasons of refusals; actors add `actor.SCORES`, and the ledger "fatal"."""

_ROUNDING = 1e-4  # a log-probability is at most 0, up to float32's rounding of a log-sum-exp


@dataclass(frozen=True, kw_only=True)
class RolloutChecks:
    """What rollouts of a run look like.

    Attributes:
      prompts: the training set; rollouts must be of the very prompts that were asked for.
      group_size: G.
      completion_len: T.
      vocab_size: V; token ids are below it.
    """

    prompts: PromptSet
    group_size: int
    completion_len: int
    vocab_size: int

    def refusal(self, item: WorkItem, result: Result, *, newest: int) -> Refusal | None:
        """Why a result must not be trained on; None where nothing is wrong with it.

        Args:
          item: that was asked for.
          result: the answer, with rollouts of NumPy arrays.
          newest: the newest version that was published.
        """
        assert result.rollouts is not None
        for reason, detail in self._problems(item, result.version, result.rollouts, newest):
            return Refusal(reason=reason, detail=detail, item=item.id, actor=result.actor)
        return None

    def _problems(
        self, item: WorkItem, version: int, rollouts: Rollouts, newest: int
    ) -> Iterator[tuple[str, str]]:
        """Reasons and details, those first on which the others rely."""
        for name, (array, shape, dtype) in self._layout(rollouts, len(item.rows)).items():
            if array.shape != shape or array.dtype != dtype:
                yield (
                    SHAPE,
                    f"{name} must be {dtype} {list(shape)}, got {array.dtype} {list(array.shape)}",
                )
        for which, scores in (("reward", rollouts.rewards), ("cost", rollouts.costs)):
            if which not in scores:
                yield SHAPE, f"{which}s need an entry {which!r}, got {sorted(scores)}"
        for name, array in _numbers(rollouts).items():
            if not np.isfinite(array).all():
                yield NOT_FINITE, f"{name} has {int((~np.isfinite(array)).sum())} that are not"
        rows = np.asarray(item.rows, np.int64)
        asked = {
            "ids": rows.astype(np.int32),
            "tokens": self.prompts.tokens[rows],
            "mask": self.prompts.mask[rows],
        }
        for name, array in asked.items():
            if not np.array_equal(getattr(rollouts.prompts, name), array):
                yield PROMPTS, f"the prompts' {name} are not those of rows {item.rows}"
        yield from self._token_problems(rollouts, version, newest)

    def _token_problems(
        self, rollouts: Rollouts, version: int, newest: int
    ) -> Iterator[tuple[str, str]]:
        tokens, mask = np.asarray(rollouts.tokens), np.asarray(rollouts.mask)
        if ((tokens < 0) | (tokens >= self.vocab_size)).any():
            yield TOKENS, f"token ids must be in [0, {self.vocab_size}), got {tokens.max()}"
        if (mask[..., 1:] & ~mask[..., :-1]).any() or not mask[..., 0].all():
            yield TOKENS, "the mask must be True up to the end of each completion, then False"
        for name in ("behaviour_log_probs", "reference_log_probs"):
            if (getattr(rollouts, name) > _ROUNDING).any():
                yield TOKENS, f"{name} must be at most 0, got {getattr(rollouts, name).max()}"
        if not 0 <= version <= newest:
            yield VERSION, f"version {version} was never published; the newest is {newest}"
        written = set(np.unique(np.asarray(rollouts.policy_version)[mask]).tolist())
        if not written <= {REFERENCE_VERSION, version}:
            yield VERSION, f"tokens say versions {sorted(written)}, their actor says {version}"

    def _layout(
        self, rollouts: Rollouts, count: int
    ) -> Mapping[str, tuple[np.ndarray, tuple[int, ...], np.dtype]]:
        """Every array by name, with the shape and dtype that it must have."""
        prompt_len = self.prompts.tokens.shape[1]
        groups, whole = (count, self.group_size), (count, self.group_size, self.completion_len)
        prompts, shapes = rollouts.prompts, {}
        for name, array, shape, kind in (
            ("prompts.tokens", prompts.tokens, (count, prompt_len), np.int32),
            ("prompts.mask", prompts.mask, (count, prompt_len), np.bool_),
            ("prompts.ids", prompts.ids, (count,), np.int32),
            ("tokens", rollouts.tokens, whole, np.int32),
            ("mask", rollouts.mask, whole, np.bool_),
            ("behaviour_log_probs", rollouts.behaviour_log_probs, whole, np.float32),
            ("reference_log_probs", rollouts.reference_log_probs, whole, np.float32),
            ("policy_version", rollouts.policy_version, whole, np.int32),
            *((f"rewards[{n!r}]", x, groups, np.float32) for n, x in rollouts.rewards.items()),
            *((f"costs[{n!r}]", x, groups, np.float32) for n, x in rollouts.costs.items()),
            *((f"greedy[{n!r}]", x, (count,), np.float32) for n, x in _greedy(rollouts).items()),
        ):
            shapes[name] = (np.asarray(array), shape, np.dtype(kind))
        return shapes


def _numbers(rollouts: Rollouts) -> Mapping[str, np.ndarray]:
    named = {
        "behaviour_log_probs": rollouts.behaviour_log_probs,
        "reference_log_probs": rollouts.reference_log_probs,
    }
    for kind, scores in (
        ("rewards", rollouts.rewards),
        ("costs", rollouts.costs),
        ("greedy", _greedy(rollouts)),
    ):
        named |= {f"{kind}[{name!r}]": array for name, array in scores.items()}
    return {name: np.asarray(array) for name, array in named.items()}


def _greedy(rollouts: Rollouts) -> Mapping[str, np.ndarray]:
    greedy = {} if rollouts.greedy is None else rollouts.greedy
    return {name: np.asarray(array) for name, array in greedy.items()}
