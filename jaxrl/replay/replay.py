"""The replay: buffers of all prompts, and the order in which prompts take their turn."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import jax
import numpy as np

from jaxrl.replay.buffer import PromptBuffer
from jaxrl.replay.config import ReplayConfig
from jaxrl.replay.records import Layout, Prompt, pack, split, stack, unpack
from jaxrl.types import Rollouts


class EmptyReplay(LookupError):
    """`Replay.sample` found no record that it may use."""


class Replay:
    """Past completions of every prompt (TBA, arXiv:2503.18929, section 3).

    Two replays that were given the same seed and the same calls hold and draw the same.
    """

    def __init__(self, config: ReplayConfig | None = None, *, seed: int) -> None:
        """An empty replay.

        Args:
          config: what is kept and how it is drawn; by default `ReplayConfig()`.
          seed: of all draws.
        """
        self.config = config or ReplayConfig()
        self._rng = np.random.default_rng(seed)
        self._layout: Layout | None = None
        self._buffers: dict[int, PromptBuffer] = {}
        self._latest: int | None = None
        self._recent = _Turns()
        self._seen = _Turns()

    def __len__(self) -> int:
        """Records, over all prompts."""
        return sum(len(buffer.records) for buffer in self._buffers.values())

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """Prompts that have records, in the order in which they were first seen."""
        return tuple(i for i, buffer in self._buffers.items() if buffer.records)

    def buffer(self, prompt_id: int) -> PromptBuffer:
        """The records of one prompt.

        Raises:
          KeyError: it has never been seen.
        """
        return self._buffers[prompt_id]

    # ------------------------------------------------------------------------ in and out

    def add(self, rollouts: Rollouts, tag: int) -> None:
        """Merges scored rollouts.

        Args:
          rollouts: B groups, on the host or on a device.
          tag: of the sync that brings them: the learner's update at which the policy that wrote
            them was published. Calls with one tag are one sync, in any number and
            order; the greatest tag so far is "the last sync", whose prompts and records the
            recent draws use. Of two equal completions the one with the greater tag stays.

        Raises:
          ValueError: the shapes or the names of the scores are not those of earlier rollouts,
            or there is a greedy baseline, which is of one policy and cannot be replayed.
        """
        self._check(rollouts)
        if self._latest is None or tag > self._latest:
            self._latest = tag
            self._recent = _Turns()
        for prompt_id, prompt, records in split(rollouts, tag):
            if not records:
                continue
            buffer = self._buffers.setdefault(prompt_id, PromptBuffer(prompt))
            buffer.merge(records, capacity=self.config.capacity)
            self._seen.join(self._rng, prompt_id)
            if buffer.of_sync(self._latest):
                self._recent.join(self._rng, prompt_id)

    def sample(self, num_prompts: int, group_size: int, iteration: int) -> Rollouts:
        """Rollouts for one update.

        Each of the B places goes, with probability m, to a prompt of the last sync and G of the
        records that sync brought, else to any prompt and G of its records by score. Prompts
        take turns: none comes again before all others of its set have come. Records are drawn
        without replacement, unless there are fewer than G.

        Args:
          num_prompts: B.
          group_size: G.
          iteration: updates that the learner has made, from which staleness is counted.

        Returns:
          Scored rollouts of NumPy arrays, padded as those that were added.

        Raises:
          EmptyReplay: nothing was added, or all of it is staler than allowed.
          ValueError: a size below 1.
        """
        if num_prompts < 1 or group_size < 1:
            raise ValueError(
                f"a batch needs prompts and completions: {num_prompts=}, {group_size=}"
            )
        if self.config.max_staleness is not None:
            for buffer in self._buffers.values():
                buffer.drop_stale(iteration - self.config.max_staleness)
        if not len(self):
            raise EmptyReplay(
                "the replay has no record to draw from at update "
                f"{iteration} (max_staleness={self.config.max_staleness}); add rollouts first"
            )
        assert self._layout is not None
        groups = [self._place(group_size) for _ in range(num_prompts)]
        return stack(groups, self._layout).replace(best_safe=self._best_safe(groups))

    def _best_safe(self, groups: list[tuple[int, Prompt, list[Any]]]) -> Any:
        layout = self._layout
        if layout is None or "reward" not in layout.rewards or "cost" not in layout.costs:
            return None
        margin = self.config.margin
        best = [self._buffers[i].best_safe(margin=margin) for i, _, _ in groups]
        return np.asarray(best, np.float32)

    def _place(self, group_size: int) -> tuple[int, Prompt, list[Any]]:
        """One place of a batch."""
        latest = self._latest
        assert latest is not None
        if self._rng.random() < self.config.recent_share:
            online = lambda i: bool(self._buffers[i].of_sync(latest))  # noqa: E731
            prompt_id = self._recent.next(self._rng, online)
            if prompt_id is not None:
                buffer = self._buffers[prompt_id]
                drawn = buffer.draw_recent(self._rng, group_size, iteration=latest)
                return prompt_id, buffer.prompt, drawn
        prompt_id = self._seen.next(self._rng, lambda i: bool(self._buffers[i].records))
        assert prompt_id is not None, "`sample` has made sure of a record"
        buffer = self._buffers[prompt_id]
        return prompt_id, buffer.prompt, buffer.draw_any(self._rng, group_size, self.config)

    def _check(self, rollouts: Rollouts) -> None:
        if rollouts.greedy is not None:
            raise ValueError(
                "a greedy baseline belongs to the policy of its step and cannot be replayed: "
                "rollouts.greedy is given; train recipes that need one without replay"
            )
        layout = Layout.of(rollouts)
        if self._layout is None:
            self._layout = layout
        if layout != self._layout:
            raise ValueError(
                "all rollouts of a replay must have one shape and the same scores: "
                f"got {asdict(layout)}, before {asdict(self._layout)}; pad them alike"
            )

    # ------------------------------------------------------------------- save and restore

    def state_dict(self) -> dict[str, Any]:
        """All that the replay is.

        Returns:
          "arrays": NumPy arrays by name, whose shapes grow with what is stored; "metadata":
          JSON values. `Checkpointer.save` takes the one as part of its tree and the other as
          metadata; `template` makes from the latter what restoring needs.
        """
        arrays: dict[str, np.ndarray] = {}
        if self._layout is not None:
            buffers = self._buffers.values()
            arrays = pack([r for b in buffers for r in b.records], self._layout) | {
                "counts": np.asarray([len(b.records) for b in buffers], np.int32),
                "prompt_ids": np.asarray(list(self._buffers), np.int32),
                "prompt_tokens": np.stack([b.prompt.tokens for b in buffers]),
                "prompt_mask": np.stack([b.prompt.mask for b in buffers]),
            }
        metadata = {
            "rng": self._rng.bit_generator.state,
            "layout": None if self._layout is None else asdict(self._layout),
            "latest": self._latest,
            "turns": {"recent": self._recent.state(), "seen": self._seen.state()},
            "arrays": {name: [list(x.shape), str(x.dtype)] for name, x in arrays.items()},
        }
        return {"arrays": arrays, "metadata": metadata}

    @staticmethod
    def template(metadata: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Arrays like those of the `state_dict` with this metadata, with nothing in them."""
        return {
            name: np.zeros(tuple(shape), dtype)
            for name, (shape, dtype) in metadata["arrays"].items()
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Becomes the replay whose `state_dict` this is; the config stays this one's."""
        metadata, arrays = state["metadata"], state["arrays"]
        self._rng.bit_generator.state = metadata["rng"]
        self._latest = metadata["latest"]
        self._recent = _Turns(**metadata["turns"]["recent"])
        self._seen = _Turns(**metadata["turns"]["seen"])
        self._buffers, self._layout = {}, None
        if metadata["layout"] is None:
            return
        self._layout = Layout.from_json(metadata["layout"])
        records = iter(unpack(arrays, self._layout))
        host = jax.tree.map(np.asarray, dict(arrays))
        for i, prompt_id in enumerate(host["prompt_ids"].tolist()):
            prompt = Prompt(tokens=host["prompt_tokens"][i], mask=host["prompt_mask"][i])
            kept = [next(records) for _ in range(host["counts"][i])]
            self._buffers[prompt_id] = PromptBuffer(prompt, kept)


class _Turns:
    """Members in random order, each once before any comes again."""

    def __init__(self, members: Iterable[int] = (), left: Iterable[int] = ()) -> None:
        self._members = dict.fromkeys(members)  # a set that keeps its order
        self._left = list(left)

    def join(self, rng: np.random.Generator, member: int) -> None:
        """A new member takes a random place in the round that is under way."""
        if member not in self._members:
            self._members[member] = None
            self._left.insert(int(rng.integers(len(self._left) + 1)), member)

    def next(self, rng: np.random.Generator, eligible: Any) -> int | None:
        """Whose turn it is among the eligible; the others lose theirs. None where there is none."""
        for _ in range(2):  # what is left of this round, then one whole round
            while self._left:
                member = self._left.pop()
                if eligible(member):
                    return member
            self._left = [int(i) for i in rng.permutation(list(self._members))]
        return None

    def state(self) -> dict[str, list[int]]:
        return {"members": list(self._members), "left": list(self._left)}
