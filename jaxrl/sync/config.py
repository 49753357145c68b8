"""How versions are published."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from jaxrl.sync.manifest import Quantisation
from jaxrl.sync.quantise import KEPT


@dataclass(frozen=True, kw_only=True)
class SyncConfig:
    """How versions are published.

    Attributes:
      anchor_every: at least every so many publications have an anchor beside their delta, from
        which whoever joins begins. There is one, too, when the deltas since the last weigh as much
        as it does.
      dtype: of the actors' floating point weights; None: as the learner's.
      quantise: how the actors' matrices are quantised (`sync.quantise`), from the learner's
        weights; None: they are not.
      kept: parts of names; leaves whose name has one of them are not quantised.
      dense_above: a delta of more than this share of the dense weights is not worth its decoding:
        an anchor is published instead.
      keep_anchors: anchors that stay in the store, with all that follows the oldest of them.
      ack_expiry_s: a subscriber that gave no sign of life for so long holds nothing back.
      shortcut_after: a living subscriber that is so many publications behind gets one delta in
        place of many; 0: none are made.

    Raises:
      ValueError: a number out of its range.
    """

    anchor_every: int = 20
    dtype: Any = None
    quantise: Quantisation | None = None
    kept: tuple[str, ...] = KEPT
    dense_above: float = 0.9
    keep_anchors: int = 2
    ack_expiry_s: float = 600.0
    shortcut_after: int = 4

    def __post_init__(self) -> None:
        if self.anchor_every < 1 or self.keep_anchors < 1:
            raise ValueError(f"must be at least 1: {self.anchor_every=}, {self.keep_anchors=}")
        if not 0 < self.dense_above <= 1 or self.ack_expiry_s <= 0:
            raise ValueError(
                f"dense_above must be within (0, 1], ack_expiry_s above 0: {self.dense_above=}, "
                f"{self.ack_expiry_s=}"
            )
        if self.shortcut_after and self.shortcut_after < 2:
            raise ValueError(
                f"one delta is its own shortcut: {self.shortcut_after=}; give 2 or more, or 0"
            )
        if self.dtype is not None and not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(f"dtype must be a floating point type or None, got {self.dtype}")
        if self.quantise not in (None, "int8", "fp8"):
            raise ValueError(f"quantise must be int8, fp8 or None, got {self.quantise!r}")
