"""Supervised fine-tuning: maximum likelihood of demonstrations."""

import contextlib
from dataclasses import dataclass, field
from functools import cached_property

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float32, Int32

from jaxrl import policy
from jaxrl.models.compiling import training_options
from jaxrl.models.layout import platform
from jaxrl.types import PackedRows, Prompts, SupervisedState
from sharding import Plan


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
        return self._update(state, (prompts, tokens, mask), policy.negative_log_likelihood)

    def update_packed(
        self, state: SupervisedState, rows: PackedRows
    ) -> tuple[SupervisedState, Float32[Array, ""]]:
        """`update` on rows that hold several sequences; the same loss of the same sequences."""
        return self._update(state, (rows,), policy.packed_negative_log_likelihood)

    def _update(self, state, data, loss):
        if self.plan.mesh:
            data = self._bound.place_batch(data)
        return self._jitted(state, data, loss)

    @cached_property
    def _bound(self):
        return self.plan.bind()

    @cached_property
    def _jitted(self):
        def step(state, data, loss_of):
            def loss(params):
                return loss_of(nnx.merge(self.graphdef, params), *data)

            value, grads = jax.value_and_grad(loss)(state.params)
            updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            state = SupervisedState(params=params, opt_state=opt_state, step=state.step + 1)
            if self.plan.mesh:
                # Left to itself the compiler may move a result, and the next step compiles again.
                state = self._bound.constrain(state)
            return state, value

        def under_mesh(*args):
            if not self.plan.mesh:
                return step(*args)
            with self._bound.context():
                return step(*args)

        with self._bound.context() if self.plan.mesh else contextlib.nullcontext():
            options = training_options(platform())
        return jax.jit(under_mesh, donate_argnums=0, static_argnums=2, compiler_options=options)
