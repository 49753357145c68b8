"""Algorithms by name. Each is a composition: advantage × constraint × objective × KL.

    rollouts ─► targets (no gradient) ─► loss (gradient) ─► update (multiplier)

The same code trains a language model and the table of the exact benchmark (there T = 1).

>>> get("repo").value_heads
('reward', 'cost')
>>> get("repo_tb").value_heads
()
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl import advantages as adv
from jaxrl import objectives as obj
from jaxrl.constraints import (
    Constraint,
    FixedPenalty,
    Lagrangian,
    Rectified,
    Unconstrained,
)
from jaxrl.types import MultiplierState, PolicyOutput, Rollouts, Targets

State = MultiplierState
Metrics = dict[str, jax.Array]


@dataclass(frozen=True, kw_only=True)
class KL:
    """The anchor β·KL(π‖π_ref): the one place where it is configured.

    Attributes:
      coef: β, in reward units per nat; where it is annealed, β_0.
      placement: where it acts.
        "reward": in the reward, −β·kl_t at each token (summed over the completion when the
          baseline is a group's; exact, by the current policy, in trajectory balance);
        "reward_and_cost": in the reward as −β·kl_t and in the cost as +β·kl_t, so that its
          weight in (A_R − λ·A_C)/(1 + λ) is β at any λ (safe-rlhf); needs a cost critic;
        "token": added to each token's own advantage, not accumulated (ReMax's code);
        "loss": β·estimate in the loss (GRPO). On-policy, the gradient of k3 there is that of
          KL(π_ref‖π), not of KL(π‖π_ref), and that of k1 is zero in expectation: the fixed
          point is another one, with a weaker anchor.
      estimator: "k1" or "k3", of the placement "loss"; the others use k1.
      final_coef: β_f, where β is annealed; None keeps it at `coef`.
      anneal_steps: T, updates in which a straight line leads from β_0 to β_f.
      stop_step: T_stop, the update from which β is β_f, on that line or (TBA on TL;DR) before
        its end; None for the end.
    """

    coef: float = 0.05
    placement: Literal["reward", "reward_and_cost", "token", "loss"] = "reward"
    estimator: obj.Estimator = "k1"
    final_coef: float | None = None
    anneal_steps: int = 0
    stop_step: int | None = None

    def __post_init__(self) -> None:
        if not self.coef >= 0.0:
            raise ValueError(f"the KL coefficient must not be negative: {self.coef!r}")
        placements = ("reward", "reward_and_cost", "token", "loss")
        if self.placement not in placements:
            raise ValueError(
                f"KL placement must be one of {', '.join(placements)}: {self.placement!r}"
            )
        if self.estimator not in ("k1", "k3"):
            raise ValueError(f"KL estimator must be k1 or k3: {self.estimator!r}")
        if self.final_coef is None:
            return
        if not self.final_coef >= 0.0:
            raise ValueError(f"the final KL coefficient must not be negative: {self.final_coef!r}")
        if self.anneal_steps < 1 or not 1 <= self._stop <= self.anneal_steps + 1:
            raise ValueError(
                "a KL coefficient that is annealed needs anneal_steps ≥ 1 and stop_step between 1 "
                f"and anneal_steps + 1: {self.anneal_steps=}, {self.stop_step=}"
            )

    def at(self, update: int | Int[Array, ""]) -> float | Float[Array, ""]:
        """β of an update, counted from 1.

        β_0·(1 − (u − 1)/T) + β_f·(u − 1)/T while u < T_stop, else β_f   (TBA, arXiv:2503.18929)

        A traced `update` gives a traced β: a schedule compiles once.

        >>> schedule = KL(coef=1.0, final_coef=0.05, anneal_steps=128, stop_step=32)
        >>> [round(float(schedule.at(u)), 4) for u in (1, 2, 31, 32, 100)]
        [1.0, 0.9926, 0.7773, 0.05, 0.05]
        """
        if self.final_coef is None:
            return self.coef
        share = jnp.maximum(jnp.asarray(update) - 1, 0) / self.anneal_steps
        line = self.coef * (1.0 - share) + self.final_coef * share
        return jnp.where(jnp.asarray(update) < self._stop, line, self.final_coef)

    def constant(self, coef: float) -> "KL":
        """The same anchor with one β from beginning to end."""
        return dataclasses.replace(self, coef=coef, final_coef=None, anneal_steps=0, stop_step=None)

    @property
    def _stop(self) -> int:
        return self.anneal_steps if self.stop_step is None else self.stop_step

    @property
    def always_positive(self) -> bool:
        return min(self.coef, self.coef if self.final_coef is None else self.final_coef) > 0.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One algorithm.

    Attributes:
      name, summary: for tables and `--help`.
      advantage: the baseline.
      constraint: how cost enters, and its multiplier.
      objective: the policy's loss.
      kl: the anchor to the reference policy.
      group_size: G, completions of each prompt in one step.
      reference_share: share of the G completions that the frozen reference policy writes.
      replay_share: share of an update's completions that are not written for it but come from
        a replay; a synchronous trainer then writes that much less.
      epochs: passes over one batch of rollouts.
    """

    name: str
    summary: str
    advantage: adv.Advantage
    constraint: Constraint = field(default_factory=Unconstrained)
    objective: obj.Objective = field(default_factory=obj.ClippedSurrogate)
    kl: KL = field(default_factory=KL)
    group_size: int = 1
    reference_share: float = 0.0
    replay_share: float = 0.0
    epochs: int = 1

    def __post_init__(self) -> None:
        if self.group_size < 1 or self.epochs < 1:
            raise ValueError(
                f"group_size and epochs must be at least 1: {self.group_size=}, {self.epochs=}"
            )
        grouped = isinstance(self.advantage, (adv.LeaveOneOut, adv.GroupMean, adv.GroupNormalised))
        if grouped and self.group_size < 2:
            raise ValueError(
                f"{type(self.advantage).__name__} compares the completions of a "
                f"prompt and needs group_size ≥ 2: {self.group_size=}"
            )
        for share, writer in (
            ("reference_share", "the reference policy"),
            ("replay_share", "old policies"),
        ):
            value = getattr(self, share)
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{share} must lie in [0, 1): {value!r}")
            if value and not self.off_policy:
                raise ValueError(
                    f"completions of {writer} ({share} > 0) bias "
                    f"{type(self.objective).__name__}; use TrajectoryBalance, or {share}=0"
                )
        if self.off_policy and (
            isinstance(self.advantage, adv.GAE)
            or not self.kl.always_positive
            or self.kl.placement != "reward"
        ):
            raise ValueError(
                "trajectory balance wants no critic and a positive KL coefficient "
                f"placed in the reward: {self.advantage=}, {self.kl=}"
            )
        if self.kl.placement == "reward_and_cost" and "cost" not in self.value_heads:
            raise ValueError(
                "KL placement 'reward_and_cost' needs a cost critic: "
                f"{self.advantage=}, {self.constraint=}; place it in the reward"
            )
        bounded = isinstance(self.constraint, Rectified) and self.constraint.bound is not None
        if bounded and self.value_heads:
            raise ValueError(
                "a bounded penalty is defined for algorithms without critic: "
                f"{self.constraint=}; set bound=None or change the advantage"
            )
        switched = isinstance(self.constraint, Rectified) and self.constraint.normalise == "unsafe"
        if switched and not self.value_heads:
            raise ValueError(
                "normalise='unsafe' divides whole rewards of unsafe completions by 1 + λ where "
                f"there is no critic: {self.name}; use normalise='none' (or 'all')"
            )

    @property
    def off_policy(self) -> bool:
        """Whether completions of any policy and any age are as good: replay, the reference's."""
        return isinstance(self.objective, obj.TrajectoryBalance)

    @property
    def corrects(self) -> bool:
        """Whether the objective weighs completions by the policy before the update."""
        return (
            isinstance(self.objective, obj.ImportanceCorrected)
            and self.objective.correction != "none"
        )

    @property
    def value_heads(self) -> tuple[str, ...]:
        """Names of the critic's heads; () for an algorithm without critic."""
        if not isinstance(self.advantage, adv.GAE):
            return ()
        return ("reward", "cost") if self.constraint.cost_critic else ("reward",)

    @property
    def needs_greedy(self) -> bool:
        """Whether rollouts must hold the scores of a greedy completion."""
        return isinstance(self.advantage, adv.GreedyBaseline)

    @property
    def reference_samples(self) -> int:
        """How many of a group's completions the reference policy writes; they come last."""
        return round(self.group_size * self.reference_share)

    def fresh_prompts(self, prompts: int) -> int:
        """How many of the prompts of an update are answered anew; at least one."""
        return max(1, round(prompts * (1.0 - self.replay_share)))

    def init(self, num_prompts: int) -> State:
        """State before the first step, for a data set of `num_prompts` prompts."""
        return self.constraint.init(num_prompts)

    def targets(
        self,
        state: State,
        rollouts: Rollouts,
        values: Float[Array, "B G T H"] | None,
        *,
        log_probs: Float[Array, "B G T"] | None = None,
    ) -> Targets:
        """Advantages and returns; nothing here is differentiated.

        Args:
          state: multipliers, after this batch's `update`.
          rollouts: scored completions.
          values: the critic's heads before each token, in the order of `value_heads`.
          log_probs: of the policy before the update, for objectives that correct for another
            behaviour policy. The KL in rewards is then this policy's.

        Raises:
          ValueError: `values`, `log_probs` or `rollouts.greedy` is missing, or `values` has the
            wrong heads.
        """
        rollouts = jax.lax.stop_gradient(rollouts)
        if not self.corrects:
            log_probs = None
        elif log_probs is None:
            raise ValueError(
                f"{self.name} weighs completions by the policy before the update: pass its "
                "log_probs to `targets`"
            )
        multiplier = self.constraint.multiplier(state, rollouts.prompts.ids)
        kl_coef = self.kl.at(state.step)
        scores = self.constraint.penalised(
            multiplier,
            rollouts.reward,
            rollouts.cost,
            kl_coef=kl_coef,
            best_safe=rollouts.best_safe,
        )
        kl = kl_coef * _token_kl(rollouts, log_probs)
        if isinstance(self.advantage, adv.GAE):
            found = self._critic_targets(self.advantage, multiplier, scores, kl, rollouts, values)
        else:
            advantages = self._group_advantages(multiplier, scores, kl, kl_coef, rollouts)
            found = Targets(advantages=advantages, scores=scores)
        return found.replace(proximal_log_probs=log_probs)

    def loss(
        self, state: State, rollouts: Rollouts, targets: Targets, output: PolicyOutput
    ) -> tuple[Float[Array, ""], Metrics]:
        """The loss to minimise, critic included, and numbers worth watching."""
        targets = jax.lax.stop_gradient(targets)
        kl_coef = self.kl.at(state.step)
        policy_loss = self._policy_loss(kl_coef, rollouts, targets, output)
        metrics = _policy_metrics(rollouts, output) | {"policy_loss": policy_loss}
        if self.kl.final_coef is not None:
            metrics["kl_coef"] = jnp.asarray(kl_coef, jnp.float32)
        if isinstance(self.objective, obj.TrajectoryBalance):
            metrics["target_share"] = _target_share(kl_coef, rollouts, targets, output)
        if isinstance(self.objective, obj.ImportanceCorrected) and self.corrects:
            metrics |= _correction_metrics(self.objective, rollouts, targets)
        if targets.returns is None:
            return policy_loss, metrics
        assert isinstance(self.advantage, adv.GAE)
        assert targets.old_values is not None
        if output.values is None:
            raise ValueError(
                f"{self.name} has a critic, but the model gave no values; build it "
                f"with heads {self.value_heads}"
            )
        per_head = obj.clipped_value_loss(
            output.values,
            targets.old_values,
            targets.returns,
            clip_range=self.advantage.clip_range_value,
        )
        value_loss = obj.sequence_mean(jnp.sum(per_head, axis=-1), rollouts.mask)
        return (
            policy_loss + self.advantage.value_coef * value_loss,
            metrics | {"value_loss": value_loss},
        )

    def update(self, state: State, rollouts: Rollouts) -> tuple[State, Metrics]:
        """The multiplier's step; call it once for each batch of rollouts."""
        state, metrics = self.constraint.update(state, rollouts)
        return state, dict(metrics)

    # ------------------------------------------------------------------------- internals

    def _critic_targets(
        self,
        config: adv.GAE,
        multiplier: Float[Array, "B 1"],
        scores: Float[Array, "B G"],
        kl: Float[Array, "B G T"],
        rollouts: Rollouts,
        values: Float[Array, "B G T H"] | None,
    ) -> Targets:
        heads = len(self.value_heads)
        if values is None or values.shape[-1] != heads:
            got = None if values is None else values.shape[-1]
            raise ValueError(
                f"{self.name} needs values with the heads {self.value_heads}: "
                f"received {got} of them"
            )
        in_stream = self.kl.placement in ("reward", "reward_and_cost")
        last = _last_token(rollouts.mask)
        outcomes = [scores if heads == 1 else rollouts.reward]
        streams = [-kl * in_stream]
        if heads == 2:
            outcomes.append(self.constraint.signal(rollouts.cost))
            streams.append(kl * (self.kl.placement == "reward_and_cost"))
        clip = config.clip_range_score
        rewards = jnp.stack(
            [
                jnp.clip(stream + outcome[..., None] * last, -clip, clip)
                for stream, outcome in zip(streams, outcomes, strict=True)
            ],
            axis=-1,
        )
        estimate = jax.vmap(
            jax.vmap(
                jax.vmap(
                    lambda r, v, m: adv.gae(
                        r, v, m, gamma=config.gamma, gae_lambda=config.gae_lambda
                    ),
                    in_axes=(-1, -1, None),
                    out_axes=-1,
                )
            )
        )
        values = jnp.where(rollouts.mask[..., None], values, 0.0)
        per_head = estimate(rewards, values, rollouts.mask)
        mixed = (
            per_head[..., 0]
            if heads == 1
            else self.constraint.mix(multiplier, per_head[..., 0], per_head[..., 1], rollouts.cost)
        )
        if self.kl.placement == "token":
            mixed = mixed - kl
        return Targets(
            advantages=mixed, scores=scores, returns=per_head + values, old_values=values
        )

    def _group_advantages(
        self,
        multiplier: Float[Array, "B 1"],
        scores: Float[Array, "B G"],
        kl: Float[Array, "B G T"],
        kl_coef: float | Float[Array, ""],
        rollouts: Rollouts,
    ) -> Float[Array, "B G T"]:
        config, mask = self.advantage, rollouts.mask
        if isinstance(config, adv.GreedyBaseline):
            advantages = self._greedy_advantages(config, multiplier, scores, kl_coef, rollouts)
            if self.kl.placement == "reward":
                to_go = jax.vmap(jax.vmap(adv.reward_to_go))
                advantages = advantages - to_go(kl, mask)
        else:
            rewards = scores
            if self.kl.placement == "reward":
                rewards = scores - obj.sequence_sum(kl, mask)
            advantages = jnp.where(mask, _baselined(config, rewards)[..., None], 0.0)
        if self.kl.placement == "token":
            advantages = advantages - kl
        return advantages

    def _greedy_advantages(
        self,
        config: adv.GreedyBaseline,
        multiplier: Float[Array, "B 1"],
        scores: Float[Array, "B G"],
        kl_coef: float | Float[Array, ""],
        rollouts: Rollouts,
    ) -> Float[Array, "B G T"]:
        if rollouts.greedy is None:
            raise ValueError(
                f"{self.name} needs the scores of a greedy completion: "
                "rollouts.greedy is None; generate one where recipe.needs_greedy"
            )
        greedy = self.constraint.penalised(
            multiplier,
            rollouts.greedy["reward"][:, None],
            rollouts.greedy["cost"][:, None],
            kl_coef=kl_coef,
        )[:, 0]
        advantage = jax.vmap(lambda r, g: adv.greedy_baseline(r, g, clip=config.clip))(
            scores, greedy
        )
        return jax.vmap(jax.vmap(lambda a, m: adv.discount_to_end(a, m, gamma=config.gamma)))(
            advantage, rollouts.mask
        )

    def _policy_loss(
        self,
        kl_coef: float | Float[Array, ""],
        rollouts: Rollouts,
        targets: Targets,
        output: PolicyOutput,
    ) -> Float[Array, ""]:
        mask, objective = rollouts.mask, self.objective
        if isinstance(objective, obj.TrajectoryBalance):
            losses = jax.vmap(
                lambda lp, ref, r: objective.per_group(
                    lp, ref, r, kl_coef=kl_coef, completion_len=mask.shape[-1]
                )
            )(
                obj.sequence_sum(output.log_probs, mask),
                obj.sequence_sum(rollouts.reference_log_probs, mask),
                targets.scores,
            )
            return jnp.mean(losses)
        behaviour, proximal = rollouts.behaviour_log_probs, targets.proximal_log_probs
        losses = objective.per_token(
            output.log_probs, behaviour, targets.advantages, mask, proximal
        )
        if self.kl.placement == "loss":
            estimate = obj.kl_estimate(
                output.log_probs, rollouts.reference_log_probs, estimator=self.kl.estimator
            )
            losses = losses + objective.weights(proximal, behaviour, mask) * kl_coef * estimate
        reduce = obj.token_mean if objective.reduce == "token_mean" else obj.sequence_mean
        return reduce(losses, mask)


def _baselined(config: adv.Advantage, rewards: Float[Array, "B G"]) -> Float[Array, "B G"]:
    if isinstance(config, adv.LeaveOneOut):
        return jax.vmap(adv.leave_one_out)(rewards)
    if isinstance(config, adv.GroupNormalised):
        return jax.vmap(lambda r: adv.group_normalised(r, std_eps=config.std_eps))(rewards)
    return jax.vmap(adv.group_mean)(rewards)


def _token_kl(rollouts: Rollouts, log_probs: Float[Array, "B G T"] | None) -> Float[Array, "B G T"]:
    """k1 of the given policy, by default of the one that wrote the tokens; 0 on padding."""
    log_probs = rollouts.behaviour_log_probs if log_probs is None else log_probs
    return jnp.where(rollouts.mask, log_probs - rollouts.reference_log_probs, 0.0)


def _last_token(mask: jax.Array) -> Float[Array, "B G T"]:
    """1 on the last token of each completion, 0 elsewhere."""
    following = jnp.concatenate([mask[..., 1:], jnp.zeros_like(mask[..., :1])], axis=-1)
    return (mask & ~following).astype(jnp.float32)


def _policy_metrics(rollouts: Rollouts, output: PolicyOutput) -> Metrics:
    log_probs = jnp.where(rollouts.mask, output.log_probs, 0.0)
    behaviour = jnp.where(rollouts.mask, rollouts.behaviour_log_probs, 0.0)
    return {
        "ratio": obj.token_mean(jnp.exp(log_probs - behaviour), rollouts.mask),
        "entropy": obj.token_mean(output.entropy, rollouts.mask),
    }


def _target_share(
    kl_coef: float | Float[Array, ""], rollouts: Rollouts, targets: Targets, output: PolicyOutput
) -> Float[Array, ""]:
    """How far trajectory balance has come: 0 at the reference, 1 at the target.

    The slope of log π/π_ref on R'/β, both centred in their groups, by least squares.
    """
    mask = rollouts.mask
    log_ratio = obj.sequence_sum(output.log_probs - rollouts.reference_log_probs, mask)
    wanted = jax.vmap(adv.group_mean)(targets.scores) / kl_coef
    covered = jnp.sum(wanted * log_ratio)
    return covered / jnp.maximum(jnp.sum(wanted**2), jnp.finfo(wanted.dtype).tiny)


def _correction_metrics(
    objective: obj.ImportanceCorrected, rollouts: Rollouts, targets: Targets
) -> Metrics:
    """Mean weight, and how many of the tokens have one at or beyond the cap."""
    uncapped = dataclasses.replace(objective, correction_cap=None)
    behaviour, mask = rollouts.behaviour_log_probs, rollouts.mask
    weights, ratio = (
        each.weights(targets.proximal_log_probs, behaviour, mask) for each in (objective, uncapped)
    )
    cap = jnp.inf if objective.correction_cap is None else objective.correction_cap
    return {
        "importance_weight": obj.token_mean(weights, mask),
        "beyond_cap": obj.token_mean((ratio > cap).astype(jnp.float32), mask),
    }


# ------------------------------------------------------------------------------- the names

_SAFE_RLHF_KL = KL(coef=0.01, placement="reward_and_cost")
_TRL_RLOO: dict[str, Any] = {
    "advantage": adv.LeaveOneOut(),
    "group_size": 4,
    "objective": obj.ClippedSurrogate(level="sequence"),
    "kl": KL(coef=0.05),
}
_GRPO_OBJECTIVE = obj.ClippedSurrogate(reduce="token_mean")
_GRPO_KL = KL(coef=0.04, placement="loss", estimator="k3")
_GRPO: dict[str, Any] = {
    "advantage": adv.GroupNormalised(),
    "group_size": 8,
    "objective": _GRPO_OBJECTIVE,
    "kl": _GRPO_KL,
}
_DR_GRPO = {
    "advantage": adv.GroupMean(),
    "group_size": 8,
    "objective": _GRPO_OBJECTIVE,
    "kl": _GRPO_KL,
}
_REMAX = {
    "advantage": adv.GreedyBaseline(),
    "objective": obj.Reinforce(),
    "kl": KL(coef=0.05, placement="token"),
}
_ASYNC_GRPO: dict[str, Any] = {
    **_GRPO,
    "objective": dataclasses.replace(_GRPO_OBJECTIVE, correction="token"),
}
_ASYNC_RLOO: dict[str, Any] = {
    **_TRL_RLOO,
    "objective": obj.ClippedSurrogate(level="sequence", correction="sequence"),
}
_RECTIFIED_REWARD = Rectified(cost_critic_target="rectified", cost_on="all", normalise="none")

_ALL = (
    Recipe(
        name="ppo",
        summary="PPO: clipped surrogate, GAE, no constraint",
        advantage=adv.GAE(),
        kl=KL(coef=0.02),
    ),
    Recipe(
        name="reward_shaping",
        summary="PPO on R − C (safe-rlhf's reward shaping)",
        advantage=adv.GAE(),
        constraint=FixedPenalty(coef=1.0),
        kl=KL(coef=0.02),
    ),
    Recipe(
        name="fixed_penalty",
        summary="PPO on R − λ{C}⁺ with constant λ = 5 (CS-RLHF)",
        advantage=adv.GAE(),
        constraint=FixedPenalty(coef=5.0, rectify_cost=True),
        kl=KL(coef=0.02),
    ),
    Recipe(
        name="ppo_lagrangian",
        summary="PPO-Lagrangian on the mean cost, as safe-rlhf has it",
        advantage=adv.GAE(),
        constraint=Lagrangian(),
        kl=_SAFE_RLHF_KL,
    ),
    Recipe(
        name="repo",
        summary="plain RePO: rectified cost, switched on each unsafe sample",
        advantage=adv.GAE(),
        constraint=Rectified(),
        kl=KL(coef=0.01, placement="reward"),
    ),
    Recipe(name="grpo", summary="GRPO: rewards standardised within the group", **_GRPO),
    Recipe(
        name="dr_grpo",
        summary="GRPO without division by the standard deviation; loss per active token",
        **_DR_GRPO,
    ),
    Recipe(name="rloo", summary="REINFORCE with the leave-one-out baseline", **_TRL_RLOO),
    Recipe(name="remax", summary="REINFORCE with the greedy completion as baseline", **_REMAX),
    Recipe(
        name="async_ppo",
        summary="PPO on completions of older policies: decoupled clip, truncated token weights",
        advantage=adv.GAE(),
        objective=obj.ClippedSurrogate(correction="token"),
        kl=KL(coef=0.02),
    ),
    Recipe(
        name="async_grpo",
        summary="GRPO on completions of older policies: decoupled clip, truncated token weights",
        **_ASYNC_GRPO,
    ),
    Recipe(
        name="async_rloo",
        summary="RLOO on completions of older policies: decoupled clip, truncated sequence weights",
        **_ASYNC_RLOO,
    ),
    Recipe(
        name="tba",
        summary="TBA: trajectory balance on completions of any policy, β annealed as on GSM8K",
        advantage=adv.GroupMean(),
        objective=obj.TrajectoryBalance(scale="squared"),
        kl=KL(coef=0.012, final_coef=0.004, anneal_steps=500),
        group_size=20,
    ),
    Recipe(
        name="repo_grpo",
        summary="GRPO on R − λ{C}⁺ with RePO's multiplier",
        constraint=_RECTIFIED_REWARD,
        **_GRPO,
    ),
    Recipe(
        name="repo_dr_grpo",
        summary="Dr. GRPO on R − λ{C}⁺ with RePO's multiplier",
        constraint=_RECTIFIED_REWARD,
        **_DR_GRPO,
    ),
    Recipe(
        name="repo_rloo",
        summary="RLOO on R − λ{C}⁺ with RePO's multiplier",
        constraint=_RECTIFIED_REWARD,
        **_TRL_RLOO,
    ),
    Recipe(
        name="repo_remax",
        summary="ReMax on R − λ{C}⁺ with RePO's multiplier",
        constraint=_RECTIFIED_REWARD,
        **_REMAX,
    ),
    Recipe(
        name="repo_tb",
        summary="recommended: trajectory balance on R − min(λ{C}⁺, bound), half of each group "
        "written by the reference",
        advantage=adv.GroupMean(),
        objective=obj.TrajectoryBalance(),
        kl=KL(coef=0.05),
        constraint=dataclasses.replace(_RECTIFIED_REWARD, rate=20.0, max_value=None, bound=24.0),
        group_size=8,
        reference_share=0.5,
    ),
    Recipe(
        name="repo_tb_replay",
        summary="repo_tb with a quarter of its samples: three quarters of a batch are replayed, "
        "three quarters of what is written is the reference's",
        advantage=adv.GroupMean(),
        objective=obj.TrajectoryBalance(),
        kl=KL(coef=0.05),
        constraint=dataclasses.replace(
            _RECTIFIED_REWARD, rate=20.0, max_value=None, bound=24.0, max_lag=0
        ),
        group_size=8,
        reference_share=0.75,
        replay_share=0.75,
    ),
)

RECIPES: Mapping[str, Recipe] = MappingProxyType({recipe.name: recipe for recipe in _ALL})
RECOMMENDED: str = "repo_tb"


def get(name: str, **changes: Any) -> Recipe:
    """The recipe of that name, with some of its fields changed.

    Raises:
      ValueError: unknown name or field, or a combination that makes no sense.

    >>> get("rloo", group_size=2).group_size
    2
    """
    if name not in RECIPES:
        raise ValueError(f"unknown algorithm {name!r}; known: {', '.join(RECIPES)}")
    fields = [f.name for f in dataclasses.fields(Recipe)]
    unknown = sorted(set(changes) - set(fields))
    if unknown:
        raise ValueError(f"a recipe has no field {', '.join(unknown)}; it has: {', '.join(fields)}")
    return dataclasses.replace(RECIPES[name], **changes)


def with_options(recipe: Recipe, options: Mapping[str, str]) -> Recipe:
    """The recipe with options given as text, as a command line has them.

    Args:
      recipe: where to start.
      options: field to value; a field of the recipe itself, or of its constraint, advantage,
        objective or KL; "kl.estimator" says which part is meant.

    Raises:
      ValueError: unknown field (names those there are), a value of the wrong type, or a
        combination that makes no sense.

    >>> with_options(get("repo"), {"max_value": "50", "rectify": "prompt"}).constraint.max_value
    50.0
    """
    parts = ("constraint", "advantage", "objective", "kl")
    known = {
        name: ("", name) for name in ("group_size", "reference_share", "replay_share", "epochs")
    }
    for part in parts:
        for each in dataclasses.fields(getattr(recipe, part)):
            known[f"{part}.{each.name}"] = (part, each.name)
            if (part, each.name) != ("kl", "coef"):  # a bare "coef" is the penalty's
                known.setdefault(each.name, (part, each.name))
    changes: dict[str, dict[str, Any]] = {}
    for option, text in options.items():
        if option not in known:
            raise ValueError(
                f"{recipe.name} has no option {option!r}; it has: {', '.join(sorted(known))}"
            )
        part, name = known[option]
        hint = get_type_hints(type(getattr(recipe, part) if part else recipe))[name]
        changes.setdefault(part, {})[name] = _parsed(f"{recipe.name}.{option}", text, hint)
    own = changes.pop("", {})
    for part, fields in changes.items():
        own[part] = dataclasses.replace(getattr(recipe, part), **fields)
    return dataclasses.replace(recipe, **own)


def _parsed(option: str, text: str, hint: Any) -> Any:
    """The value that a text stands for under a type such as `float | None` or `Literal[…]`."""
    choices = get_args(hint)
    if get_origin(hint) is Literal:
        if text in choices:
            return text
        raise ValueError(f"{option} must be one of {', '.join(choices)}, got {text!r}")
    if type(None) in choices and text.lower() == "none":
        return None
    kind = next((c for c in choices if c is not type(None)), hint)
    allowed = {bool: "true or false", int: "an integer", float: "a number"}
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return kind(text)
    except (KeyError, ValueError) as error:
        none = ", or none" if type(None) in choices else ""
        raise ValueError(
            f"{option} must be {allowed.get(kind, kind)}{none}, got {text!r}"
        ) from error
