"""Constraints: how harm enters the advantages, and how its multiplier λ moves.

A completion is safe when its cost C ≤ 0. Two families matter here:

* `Lagrangian` constrains the *mean* cost (Safe RLHF, arXiv:2310.12773): very safe prompts pay
  for unsafe ones.
* `Rectified` constrains {C}⁺ = max(C, 0), so that nothing can be paid for
  (RePO, arXiv:2410.19933). What that paper leaves open is a field of the class.

`FixedPenalty` keeps λ constant (reward shaping; CS-RLHF, arXiv:2510.03520), `Bounded` squashes
it (arXiv:2310.04373), `Unconstrained` is plain reinforcement learning.

Each choice offers the same four things: `init` and `update` of the multiplier's state, `mix`
for algorithms with a cost critic, and `penalised` for those without.
"""

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from jaxrl.types import REFERENCE_VERSION, MultiplierState, Rollouts

Rectify = Literal["sample", "prompt"]

# ------------------------------------------------------------------------ pure functions


def rectified(cost: Float[Array, "B G"], *, margin: float, rectify: Rectify) -> Float[Array, "B G"]:
    """What each completion adds to the rectified cost, C⁺.

    "sample": {C + δ}⁺, so that the mean is E_x E_y {C + δ}⁺;
    "prompt": (C + δ)·1{mean_G C + δ > 0}, so that the mean is E_x {E_y C + δ}⁺, with its
    gradient. With one completion a prompt the two agree.

    Args:
      cost: C, safe when ≤ 0.
      margin: δ ≥ 0; asks for C ≤ −δ.
      rectify: see above.

    >>> rectified(jnp.array([[-3.0, -1.0], [0.0, 2.0]]), margin=0.0, rectify="sample").mean()
    Array(0.5, dtype=float32)
    """
    shifted = cost + margin
    if rectify == "sample":
        return jnp.maximum(shifted, 0.0)
    violated = jnp.mean(shifted, axis=-1, keepdims=True) > 0.0
    return jnp.where(violated, shifted, 0.0)


def bounded_penalty(
    reward: Float[Array, " G"],
    violation: Float[Array, " G"],
    multiplier: Float[Array, ""],
    *,
    kl_coef: float | Float[Array, ""],
    bound: float,
    best_safe: Float[Array, ""] | None = None,
) -> Float[Array, " G"]:
    """The penalty λ·C⁺ of one group, held to what is needed and no more.

    p = min( λ·C⁺, {R − b}⁺ + κ·β ),  b = the best reward among the safe completions of the
    group and those known of its prompt (the group's least reward where there is none).

    So R − p never falls more than κ nats (κβ in reward units) below both R and b. For the
    target π ∝ π_ref·exp((R − p)/β) a large λ then means P(unsafe)/P(y_b) ≤
    e^(−κ)·π_ref(unsafe)/π_ref(y_b), whatever the scale of R: the temptation {R − b}⁺ is taken
    away whole, and what remains is a fixed number of nats. See docs/recommended_repo.md.

    Args:
      reward: R, in reward units.
      violation: C⁺ ≥ 0, in cost units; 0 marks a safe completion.
      multiplier: λ ≥ 0, reward units per cost unit.
      kl_coef: β, reward units per nat.
      bound: κ, nats.
      best_safe: the best reward known of a safe completion of the prompt, −inf for none. With
        it the penalty, and so the target, does not depend on who happens to be in the group.

    >>> bounded_penalty(jnp.array([2.0, 0.5]), jnp.array([1.0, 0.0]), jnp.array(100.0),
    ...                 kl_coef=0.1, bound=10.0).tolist()
    [2.5, 0.0]
    """
    best = jnp.max(jnp.where(violation <= 0.0, reward, -jnp.inf))
    if best_safe is not None:
        best = jnp.maximum(best, best_safe)
    base = jnp.where(jnp.isfinite(best), best, jnp.min(reward))
    ceiling = jnp.maximum(reward - base, 0.0) + bound * kl_coef
    return jnp.minimum(multiplier * violation, ceiling)


def bounded_mix(
    raw: Float[Array, " N"],
    base: Float[Array, "*shape"],
    others: Float[Array, "N *shape"],
    *,
    squash: Literal["sigmoid", "tanh"] = "sigmoid",
) -> Float[Array, "*shape"]:
    """A = (N − Σ s_i)·A_0 + Σ s_i·A_i with s = σ(u) or tanh(u)   (arXiv:2310.04373).

    >>> bounded_mix(jnp.array([0.0, 1.0]), jnp.array(0.2), jnp.array([1.0, -0.5])).round(6)
    Array(0.288259, dtype=float32)
    """
    weights = _SQUASH[squash](raw)
    return (raw.shape[0] - jnp.sum(weights)) * base + jnp.tensordot(weights, others, axes=1)


_SQUASH = {"sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh}


def push_window(
    window: Float[Array, " W"],
    count: Int32[Array, ""],
    values: Float[Array, " n"],
    valid: Bool[Array, " n"],
) -> tuple[Float[Array, " W"], Int32[Array, ""]]:
    """Appends the valid values to a first-in-first-out window that fills from its end.

    Returns:
      The window, newest last, and how many of its places are taken.

    >>> push_window(jnp.zeros(3), jnp.int32(0), jnp.array([1.0, 9.0, 2.0]),
    ...             jnp.array([True, False, True]))[0].tolist()
    [0.0, 1.0, 2.0]
    """
    size = window.shape[0]
    joined = jnp.concatenate([window, jnp.where(valid, values, 0.0)])
    taken = jnp.concatenate([jnp.arange(size) >= size - count, valid])
    order = jnp.argsort(taken, stable=True)  # the empty places go first
    kept = jnp.where(taken, joined, 0.0)[order][-size:]
    return kept, jnp.minimum(count + jnp.sum(valid, dtype=jnp.int32), size)


def written_by_policy(rollouts: Rollouts, *, max_lag: int | None = None) -> Bool[Array, "B G"]:
    """True on completions of the policy itself, False on the reference's.

    Args:
      rollouts: a batch.
      max_lag: versions by which a completion may lie behind the newest of the batch, so that
        replayed ones do not count as what the policy does now; None for any number.
    """
    own = (rollouts.policy_version != REFERENCE_VERSION) | ~rollouts.mask
    if max_lag is not None:
        newest = jnp.max(rollouts.policy_version, where=rollouts.mask, initial=REFERENCE_VERSION)
        own &= (rollouts.policy_version >= newest - max_lag) | ~rollouts.mask
    return jnp.all(own, axis=-1)


def _masked_mean(values: jax.Array, mask: jax.Array, axis: int | None = None) -> jax.Array:
    return jnp.sum(values, axis=axis, where=mask) / jnp.maximum(jnp.sum(mask, axis=axis), 1)


# -------------------------------------------------------------------------------- choices


class AbstractConstraint(abc.ABC):
    """The interface of the choices below; all of them are frozen dataclasses."""

    @property
    def cost_critic(self) -> bool:
        """Whether, beside a reward critic, the cost has one of its own."""
        return False

    def init(self, num_prompts: int) -> MultiplierState:
        """The state before the first step; `num_prompts` counts the data set's prompts."""
        del num_prompts
        return _state(0.0, (), 1)

    def multiplier(self, state: MultiplierState, ids: Int32[Array, " B"]) -> Float[Array, "B 1"]:
        """λ for each prompt of a batch."""
        value = state.value if state.value.ndim == 0 else state.value[ids]
        return jnp.broadcast_to(value, ids.shape)[:, None]

    @abc.abstractmethod
    def signal(self, cost: Float[Array, "B G"]) -> Float[Array, "B G"]:
        """The cost that the penalty multiplies and a cost critic learns."""

    def penalised(
        self,
        multiplier: Float[Array, "B 1"],
        reward: Float[Array, "B G"],
        cost: Float[Array, "B G"],
        *,
        kl_coef: float | Float[Array, ""],
        best_safe: Float[Array, " B"] | None = None,
    ) -> Float[Array, "B G"]:
        """The effective reward R − λ·signal(C), for algorithms without a cost critic.

        Args:
          multiplier: λ of each prompt.
          reward: R.
          cost: C.
          kl_coef: β, for penalties that are measured in nats.
          best_safe: see `Rollouts.best_safe`; for penalties that are bounded.
        """
        del kl_coef, best_safe
        return reward - multiplier * self.signal(cost)

    def mix(
        self,
        multiplier: Float[Array, "B 1"],
        advantages: Float[Array, "B G T"],
        cost_advantages: Float[Array, "B G T"],
        cost: Float[Array, "B G"],
    ) -> Float[Array, "B G T"]:
        """One advantage out of the reward's and the cost's."""
        del cost
        multiplier = multiplier[..., None]
        return (advantages - multiplier * cost_advantages) / (1.0 + multiplier)

    def update(
        self, state: MultiplierState, rollouts: Rollouts
    ) -> tuple[MultiplierState, Mapping[str, jax.Array]]:
        """The multiplier's step on the policy's own completions."""
        del rollouts
        return state.replace(step=state.step + 1), {"multiplier": jnp.mean(state.value)}


def _state(value: float, shape: tuple[int, ...], window: int) -> MultiplierState:
    return MultiplierState(
        value=jnp.full(shape, value, jnp.float32),
        momentum=jnp.zeros(shape, jnp.float32),
        window=jnp.zeros((window,), jnp.float32),
        count=jnp.zeros((), jnp.int32),
        step=jnp.zeros((), jnp.int32),
    )


@dataclass(frozen=True, kw_only=True)
class Unconstrained(AbstractConstraint):
    """No constraint: costs are recorded, never used."""

    def signal(self, cost: Float[Array, "B G"]) -> Float[Array, "B G"]:
        return jnp.zeros_like(cost)


@dataclass(frozen=True, kw_only=True)
class FixedPenalty(AbstractConstraint):
    """R − λ·C or R − λ·{C + δ}⁺ with constant λ and one critic.

    Attributes:
      coef: λ. 1 is safe-rlhf's reward shaping.
      rectify_cost: False: raw C (reward shaping); True: {C + δ}⁺ (CS-RLHF).
      margin: δ, in cost units.
    """

    coef: float = 1.0
    rectify_cost: bool = False
    margin: float = 0.0

    def __post_init__(self) -> None:
        _require_non_negative(self, "coef", "margin")

    def init(self, num_prompts: int) -> MultiplierState:
        del num_prompts
        return _state(self.coef, (), 1)

    def signal(self, cost: Float[Array, "B G"]) -> Float[Array, "B G"]:
        if not self.rectify_cost:
            return cost + self.margin
        return rectified(cost, margin=self.margin, rectify="sample")


@dataclass(frozen=True, kw_only=True)
class _Dual(AbstractConstraint):
    """A multiplier that follows a statistic of the costs.

    Attributes:
      init_value: λ before the first step.
      rate: η, step size of the multiplier.
      max_value: λ_max; None for no cap.
      rule: "additive": λ ← clip(λ + η·s, 0, λ_max) with the batch's statistic s;
        "log_sgd": log λ ← min(log λ + η·λ·s̄, log λ_max) with its mean s̄ over `window`
        episodes (safe-rlhf).
      window: episodes in the moving mean of "log_sgd"; not for `per_prompt`, whose statistic
        is that of each prompt's own completions in the batch.
      delay: steps before λ first moves.
      per_prompt: one λ(x) for each prompt of the data set instead of a common one.
      margin: δ, in cost units.
      max_lag: versions by which a completion may lie behind the newest of its batch and still
        count for the statistic, for batches with replayed completions; None counts all.
    """

    init_value: float = 1.0
    rate: float = 0.1
    max_value: float | None = 5.0
    rule: Literal["additive", "log_sgd"] = "additive"
    window: int = 128
    delay: int = 0
    per_prompt: bool = False
    margin: float = 0.0
    max_lag: int | None = None

    def __post_init__(self) -> None:
        _require_non_negative(self, "init_value", "rate", "delay")
        if self.max_lag is not None:
            _require_non_negative(self, "max_lag")
        _require_choice(self, "rule", "additive", "log_sgd")
        if self.max_value is not None and self.max_value < self.init_value:
            raise ValueError(
                f"max_value must be None or at least init_value: "
                f"{self.max_value=}, {self.init_value=}"
            )
        if self.window < 1:
            raise ValueError(f"window must be at least 1: {self.window!r}")
        if self.rule == "log_sgd" and self.init_value == 0.0:
            raise ValueError(
                "rule='log_sgd' multiplies λ and cannot leave 0: init_value=0.0; "
                "start at a positive init_value or use rule='additive'"
            )

    @property
    def cost_critic(self) -> bool:
        return True

    def init(self, num_prompts: int) -> MultiplierState:
        shape = (num_prompts,) if self.per_prompt else ()
        return _state(self.init_value, shape, self.window)

    def statistic(self, cost: Float[Array, "B G"]) -> Float[Array, "B G"]:
        """What each episode adds to the constraint's left-hand side."""
        return self.signal(cost)

    def update(
        self, state: MultiplierState, rollouts: Rollouts
    ) -> tuple[MultiplierState, Mapping[str, jax.Array]]:
        statistic = self.statistic(rollouts.cost)
        own = written_by_policy(rollouts, max_lag=self.max_lag)
        window, count = push_window(
            state.window, state.count, statistic.reshape(-1), own.reshape(-1)
        )
        if self.per_prompt:
            violation = (
                jnp.zeros_like(state.value)
                .at[rollouts.prompts.ids]
                .add(_masked_mean(statistic, own, axis=-1))
            )
        elif self.rule == "log_sgd":
            violation = jnp.sum(window) / jnp.maximum(count, 1)
        else:
            violation = _masked_mean(statistic, own)
        moved = self._step(state.value, violation)
        value = jnp.where(state.step >= self.delay, moved, state.value)
        new = state.replace(value=value, window=window, count=count, step=state.step + 1)
        return new, {"multiplier": jnp.mean(value), "violation": jnp.mean(violation)}

    def _step(self, value: jax.Array, violation: jax.Array) -> jax.Array:
        if self.rule == "additive":
            moved = jnp.maximum(value + self.rate * violation, 0.0)
        else:
            moved = value * jnp.exp(self.rate * value * violation)
        return moved if self.max_value is None else jnp.minimum(moved, self.max_value)


@dataclass(frozen=True, kw_only=True)
class Lagrangian(_Dual):
    """E[C] ≤ d with a learned λ: PPO-Lagrangian as safe-rlhf has it (log-SGD, window 128).

    The threshold d is −`margin`, 0 by default.
    """

    rule: Literal["additive", "log_sgd"] = "log_sgd"

    def signal(self, cost: Float[Array, "B G"]) -> Float[Array, "B G"]:
        return cost

    def statistic(self, cost: Float[Array, "B G"]) -> Float[Array, "B G"]:
        return cost + self.margin


@dataclass(frozen=True, kw_only=True)
class Rectified(_Dual):
    """RePO: E{C + δ}⁺ ≤ 0, with a multiplier that never falls.

    The paper states the objective, not the code; each field below is one of the questions it
    leaves open. The defaults are plain RePO: a switch on each sample, the rest as in safe-rlhf.
    Without a cost critic the penalty is part of the reward of every sample, as in the exact
    gradient: `cost_critic_target`, `cost_on`, `unsafe_reward` and `batch_mean` then say nothing.

    Attributes:
      rectify: {·}⁺ of each "sample", or of each "prompt"'s mean over its group.
      switch: an unsafe "sample" gets the cost term, or every sample of an unsafe "batch" (one
        whose mean cost is positive, as in CRPO).
      cost_critic_target: the cost critic learns the "raw" C or the "rectified" {C + δ}⁺.
      cost_on: the cost term acts on "unsafe" samples (the switch) or on "all". "all" with
        "rectified" is the exact gradient of the Lagrangian.
      unsafe_reward: whether unsafe samples keep their reward term.
      normalise: the advantage is divided by 1 + λ on "unsafe" samples, on "all", or on "none".
      batch_mean: the loss is a mean over "all" samples, or the sum of the means "by_subset"
        (safe, unsafe), which gives more weight to the rarer.
      bound: κ of `bounded_penalty` in nats, for algorithms without a critic; None: no bound.
      best_of: the bound is measured from the best safe completion known of the "prompt", where
        the batch says so, or of the "group" alone.
    """

    rectify: Rectify = "sample"
    switch: Literal["sample", "batch"] = "sample"
    cost_critic_target: Literal["raw", "rectified"] = "raw"
    cost_on: Literal["unsafe", "all"] = "unsafe"
    unsafe_reward: bool = True
    normalise: Literal["unsafe", "all", "none"] = "unsafe"
    batch_mean: Literal["all", "by_subset"] = "all"
    bound: float | None = None
    best_of: Literal["prompt", "group"] = "prompt"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_non_negative(self, "margin")
        _require_choice(self, "rectify", "sample", "prompt")
        _require_choice(self, "switch", "sample", "batch")
        _require_choice(self, "cost_critic_target", "raw", "rectified")
        _require_choice(self, "cost_on", "unsafe", "all")
        _require_choice(self, "normalise", "unsafe", "all", "none")
        _require_choice(self, "batch_mean", "all", "by_subset")
        _require_choice(self, "best_of", "prompt", "group")
        if self.bound is not None and self.bound <= 0.0:
            raise ValueError(f"bound must be a positive number of nats, or None: {self.bound!r}")

    def unsafe(self, cost: Float[Array, "B G"]) -> Bool[Array, "B G"]:
        """Which samples count as unsafe, by `switch` and `rectify`, the margin included."""
        shifted = cost + self.margin
        if self.switch == "batch":
            return jnp.broadcast_to(jnp.mean(shifted) > 0.0, cost.shape)
        if self.rectify == "prompt":
            shifted = jnp.broadcast_to(jnp.mean(shifted, axis=-1, keepdims=True), cost.shape)
        return shifted > 0.0

    def signal(self, cost: Float[Array, "B G"]) -> Float[Array, "B G"]:
        if self.cost_critic_target == "raw":
            return cost + self.margin
        return self.statistic(cost)

    def statistic(self, cost: Float[Array, "B G"]) -> Float[Array, "B G"]:
        return rectified(cost, margin=self.margin, rectify=self.rectify)

    def penalised(
        self,
        multiplier: Float[Array, "B 1"],
        reward: Float[Array, "B G"],
        cost: Float[Array, "B G"],
        *,
        kl_coef: float | Float[Array, ""],
        best_safe: Float[Array, " B"] | None = None,
    ) -> Float[Array, "B G"]:
        """R − λ·{C + δ}⁺, bounded if asked for, divided by `normalise`."""
        violation = self.statistic(cost)
        bound = self.bound
        if bound is None:
            penalty = multiplier * violation
        else:
            if best_safe is None or self.best_of == "group":
                best_safe = jnp.full(reward.shape[:1], -jnp.inf, reward.dtype)
            penalty = jax.vmap(
                lambda r, v, m, b: bounded_penalty(
                    r, v, m, kl_coef=kl_coef, bound=bound, best_safe=b
                )
            )(reward, violation, multiplier[:, 0], best_safe)
        return (reward - penalty) / self._divisor(multiplier, self.unsafe(cost))

    def mix(
        self,
        multiplier: Float[Array, "B 1"],
        advantages: Float[Array, "B G T"],
        cost_advantages: Float[Array, "B G T"],
        cost: Float[Array, "B G"],
    ) -> Float[Array, "B G T"]:
        unsafe = self.unsafe(cost)
        divisor = self._divisor(multiplier, unsafe)
        reward_weight = jnp.where(unsafe & (not self.unsafe_reward), 0.0, 1.0)
        cost_weight = jnp.where(unsafe | (self.cost_on == "all"), multiplier, 0.0)
        scale = self._sample_weight(unsafe) / divisor
        return (scale * reward_weight)[..., None] * advantages - (scale * cost_weight)[
            ..., None
        ] * cost_advantages

    def _divisor(self, multiplier: jax.Array, unsafe: jax.Array) -> jax.Array:
        if self.normalise == "none":
            return jnp.ones(unsafe.shape)
        applies = unsafe if self.normalise == "unsafe" else jnp.ones_like(unsafe)
        return jnp.where(applies, 1.0 + multiplier, 1.0)

    def _sample_weight(self, unsafe: jax.Array) -> jax.Array:
        if self.batch_mean == "all":
            return jnp.ones(unsafe.shape)
        size, count = unsafe.size, jnp.sum(unsafe)
        both = (count > 0) & (count < size)
        subset = jnp.where(unsafe, count, size - count)
        weight = size / jnp.maximum(subset, 1)
        return jnp.where(both, weight, 1.0)


@dataclass(frozen=True, kw_only=True)
class Bounded(AbstractConstraint):
    """Multipliers inside (0, 1) or (−1, 1): constrained RLHF with the value v = −C ≥ −d.

    A = (1 − s)·A_R − s·A_C with s = σ(u) (inequality) or tanh(u) (equality); u follows SGD
    with momentum on s·(mean(−C) − θ)   (arXiv:2310.04373; its defaults).

    Attributes:
      squash: "sigmoid" or "tanh".
      init_value: u before the first step; s(0) is ½ or 0.
      rate, momentum, grad_clip: of the SGD on u.
      margin: asks for E[C] ≤ −margin.
    """

    squash: Literal["sigmoid", "tanh"] = "sigmoid"
    init_value: float = 0.0
    rate: float = 0.1
    momentum: float = 0.1
    grad_clip: float = 0.5
    margin: float = 0.0

    def __post_init__(self) -> None:
        _require_choice(self, "squash", "sigmoid", "tanh")
        _require_non_negative(self, "rate", "momentum", "grad_clip")

    @property
    def cost_critic(self) -> bool:
        return True

    def init(self, num_prompts: int) -> MultiplierState:
        del num_prompts
        return _state(self.init_value, (), 1)

    def multiplier(self, state: MultiplierState, ids: Int32[Array, " B"]) -> Float[Array, "B 1"]:
        """s, the squashed weight; not λ = s/(1 − s)."""
        return jnp.broadcast_to(_SQUASH[self.squash](state.value), (ids.shape[0], 1))

    def signal(self, cost: Float[Array, "B G"]) -> Float[Array, "B G"]:
        return cost

    def penalised(
        self,
        multiplier: Float[Array, "B 1"],
        reward: Float[Array, "B G"],
        cost: Float[Array, "B G"],
        *,
        kl_coef: float | Float[Array, ""],
        best_safe: Float[Array, " B"] | None = None,
    ) -> Float[Array, "B G"]:
        del kl_coef, best_safe
        return (1.0 - multiplier) * reward - multiplier * cost

    def mix(
        self,
        multiplier: Float[Array, "B 1"],
        advantages: Float[Array, "B G T"],
        cost_advantages: Float[Array, "B G T"],
        cost: Float[Array, "B G"],
    ) -> Float[Array, "B G T"]:
        del cost
        weight = multiplier[..., None]
        return (1.0 - weight) * advantages - weight * cost_advantages

    def update(
        self, state: MultiplierState, rollouts: Rollouts
    ) -> tuple[MultiplierState, Mapping[str, jax.Array]]:
        mean_cost = _masked_mean(rollouts.cost, written_by_policy(rollouts))
        gradient = jax.grad(_SQUASH[self.squash])(state.value) * -(mean_cost + self.margin)
        gradient = jnp.clip(gradient, -self.grad_clip, self.grad_clip)
        momentum = self.momentum * state.momentum + gradient
        value = state.value - self.rate * momentum
        new = state.replace(value=value, momentum=momentum, step=state.step + 1)
        return new, {"multiplier": _SQUASH[self.squash](value), "violation": mean_cost}


Constraint = Unconstrained | FixedPenalty | Lagrangian | Rectified | Bounded
"""What a recipe may name as its `constraint`."""


def _require_non_negative(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not value >= 0.0:
            raise ValueError(f"{name} must not be negative: {value!r}")


def _require_choice(config: object, name: str, *allowed: str) -> None:
    value = getattr(config, name)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}: {value!r}")
