"""What a step of training says of itself, as numbers."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from jaxrl.actors import ActorStatistics, Result
from jaxrl.learner import Metrics
from jaxrl.sync import Published
from jaxrl.types import Rollouts


def summarise(rollouts: Rollouts, metrics: Metrics) -> dict[str, float]:
    """Metrics of one step as numbers; statistics of the policy's own completions.

    Completions that the reference policy wrote are training data, not behaviour: they are
    left out of the means.
    """
    own = np.asarray(rollouts.policy_version[:, :, 0] >= 0)
    reward, cost = np.asarray(rollouts.reward), np.asarray(rollouts.cost)
    lengths = np.asarray(rollouts.lengths)
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if not own.any():
        return values
    return values | {
        "reward": float(reward[own].mean()),
        "cost": float(cost[own].mean()),
        "safety": float((cost[own] <= 0).mean()),
        "length": float(lengths[own].mean()),
    }


def staleness(rollouts: Rollouts, version: int) -> dict[str, float]:
    """Mean, maximum and shares of the tokens' ages, in versions; of no token of the policy: {}.

    Tokens of the frozen reference policy have no age and are left out.
    """
    written = np.asarray(rollouts.policy_version)
    ages = version - written[np.asarray(rollouts.mask) & (written >= 0)]
    if not ages.size:
        return {}
    values, counts = np.unique(ages, return_counts=True)
    shares = {f"staleness_{v}": float(n / ages.size) for v, n in zip(values, counts, strict=True)}
    return {"staleness": float(ages.mean()), "staleness_max": float(ages.max())} | shares


def observed(
    actors: Mapping[str, ActorStatistics],
    *,
    refused: Mapping[str, int],
    results: Sequence[Result],
    published: Published | None,
) -> dict[str, float]:
    """What a user watches of the two sides of an asynchronous run.

    Args:
      actors: what each has done so far.
      refused: items so far, by reason.
      results: that came in since the last step.
      published: what a publication cost that has become complete since; None: none has.
    """
    seen = {f"refused_{reason}": float(count) for reason, count in refused.items()}
    seen["duplicates"] = float(sum(actor.duplicates for actor in actors.values()))
    seen["restarts"] = float(sum(actor.restarts for actor in actors.values()))
    if actors:
        shares = [actor.idle_share for actor in actors.values()]
        seen["actor_idle_share"] = float(np.mean(shares))
    if results:
        pauses = [result.timings.paused_s for result in results]
        seen["actor_pause_per_item_s"] = float(np.mean(pauses))
    if published is not None:
        seen |= {
            "sync_bytes": float(published.size_bytes),
            "sync_density": published.density,
            "sync_s": published.seconds,
        }
    return seen
