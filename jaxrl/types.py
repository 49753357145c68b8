"""The records that the parts of `jaxrl` exchange: frozen, shape-annotated pytrees.

Axes, everywhere in the package: B prompts, G completions per prompt, P prompt tokens,
T completion tokens, V vocabulary, D width, H value heads.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32


class _Record:
    """Adds `replace` to the frozen records below."""

    def replace(self, **changes: Any) -> Self:
        return replace(self, **changes)  # type: ignore[type-var]  # every subclass is a dataclass


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Prompts(_Record):
    """A batch of prompts, padded on the left so that generation starts at one column.

    Attributes:
      tokens: token ids; what stands under a False of `mask` is padding.
      mask: True on real tokens. Every row ends in a real token.
      ids: index of each prompt in its data set; names per-prompt statistics and multipliers.
    """

    tokens: Int32[Array, "B P"]
    mask: Bool[Array, "B P"]
    ids: Int32[Array, " B"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PackedRows(_Record):
    """Rows in which several sequences stand one after the other.

    Attributes:
      tokens: token ids.
      segments: number of the sequence that a token belongs to, from 1 in every row; 0 on padding.
      mask: True on tokens that are trained on, none of which is the first of its sequence.
    """

    tokens: Int32[Array, "N S"]
    segments: Int32[Array, "N S"]
    mask: Bool[Array, "N S"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Completions(_Record):
    """What a policy wrote for `Prompts`: G completions for each.

    Attributes:
      tokens: token ids, padded on the right.
      mask: True on tokens that the policy chose, its end-of-sequence token included.
      log_probs: log-probability of each token under the policy that wrote it, of the full
        distribution at the sampling temperature, before top-k and top-p; 0 outside `mask`.
    """

    tokens: Int32[Array, "B G T"]
    mask: Bool[Array, "B G T"]
    log_probs: Float32[Array, "B G T"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Rollouts(_Record):
    """Scored completions: all that a learner needs to know of how its data came about.

    Attributes:
      prompts: the prompts.
      tokens, mask: as in `Completions`.
      behaviour_log_probs: of the policy that wrote the token, which may be an older version
        or the reference policy; see `Completions.log_probs`.
      reference_log_probs: of the frozen reference policy at the same temperature.
      policy_version: version of the policy that wrote each token; `REFERENCE_VERSION` marks
        the reference policy, 0 stands outside `mask`.
      rewards: helpfulness by name; algorithms maximise the entry "reward".
      costs: harm by name; a completion is safe when the entry "cost" is ≤ 0.
      greedy: "reward" and "cost" of the greedy completion of each prompt, for recipes that
        ask for one (ReMax).
      best_safe: the greatest "reward" of a safe completion that is known of each prompt, from a
        replay, where it may be older than these; −inf where none is known.
    """

    prompts: Prompts
    tokens: Int32[Array, "B G T"]
    mask: Bool[Array, "B G T"]
    behaviour_log_probs: Float32[Array, "B G T"]
    reference_log_probs: Float32[Array, "B G T"]
    policy_version: Int32[Array, "B G T"]
    rewards: Mapping[str, Float32[Array, "B G"]]
    costs: Mapping[str, Float32[Array, "B G"]]
    greedy: Mapping[str, Float32[Array, " B"]] | None = field(default=None)
    best_safe: Float32[Array, " B"] | None = field(default=None)

    @property
    def reward(self) -> Float32[Array, "B G"]:
        return self.rewards["reward"]

    @property
    def cost(self) -> Float32[Array, "B G"]:
        return self.costs["cost"]

    @property
    def lengths(self) -> Int32[Array, "B G"]:
        return jnp.sum(self.mask, axis=-1, dtype=jnp.int32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PolicyOutput(_Record):
    """What a model says of the completions of a batch of rollouts.

    Attributes:
      log_probs: of each completion token, at the sampling temperature; 0 outside the mask.
      entropy: of the full distribution at each completion token, in nats.
      values: value heads at the state *before* each completion token, in the order
        ("reward", "cost"); None for a recipe without critic.
    """

    log_probs: Float32[Array, "B G T"]
    entropy: Float32[Array, "B G T"]
    values: Float32[Array, "B G T H"] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Targets(_Record):
    """What a recipe makes of rollouts before any gradient.

    Attributes:
      advantages: of each token, KL and penalty applied; 0 on padding.
      scores: the effective reward of each completion, penalty applied, KL not.
      returns: what the value heads regress on; None without critic.
      old_values: the value heads' output when the rollouts came in; None without critic.
      proximal_log_probs: of the policy before the update, where the objective corrects for a
        behaviour policy that was another one; else None.
    """

    advantages: Float32[Array, "B G T"]
    scores: Float32[Array, "B G"]
    returns: Float32[Array, "B G T H"] | None = None
    old_values: Float32[Array, "B G T H"] | None = None
    proximal_log_probs: Float32[Array, "B G T"] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class MultiplierState(_Record):
    """What a constraint remembers between steps.

    Attributes:
      value: λ (the raw u for `Bounded`): one number, or one for each prompt.
      momentum: of the raw multiplier's SGD; `Bounded` only.
      window: the latest episode statistics, newest last; the first W − count places are empty.
      count: episodes in the window.
      step: updates made so far.
    """

    value: Float32[Array, "*N"]
    momentum: Float32[Array, "*N"]
    window: Float32[Array, " W"]
    count: Int32[Array, ""]
    step: Int32[Array, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LearnerState(_Record):
    """Everything that a step changes, and all that a checkpoint must hold.

    Attributes:
      params: {"policy": …} and, for recipes with value heads, {"critic": …}.
      opt_state: the optimiser's.
      recipe: the recipe's multipliers.
      step: updates done so far; the version of the policy.
    """

    params: Mapping[str, Any]
    opt_state: Any
    recipe: Any
    step: Int32[Array, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SupervisedState(_Record):
    """What a step of supervised fine-tuning changes and a checkpoint holds.

    Attributes:
      params: the decoder's.
      opt_state: the optimiser's.
      step: updates done so far.
    """

    params: Any
    opt_state: Any
    step: Int32[Array, ""]


REFERENCE_VERSION = -1
"""`Rollouts.policy_version` of tokens that the reference policy wrote."""
