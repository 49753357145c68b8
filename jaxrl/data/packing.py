"""Several short examples in one row, so that a step computes few columns of padding.

Rows are filled first-fit: an example goes into the oldest open row that has room for it. Which
examples are in which batch is a function of (seed, step), as everywhere in `jaxrl.data`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int64

from jaxrl.data.batches import Demonstrations
from jaxrl.types import PackedRows

_OPEN = 512  # rows that are looked at: the time of packing grows with it


def first_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Puts examples into rows, in their order.

    Args:
      lengths: tokens of every example, at least 1.
      width: columns of a row.

    Returns:
      The examples of each row, by their places in `lengths`; each stands in exactly one.

    Raises:
      ValueError: an example that is empty or longer than a row.

    >>> first_fit([5, 4, 3, 2], width=8)
    [[0, 2], [1, 3]]
    """
    rows: list[list[int]] = []
    room = np.zeros(0, np.int64)
    oldest = 0  # of the rows that are looked at
    for place, length in enumerate(lengths):
        if not 0 < length <= width:
            raise ValueError(
                f"every example must have between 1 and {width} tokens to stand in one row: "
                f"example {place} has {length}; pack wider rows or leave it out"
            )
        fits = np.flatnonzero(room[oldest:] >= length)
        if fits.size:
            chosen = oldest + int(fits[0])
        else:
            chosen = len(rows)
            rows.append([])
            room = np.append(room, width)
            oldest = max(oldest, len(rows) - _OPEN)
        rows[chosen].append(place)
        room[chosen] -= length
    return rows


@dataclass(frozen=True, kw_only=True)
class PackedDemonstrations:
    """Demonstrations as rows of whole examples: an endless stream of shuffled, packed epochs.

    Attributes:
      demonstrations: the examples; what is padding in them is left out.
      width: columns of a row.
      seed: of the order.
    """

    demonstrations: Demonstrations
    width: int
    seed: int
    _epochs: dict[int, list[list[int]]] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def lengths(self) -> Int64[np.ndarray, " N"]:
        """Tokens of every example, prompt and completion together."""
        demos = self.demonstrations
        return demos.prompts.mask.sum(axis=1) + demos.mask.sum(axis=1)

    def epoch(self, number: int) -> list[list[int]]:
        """Every example once: the examples of each row."""
        order = np.random.default_rng([self.seed, number]).permutation(len(self.demonstrations))
        packed = first_fit(self.lengths[order].tolist(), self.width)
        return [[int(order[place]) for place in row] for row in packed]

    def rows(self, step: int, count: int) -> list[list[int]]:
        """The examples of each of the `count` rows of a batch, which may span epochs."""
        found: list[list[int]] = []
        start, number = step * count, 0
        while len(found) < count:
            if number not in self._epochs:  # all before it count: epochs differ in their rows
                self._epochs[number] = self.epoch(number)
            epoch = self._epochs[number]
            found += epoch[start : start + count - len(found)]
            start, number = max(start - len(epoch), 0), number + 1
        return found

    def take(self, step: int, count: int) -> PackedRows:
        """Batch `step` of `count` rows."""
        shape = (count, self.width)
        tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        mask = np.zeros(shape, bool)
        demos = self.demonstrations
        for row, examples in enumerate(self.rows(step, count)):
            at = 0
            for segment, example in enumerate(examples, start=1):
                prompt = demos.prompts.tokens[example][demos.prompts.mask[example]]
                completion = demos.tokens[example][demos.mask[example]]
                end = at + prompt.size + completion.size
                tokens[row, at:end] = np.concatenate([prompt, completion])
                segments[row, at:end] = segment
                mask[row, at + prompt.size : end] = True
                at = end
        return PackedRows(
            tokens=jnp.asarray(tokens), segments=jnp.asarray(segments), mask=jnp.asarray(mask)
        )
