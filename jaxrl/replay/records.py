"""One stored completion, and the way from rollouts to records and back."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float32, Int32

from jaxrl.types import REFERENCE_VERSION, Prompts, Rollouts

_TOKEN_FIELDS = (
    "tokens", "mask", "behaviour_log_probs", "reference_log_probs", "policy_version",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Record:
    """One completion without its padding.

    Attributes:
      tokens, mask, behaviour_log_probs, reference_log_probs, policy_version: as in `Rollouts`,
        up to the last token that the policy chose.
      rewards, costs: by name.
      iteration: tag of the sync that brought it: see `Replay.add`.
    """

    tokens: Int32[np.ndarray, " n"]
    mask: Bool[np.ndarray, " n"]
    behaviour_log_probs: Float32[np.ndarray, " n"]
    reference_log_probs: Float32[np.ndarray, " n"]
    policy_version: Int32[np.ndarray, " n"]
    rewards: Mapping[str, float]
    costs: Mapping[str, float]
    iteration: int

    @cached_property
    def content(self) -> bytes:
        """What makes two completions the same: the tokens that the policy chose."""
        return self.tokens[self.mask].tobytes()

    @cached_property
    def version(self) -> int | None:
        """Oldest policy that wrote a token of it; None where only the reference did."""
        written = self.policy_version[self.mask & (self.policy_version != REFERENCE_VERSION)]
        return int(written.min()) if written.size else None


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt's row of `Prompts`."""

    tokens: Int32[np.ndarray, " P"]
    mask: Bool[np.ndarray, " P"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What all rollouts of one replay share: one compiled learner step needs one shape.

    Attributes:
      prompt_len: P.
      completion_len: T.
      rewards, costs: names of the scores.
    """

    prompt_len: int
    completion_len: int
    rewards: tuple[str, ...]
    costs: tuple[str, ...]

    @classmethod
    def of(cls, rollouts: Rollouts) -> "Layout":
        return cls(
            prompt_len=rollouts.prompts.tokens.shape[1],
            completion_len=rollouts.tokens.shape[2],
            rewards=tuple(sorted(rollouts.rewards)),
            costs=tuple(sorted(rollouts.costs)),
        )

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Layout":
        """Of `dataclasses.asdict`, which JSON may have made lists of."""
        names = {kind: tuple(fields[kind]) for kind in ("rewards", "costs")}
        return cls(**{**fields, **names})


def split(rollouts: Rollouts, iteration: int) -> Iterator[tuple[int, Prompt, list[Record]]]:
    """(prompt id, prompt, its records) of every group; completions without tokens are left out."""
    host = jax.tree.map(np.asarray, rollouts)
    for b, prompt_id in enumerate(host.prompts.ids.tolist()):
        prompt = Prompt(tokens=host.prompts.tokens[b].copy(), mask=host.prompts.mask[b].copy())
        records = []
        for g in range(host.tokens.shape[1]):
            chosen = np.flatnonzero(host.mask[b, g])
            if not chosen.size:
                continue
            end = chosen[-1] + 1
            records.append(
                Record(
                    **{name: getattr(host, name)[b, g, :end].copy() for name in _TOKEN_FIELDS},
                    rewards={name: float(x[b, g]) for name, x in host.rewards.items()},
                    costs={name: float(x[b, g]) for name, x in host.costs.items()},
                    iteration=iteration,
                )
            )
        yield prompt_id, prompt, records


def stack(groups: Sequence[tuple[int, Prompt, Sequence[Record]]], layout: Layout) -> Rollouts:
    """Rollouts of groups of equal size, padded to the layout; NumPy arrays."""
    flat = [record for _, _, records in groups for record in records]
    shape = (len(groups), len(groups[0][2]))

    def padded(name: str) -> Any:
        rows = np.zeros((len(flat), layout.completion_len), getattr(flat[0], name).dtype)
        for row, record in zip(rows, flat, strict=True):
            values = getattr(record, name)
            row[: len(values)] = values
        return rows.reshape(*shape, layout.completion_len)

    def scores(kind: str, names: Sequence[str]) -> dict[str, Any]:
        table = [[getattr(record, kind)[name] for record in flat] for name in names]
        arrays = np.asarray(table, np.float32).reshape(len(names), *shape)
        return dict(zip(names, arrays, strict=True))

    prompts: dict[str, Any] = {
        "tokens": np.stack([prompt.tokens for _, prompt, _ in groups]),
        "mask": np.stack([prompt.mask for _, prompt, _ in groups]),
        "ids": np.asarray([prompt_id for prompt_id, _, _ in groups], np.int32),
    }
    return Rollouts(
        prompts=Prompts(**prompts),
        **{name: padded(name) for name in _TOKEN_FIELDS},
        rewards=scores("rewards", layout.rewards),
        costs=scores("costs", layout.costs),
    )


def pack(records: Sequence[Record], layout: Layout) -> dict[str, np.ndarray]:
    """All records as few arrays, one after another without padding."""
    lengths = [len(record.tokens) for record in records]

    def table(kind: str, names: Sequence[str]) -> np.ndarray:
        rows = [[getattr(record, kind)[name] for name in names] for record in records]
        return np.asarray(rows, np.float32).reshape(len(records), len(names))

    dtypes = {"tokens": np.int32, "mask": bool, "policy_version": np.int32}
    joined = {
        name: np.concatenate(
            [np.empty(0, dtypes.get(name, np.float32)), *(getattr(r, name) for r in records)]
        )
        for name in _TOKEN_FIELDS
    }
    return joined | {
        "lengths": np.asarray(lengths, np.int32),
        "iterations": np.asarray([record.iteration for record in records], np.int64),
        "rewards": table("rewards", layout.rewards),
        "costs": table("costs", layout.costs),
    }


def unpack(arrays: Mapping[str, Any], layout: Layout) -> list[Record]:
    """The records that `pack` made the arrays of."""
    host = {name: np.asarray(array) for name, array in arrays.items()}
    ends = np.cumsum(host["lengths"])
    return [
        Record(
            **{name: host[name][end - length : end].copy() for name in _TOKEN_FIELDS},
            rewards=dict(zip(layout.rewards, host["rewards"][i].tolist(), strict=True)),
            costs=dict(zip(layout.costs, host["costs"][i].tolist(), strict=True)),
            iteration=int(host["iterations"][i]),
        )
        for i, (end, length) in enumerate(zip(ends, host["lengths"], strict=True))
    ]
