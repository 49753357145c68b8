"""The learner: one jitted step from scored rollouts to a new training state.

It knows a recipe, an optimiser and a plan, and of the model only `apply`, which gives
log-probabilities and values; the same learner therefore trains a language model on a pod and a
table of logits in a benchmark.
"""

import contextlib
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float32, Int32

from jaxrl import policy as policy_lib
from jaxrl.models import Decoder, ScalarModel
from jaxrl.models.compiling import training_options
from jaxrl.models.layout import platform
from jaxrl.recipes import Recipe
from jaxrl.types import LearnerState, PolicyOutput, Prompts, Rollouts
from sharding import Plan

Metrics = dict[str, Float32[Array, ""]]
Apply = Callable[[Any, Rollouts], PolicyOutput]
Demonstrations = tuple[Prompts, Int32[Array, "B T"], Bool[Array, "B T"]]
"""Prompts, and the tokens and mask of one completion of each."""
FROZEN = "frozen"
"""Key of what is not trained among the parameters that `Learner.apply` gets."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a warm-up and a global-norm clip.

    Attributes:
      learning_rate: of the policy.
      critic_learning_rate: of the value heads and their trunk.
      warmup_steps: steps over which the rate rises linearly from 0.
      decay_steps: steps over which it then falls to 0 along a cosine; 0 keeps it constant.
      b1: decay of Adam's first moment.
      b2: decay of its second moment.
      weight_decay: decoupled, on matrices; not on vectors, nor on norms and biases, which in
        stacked layers have two axes or more and are known by their names.
      max_grad_norm: gradients of policy and of critic are clipped to this norm, each alone.
    """

    learning_rate: float = 3e-4
    critic_learning_rate: float = 1e-3
    warmup_steps: int = 10
    decay_steps: int = 0
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "critic_learning_rate", "max_grad_norm"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        for name in ("warmup_steps", "decay_steps", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be ≥ 0, got {getattr(self, name)}")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")

    def build(self, *, critic: bool = False) -> optax.GradientTransformation:
        """The optimiser of the policy, or of the critic."""
        peak = self.critic_learning_rate if critic else self.learning_rate
        schedule = optax.constant_schedule(peak)
        if self.decay_steps:
            schedule = optax.cosine_decay_schedule(peak, self.decay_steps)
        if self.warmup_steps:
            # Ends one step early: the first step must move, or a run of two learns nothing.
            rise = optax.linear_schedule(peak / self.warmup_steps, peak, self.warmup_steps - 1)
            schedule = optax.join_schedules([rise, schedule], [self.warmup_steps - 1])
        return optax.chain(
            optax.clip_by_global_norm(self.max_grad_norm),
            optax.adamw(
                schedule,
                b1=self.b1,
                b2=self.b2,
                weight_decay=self.weight_decay,
                mask=partial(jax.tree_util.tree_map_with_path, _is_decayed),
            ),
        )


def _is_decayed(path: tuple[Any, ...], parameter: Array) -> bool:
    name = jax.tree_util.keystr(path)
    return parameter.ndim > 1 and "norm" not in name and "bias" not in name


@dataclass(frozen=True, kw_only=True)
class Learner:
    """A recipe, an optimiser and a plan, ready to update.

    Attributes:
      recipe: the algorithm.
      apply: (params, rollouts) to log-probabilities and values.
      optimizer: of {"policy": …, "critic": …}; see `lm_optimizer`.
      plan: where parameters and data lie.
      ptx: (params, demonstrations) to the likelihood loss that is added, with weight
        `ptx_coef`, to keep what pre-training and fine-tuning taught (InstructGPT's PPO-ptx,
        arXiv:2203.02155; safe-rlhf's scripts use 16); see `lm_ptx`.
      ptx_coef: weight of that loss.
      frozen: what `apply` and `ptx` find below "frozen" in their parameters and nobody trains,
        such as {"policy": …} of a policy whose adapters alone are; {} where all is trained. An
        argument of the compiled step, since constants may neither be large nor span processes.
    """

    recipe: Recipe
    apply: Apply
    optimizer: optax.GradientTransformation
    ptx: Callable[[Any, Demonstrations], Float32[Array, ""]] | None = None
    ptx_coef: float = 0.0
    plan: Plan = field(default_factory=Plan.single_device)
    frozen: Mapping[str, Any] = field(default_factory=dict)

    def init(self, params: Mapping[str, Any], *, num_prompts: int) -> LearnerState:
        """The state before the first update.

        Args:
          params: {"policy": …, "critic": …}; the critic only where the recipe has value heads.
            Copied: updates donate the state, and the caller may still need its arrays.
          num_prompts: prompts in the data set, for multipliers of each prompt.
        """
        wanted = {"policy", "critic"} if self.recipe.value_heads else {"policy"}
        if set(params) != wanted:
            raise ValueError(
                f"recipe {self.recipe.name} trains {sorted(wanted)}, got {sorted(params)}"
            )

        def started(params):
            params = jax.tree.map(jnp.copy, params)
            return LearnerState(
                params=params,
                opt_state=self.optimizer.init(params),
                recipe=self.recipe.init(num_prompts),
                step=jnp.int32(0),
            )

        params = dict(params)
        return self._bound.build(started, params) if self.plan.mesh else started(params)

    def update(
        self,
        state: LearnerState,
        rollouts: Rollouts,
        demonstrations: Demonstrations | None = None,
    ) -> tuple[LearnerState, Metrics]:
        """One step, jitted; `state` is donated. See `step`."""
        if self.plan.mesh:
            rollouts, demonstrations = self._bound.place_batch((rollouts, demonstrations))
        return self._jitted(state, rollouts, demonstrations, self._placed)

    def step(
        self,
        state: LearnerState,
        rollouts: Rollouts,
        demonstrations: Demonstrations | None = None,
    ) -> tuple[LearnerState, Metrics]:
        """One step, not yet jitted: multipliers first, then `recipe.epochs` gradient steps.

        Args:
          state: before the step.
          rollouts: scored.
          demonstrations: for the `ptx` loss; None leaves it out.

        A step whose loss or gradients are not finite leaves the state as it was and says so
        in the metric "skipped".
        """
        recipe_state, metrics = self.recipe.update(state.recipe, rollouts)
        params: Any = state.params
        opt_state, targets, done = state.opt_state, None, []
        if self.recipe.epochs > 1:
            output = self.apply(self._with_frozen(params), rollouts)
            targets = self._targets(recipe_state, rollouts, output)
        for _ in range(self.recipe.epochs):
            gradient = jax.value_and_grad(self._loss, has_aux=True)
            (loss, seen), grads = gradient(
                params, recipe_state, rollouts, targets, demonstrations, state.step
            )
            updates, opt_state = self.optimizer.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            done.append((loss, optax.tree.norm(grads), seen))
        loss, norm, seen = done[-1]  # what went wrong in an earlier pass is in the last one too
        # Whether the sampler was honest only the first pass says: the later ones have moved on.
        seen |= {"sampler_gap": done[0][2]["sampler_gap"]}
        proposed = LearnerState(
            params=params, opt_state=opt_state, recipe=recipe_state, step=state.step + 1
        )
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        kept = jax.tree.map(partial(jnp.where, finite), proposed, state)
        if self.plan.mesh:
            # Left to itself the compiler may move a result, and the next step compiles again.
            kept = self._bound.constrain(kept)
        metrics |= seen | {"loss": loss, "grad_norm": norm, "skipped": 1.0 - finite}
        return kept, {k: jnp.asarray(v, jnp.float32) for k, v in metrics.items()}

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """The mesh of the plan, for whatever else computes with the policy where it lies."""
        return self._bound.context() if self.plan.mesh else contextlib.nullcontext()

    def _with_frozen(self, params):
        return {**params, FROZEN: self.frozen} if self.frozen else params

    def _loss(self, params, recipe_state, rollouts, targets, demonstrations, version):
        params = self._with_frozen(params)
        output = self.apply(params, rollouts)
        if targets is None:
            # On the first pass the values of this very forward are the old values.
            targets = self._targets(recipe_state, rollouts, jax.lax.stop_gradient(output))
        loss, metrics = self.recipe.loss(recipe_state, rollouts, targets, output)
        if self.ptx is not None and demonstrations is not None:
            metrics["ptx_loss"] = self.ptx(params, demonstrations)
            loss += self.ptx_coef * metrics["ptx_loss"]
        return loss, metrics | _observed(rollouts, output, version)

    def _targets(self, recipe_state, rollouts, output):
        targets = self.recipe.targets(
            recipe_state, rollouts, output.values, log_probs=output.log_probs
        )
        return jax.lax.stop_gradient(targets)

    @cached_property
    def _bound(self):
        return self.plan.bind()

    @cached_property
    def _placed(self):
        return self._bound.place(self.frozen) if self.plan.mesh else self.frozen

    @cached_property
    def _jitted(self):
        def step(state, rollouts, demonstrations, frozen):
            with self.context():
                return replace(self, frozen=frozen).step(state, rollouts, demonstrations)

        with self.context():
            options = training_options(platform())
        return jax.jit(step, donate_argnums=0, compiler_options=options)


def _observed(rollouts: Rollouts, output: PolicyOutput, version: Int32[Array, ""]) -> Metrics:
    """What a user watches: KL to the reference, entropy, and the sampler's honesty.

    Only tokens of the policy's present version say whether the sampler was honest: those of an
    older one differ by right.
    """
    own = rollouts.mask & (rollouts.policy_version >= 0)
    count = jnp.maximum(jnp.sum(own), 1)
    sequences = jnp.maximum(jnp.sum(jnp.any(own, axis=-1)), 1)
    log_ratio = output.log_probs - rollouts.reference_log_probs
    current = rollouts.mask & (rollouts.policy_version == version)
    gap = jnp.abs(output.log_probs - rollouts.behaviour_log_probs)
    return {
        "kl": jnp.sum(jnp.where(own, log_ratio, 0.0)) / sequences,
        "entropy": jnp.sum(jnp.where(own, output.entropy, 0.0)) / count,
        "sampler_gap": jnp.max(jnp.where(current, gap, 0.0)),
    }


def lm_apply(
    policy_def: nnx.GraphDef, critic_def: nnx.GraphDef | None, *, temperature: float
) -> Apply:
    """`Learner.apply` of a decoder and, where there is one, of its critic.

    Where `params["policy"]` holds only some of the policy's parameters, its adapters for example,
    `Learner.frozen` has the others:

        graphdef, adapters, rest = nnx.split(model, LoraParam, ...)
        Learner(apply=lm_apply(graphdef, None, temperature=1.0), frozen={"policy": rest}, …)

    Args:
      policy_def: structure of the policy.
      critic_def: structure of the critic.
      temperature: of the sampling.
    """

    def apply(params: Mapping[str, Any], rollouts: Rollouts) -> PolicyOutput:
        policy = _policy(policy_def, params)
        prompts, tokens = rollouts.prompts, rollouts.tokens
        output = policy_lib.evaluate(
            policy, prompts, tokens, rollouts.mask, temperature=temperature
        )
        if critic_def is None:
            return output
        critic: ScalarModel = nnx.merge(critic_def, params["critic"])
        return output.replace(values=critic.completion_values(prompts, tokens))

    return apply


def lm_ptx(policy_def: nnx.GraphDef) -> Callable[[Any, Demonstrations], Float32[Array, ""]]:
    """`Learner.ptx` of a decoder, nats a token of the demonstrations; see `lm_apply`."""

    def loss(params: Mapping[str, Any], demonstrations: Any):
        policy = _policy(policy_def, params)
        return policy_lib.negative_log_likelihood(policy, *demonstrations)

    return loss


def _policy(structure: nnx.GraphDef, params: Mapping[str, Any]) -> Decoder:
    frozen = params.get(FROZEN, {})
    rest = (frozen["policy"],) if "policy" in frozen else ()
    return nnx.merge(structure, params["policy"], *rest)


def lm_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Policy and critic under optimisers, clips and rates of their own."""
    parts: dict[Hashable, optax.GradientTransformation] = {
        "policy": config.build(),
        "critic": config.build(critic=True),
    }
    return optax.partition(
        parts, lambda params: {name: _labelled(tree, name) for name, tree in params.items()}
    )


def _labelled(tree: Any, label: str) -> Any:
    return jax.tree.map(lambda _: label, tree)
