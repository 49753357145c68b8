"""Supervised fine-tuning: maximum likelihood of demonstrations."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float32, Int32

from jaxrl import policy
from jaxrl.types import Prompts
from sharding import Plan


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SupervisedState:
    """What a step changes and a checkpoint holds."""

    params: Any
    opt_state: Any
    step: Int32[Array, ""]


@dataclass(frozen=True, kw_only=True)
class Supervised:
    """Fine-tunes the decoder of `graphdef`.

    Attributes:
      graphdef: its structure.
      optimizer: of its parameters.
      plan: where parameters and data lie.
    """

    graphdef: nnx.GraphDef
    optimizer: optax.GradientTransformation
    plan: Plan = field(default_factory=Plan.single_device)

    def init(self, params: nnx.State) -> SupervisedState:
        """The state before the first step; `params` is copied."""

        def started(params):
            params = jax.tree.map(jnp.copy, params)
            return SupervisedState(
                params=params, opt_state=self.optimizer.init(params), step=jnp.int32(0)
            )

        return self._bound.build(started, params) if self.plan.mesh else started(params)

    def update(
        self,
        state: SupervisedState,
        prompts: Prompts,
        tokens: Int32[Array, "B T"],
        mask: Bool[Array, "B T"],
    ) -> tuple[SupervisedState, Float32[Array, ""]]:
        """One jitted step; `state` is donated. Gives the loss before it, in nats a token."""
        if self.plan.mesh:
            prompts, tokens, mask = self._bound.place_batch((prompts, tokens, mask))
        return self._jitted(state, prompts, tokens, mask)

    @cached_property
    def _bound(self):
        return self.plan.bind()

    @cached_property
    def _jitted(self):
        def step(state, prompts, tokens, mask):
            def loss(params):
                model = nnx.merge(self.graphdef, params)
                return policy.negative_log_likelihood(model, prompts, tokens, mask)

            value, grads = jax.value_and_grad(loss)(state.params)
            updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            state = SupervisedState(params=params, opt_state=opt_state, step=state.step + 1)
            if self.plan.mesh:
                # Left to itself the compiler may move a result, and the next step compiles again.
                state = self._bound.constrain(state)
            return state, value

        return jax.jit(step, donate_argnums=0)
