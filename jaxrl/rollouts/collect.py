"""One batch of rollouts: written by the policy and, in part, by the reference policy."""

from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int32, PRNGKeyArray

from jaxrl import policy as policy_lib
from jaxrl import processes
from jaxrl.rollouts.generate import generate_from_state
from jaxrl.rollouts.sampling import Sampling
from jaxrl.types import REFERENCE_VERSION, Completions, Prompts, Rollouts
from sharding import Plan


@dataclass(frozen=True, kw_only=True)
class Collector:
    """How a batch is collected.

    Attributes:
      graphdef: structure of policy and reference, which share it.
      sampling: how completions are drawn; its temperature holds for every log-probability.
      group_size: G, completions per prompt.
      reference_completions: how many of the G the frozen reference policy writes, as the last
        of each group; off-policy recipes ask for them.
      greedy: also write one greedy completion of each prompt (a baseline).
      frozen: parameters of the policy that are not trained, where `params` of `collect` holds
        only its adapters.
      plan: over whose batch axes the prompts are divided; parameters come as they lie. On a mesh,
        which may span processes, what is collected is whole in every process, as NumPy arrays.
    """

    graphdef: nnx.GraphDef
    sampling: Sampling
    group_size: int
    reference_completions: int = 0
    greedy: bool = False
    frozen: nnx.State | None = None
    plan: Plan = field(default_factory=Plan.single_device)

    def __post_init__(self) -> None:
        if not 0 <= self.reference_completions <= self.group_size:
            raise ValueError(
                "reference_completions must be between 0 and group_size: "
                f"{self.reference_completions=}, {self.group_size=}"
            )

    def collect(
        self,
        params: nnx.State,
        reference: nnx.State,
        prompts: Prompts,
        key: PRNGKeyArray,
        version: Int32[Array, ""] | int,
    ) -> tuple[Rollouts, Completions | None]:
        """Rollouts that have no rewards and costs yet, and the greedy completions asked for.

        Args:
          params: the policy.
          reference: the frozen reference policy.
          prompts: B prompts.
          key: consumed; a fresh one for every batch.
          version: of the policy.

        Raises:
          ValueError: the plan's batch axes do not divide B.
        """
        if not self.plan.mesh:
            return self._collect(params, reference, prompts, key, version)
        prompts = self._bound.place_batch(prompts)
        # By its words: JAX moves no typed key to devices of other processes.
        words = self._bound.place(jax.random.key_data(key))
        key = jax.random.wrap_key_data(words, impl=jax.random.key_impl(key))
        with self._bound.context():
            return processes.whole(self._collect(params, reference, prompts, key, version))

    @cached_property
    def _bound(self):
        return self.plan.bind()

    def _collect(self, params, reference, prompts, key, version):
        if self.frozen is not None:
            params = nnx.merge_state(params, self.frozen)
        own_key, reference_key = jax.random.split(key)
        write = partial(generate_from_state, graphdef=self.graphdef, sampling=self.sampling)
        parts = []
        if own := self.group_size - self.reference_completions:
            parts.append((write(params, prompts, own_key, group_size=own), version))
        if theirs := self.reference_completions:
            written = write(reference, prompts, reference_key, group_size=theirs)
            parts.append((written, REFERENCE_VERSION))
        rollouts = _assemble(
            reference, prompts, parts, graphdef=self.graphdef, temperature=self.sampling.temperature
        )
        if not self.greedy:
            return rollouts, None
        sampling = replace(self.sampling, greedy=True)
        return rollouts, write(params, prompts, own_key, sampling=sampling, group_size=1)


@partial(jax.jit, static_argnames=("graphdef", "temperature"))
def _assemble(reference, prompts, parts, *, graphdef, temperature) -> Rollouts:
    completions = jax.tree.map(
        lambda *xs: jnp.concatenate(xs, axis=1), *(written for written, _ in parts)
    )
    versions = [jnp.full(written.tokens.shape, v, jnp.int32) for written, v in parts]
    mask = completions.mask
    model = nnx.merge(graphdef, reference)
    log_probs = policy_lib.evaluate(
        model, prompts, completions.tokens, mask, temperature=temperature, with_entropy=False
    ).log_probs
    return Rollouts(
        prompts=prompts,
        tokens=completions.tokens,
        mask=mask,
        behaviour_log_probs=completions.log_probs,
        reference_log_probs=log_probs,
        policy_version=jnp.where(mask, jnp.concatenate(versions, axis=1), 0),
        rewards={},
        costs={},
    )
