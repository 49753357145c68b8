"""Rewards and costs of completions, beside the policy that wrote them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.tokenizers import Tokenizer
from jaxrl.types import Completions, Rollouts

Scores = Mapping[str, np.ndarray]
Evaluator = Callable[..., Sequence[float] | np.ndarray]


class NonFiniteScores(ValueError):
    """A reward or cost is NaN or infinite; `rows` says for which prompts and completions."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]):
        self.rows = list(rows)
        first = self.rows[0]
        super().__init__(
            f"rewards and costs must be finite: {len(self.rows)} of this step's are not, first "
            f"{first['name']}={first['value']} for the completion {first['completion'][:60]!r} "
            f"of the prompt {first['prompt'][:60]!r}; the step is refused and nothing has changed"
        )


@runtime_checkable
class HasTexts(Protocol):
    """What knows the text of every prompt id, such as `jaxrl.data.batches.PromptSet`."""

    @property
    def texts(self) -> tuple[str, ...]: ...


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Reads completions and scores them.

    Attributes:
      tokenizer: turns tokens into the text that is scored.
      prompts: the texts that prompt ids point to.
      rewards, costs: plain functions `f(prompts, completions, **columns)` by name, at least
        "reward" and "cost".
    """

    tokenizer: Tokenizer
    prompts: HasTexts
    rewards: Mapping[str, Evaluator]
    costs: Mapping[str, Evaluator]

    def texts(self, ids: np.ndarray, tokens: np.ndarray) -> tuple[list[str], list[str]]:
        """Prompts and completions as text, row by row of [B, G]."""
        groups = tokens.shape[1]
        prompts = [self.prompts.texts[i] for i in ids for _ in range(groups)]
        return prompts, self.tokenizer.decode_batch(tokens.reshape(-1, tokens.shape[-1]))

    def score(self, ids: np.ndarray, tokens: np.ndarray) -> tuple[Scores, Scores]:
        """Rewards and costs, float32 [B, G] by name.

        Raises:
          NonFiniteScores: a score is NaN or infinite.
          ValueError: a function gives more or fewer numbers than there are completions.
        """
        scores = self.unchecked(ids, tokens)
        self.check(ids, tokens, *scores)
        return scores

    def unchecked(self, ids: np.ndarray, tokens: np.ndarray) -> tuple[Scores, Scores]:
        """What `score` gives, finite or not."""
        prompts, completions = self.texts(ids, tokens)
        results = []
        for functions in (self.rewards, self.costs):
            scores = {}
            for name, function in functions.items():
                flat = np.asarray(function(prompts, completions), np.float32)
                if flat.shape != (len(completions),):
                    raise ValueError(
                        f"{name} must give one number for each of {len(completions)} completions, "
                        f"got shape {flat.shape}; score every row, with 0 where nothing applies"
                    )
                scores[name] = flat.reshape(tokens.shape[:2])
            results.append(scores)
        return results[0], results[1]

    def check(self, ids: np.ndarray, tokens: np.ndarray, *scores: Scores) -> None:
        """Refuses scores, of `unchecked`, that are not finite.

        Raises:
          NonFiniteScores: there are such; it names their prompts and completions.
        """
        found = [(name, x) for by_name in scores for name, x in by_name.items()]
        if all(np.isfinite(x).all() for _, x in found):
            return
        prompts, completions = self.texts(ids, tokens)
        raise NonFiniteScores([
            {"name": name, "value": str(x.flat[i]), "prompt": prompts[i],
             "completion": completions[i], "prompt_id": int(ids[i // tokens.shape[1]])}
            for name, x in found
            for i in np.flatnonzero(~np.isfinite(x))
        ])  # fmt: skip

    def __call__(
        self,
        rollouts: Rollouts,
        greedy: Completions | None = None,
        *,
        score: Callable[[np.ndarray, np.ndarray], tuple[Scores, Scores]] | None = None,
    ) -> Rollouts:
        """The rollouts with their scores, and those of the greedy completions.

        Args:
          rollouts: without scores.
          greedy: the greedy completions of the same prompts.
          score: what scores in the place of `score`, for all processes of a learner together.
        """
        score, ids = score or self.score, np.asarray(rollouts.prompts.ids)
        rewards, costs = score(ids, np.asarray(rollouts.tokens))
        baseline = None
        if greedy is not None:
            greedy_rewards, greedy_costs = score(ids, np.asarray(greedy.tokens))
            scored = {"reward": greedy_rewards["reward"], "cost": greedy_costs["cost"]}
            baseline = {name: jnp.asarray(value[:, 0]) for name, value in scored.items()}
        arrays = jax.tree.map(jnp.asarray, (dict(rewards), dict(costs)))
        return rollouts.replace(rewards=arrays[0], costs=arrays[1], greedy=baseline)
