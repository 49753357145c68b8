"""The records of one prompt."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from jaxrl.replay.config import ReplayConfig
from jaxrl.replay.records import Prompt, Record


@dataclass
class PromptBuffer:
    """A prompt's records, from the oldest tag to the newest, no completion twice.

    Attributes:
      prompt: the prompt.
      records: sorted by `iteration`; of equal ones, what came first stands first.
    """

    prompt: Prompt
    records: list[Record] = field(default_factory=list)

    def merge(self, incoming: Iterable[Record], *, capacity: int) -> None:
        """Adds records: the newest copy of a completion wins, the newest `capacity` stay."""
        newest: dict[bytes, Record] = {}
        for record in sorted([*self.records, *incoming], key=lambda r: r.iteration):
            newest.pop(record.content, None)  # the later copy also takes the later place
            newest[record.content] = record
        self.records = list(newest.values())[-capacity:]

    def drop_stale(self, oldest: int) -> None:
        """Drops what a policy older than version `oldest` wrote."""
        self.records = [r for r in self.records if r.version is None or r.version >= oldest]

    def of_sync(self, iteration: int) -> list[Record]:
        """The records that the sync with this tag brought: TBA's n_online newest."""
        return [record for record in self.records if record.iteration == iteration]

    def best_safe(self, *, margin: float) -> float:
        """The greatest "reward" among records with "cost" ≤ −margin; −inf where there is none."""
        rewards = (r.rewards["reward"] for r in self.records if r.costs["cost"] <= -margin)
        return max(rewards, default=float("-inf"))

    def draw_recent(self, rng: np.random.Generator, size: int, *, iteration: int) -> list[Record]:
        """Uniformly among the records of one sync."""
        records = self.of_sync(iteration)
        return draw(rng, records, np.zeros(len(records)), size)

    def draw_any(self, rng: np.random.Generator, size: int, config: ReplayConfig) -> list[Record]:
        """With probability softmax(inverse temperature × score) among all records."""
        logits = np.zeros(len(self.records))
        if config.inverse_temperature:
            rewards, costs = (
                {
                    name: np.asarray([getattr(r, kind)[name] for r in self.records], np.float32)
                    for name in getattr(self.records[0], kind)
                }
                for kind in ("rewards", "costs")
            )
            scores = np.asarray(config.score(rewards, costs), np.float64)
            logits = config.inverse_temperature * scores
        return draw(rng, self.records, logits, size)


def draw(
    rng: np.random.Generator, records: list[Record], logits: Float[np.ndarray, " n"], size: int
) -> list[Record]:
    """`size` records, each draw ∝ e^logit among those left; with replacement where too few.

    The largest of logits plus independent Gumbel noise are such draws without replacement
    (Yellott 1977), whatever the logits' range.
    """
    count = len(records)
    if size <= count:
        picked = np.argsort(-(logits + rng.gumbel(size=count)), kind="stable")[:size]
    else:
        picked = np.argmax(logits + rng.gumbel(size=(size, count)), axis=1)
    return [records[i] for i in picked]
