"""Every compiled program of a run, with the shapes of its arguments and who runs it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrl import policy as policy_lib
from jaxrl.deployment.workload import Workload
from jaxrl.learner import Learner, lm_apply, lm_optimizer
from jaxrl.models import Decoder, DecoderConfig, LoraParam, ScalarModel
from jaxrl.types import Prompts, Rollouts

Side = Literal["learner", "actor"]
GENERATION = "generation"
"""Key of what exists only while a batch is written: weights of layers apart, and caches."""
_SCORED = 16  # prompts whose completions are scored at once


def _shape(shape: tuple[int, ...], dtype: Any) -> Any:
    """Stands in a record where an array will."""
    return jax.ShapeDtypeStruct(shape, dtype)


@dataclass(frozen=True, kw_only=True)
class Program:
    """A function, its arguments as shapes, and how often one batch of rollouts needs it.

    Attributes:
      name: for reports.
      side: who runs it.
      step: the function.
      args: its arguments; the first holds parameters.
      calls: how often it runs for the prompts that its arguments hold.
      donate: positions of arguments whose memory the results take.
      parameters: key of the parameters that the first argument holds: programs of one side with
        the same key share them, and their sharding.
      on_device: its calls are a loop on the device: the host starts only the first.
      state: positions of arguments that are parameters or carried on.
      data: positions of arguments whose leading axis is the batch.
    """

    name: str
    side: Side
    step: Callable[..., Any]
    args: tuple[Any, ...]
    calls: int = 1
    donate: tuple[int, ...] = ()
    parameters: str = "policy"
    on_device: bool = False
    state: tuple[int, ...] | None = field(default=None)
    data: tuple[int, ...] | None = field(default=None)


def learner_programs(workload: Workload) -> list[Program]:
    """The update: targets, losses, gradients and optimisers of policy and critic."""
    learner, params, rollouts = update_parts(workload)
    state = jax.eval_shape(
        lambda params: learner.init(params, num_prompts=workload.prompts_per_step), params
    )
    return [
        Program(
            name="update", side="learner", step=_named("update", learner.step),
            args=(state, rollouts), donate=(0,), parameters="state",
        )
    ]  # fmt: skip


def update_parts(workload: Workload) -> tuple[Learner, dict[str, Any], Rollouts]:
    """The learner, and shapes of what it trains and of what it learns from.

    Of a policy with adapters it trains these alone, and wants the rest as `Learner.frozen`.
    """
    filters = () if workload.policy.lora is None else (LoraParam, ...)
    graphdef, params, *_ = split_shapes(
        partial(Decoder, workload.executed(workload.policy)), *filters
    )
    held, critic_def = {"policy": params}, None
    trunk = workload.critic_trunk
    if trunk is not None:
        heads = workload.recipe.value_heads
        critic_def, held["critic"] = split_shapes(
            partial(ScalarModel, workload.executed(trunk), heads)
        )
    learner = Learner(
        recipe=workload.recipe,
        apply=lm_apply(graphdef, critic_def, temperature=1.0),
        optimizer=lm_optimizer(workload.optimizer),
    )
    return learner, held, _rollouts(workload, workload.prompts_per_step)


def actor_programs(workload: Workload, prompts: int) -> list[Program]:
    """Generation and scoring of `prompts` prompts at one actor.

    The reference policy lies at the actors too: its log-probabilities travel with the rollouts,
    so that the learner holds one model (TBA, arXiv:2503.18929, section 4).
    """
    return Written().actor_programs(workload, prompts)


class Written:
    """Programs, each written once: JAX knows by its identity which function it has traced."""

    def __init__(self) -> None:
        self._programs: dict[tuple[Any, ...], list[Program]] = {}

    def get(
        self, write: Callable[..., list[Program]], workload: Workload, *sizes: int
    ) -> list[Program]:
        """What `write` returns for a workload and its sizes."""
        key = write, workload, *sizes
        if key not in self._programs:
            self._programs[key] = write(workload, *sizes)
        return self._programs[key]

    def actor_programs(self, workload: Workload, prompts: int) -> list[Program]:
        """`actor_programs`, of which those that score are the same for many numbers of prompts."""
        scored, calls = scoring_calls(prompts)
        return [
            *self.get(generation_programs, workload, prompts),
            *(replace(p, calls=calls) for p in self.get(scoring_programs, workload, scored)),
        ]


def scoring_calls(prompts: int) -> tuple[int, int]:
    """How many prompts' completions are scored at once, and how often for `prompts` of them."""
    scored = min(prompts, _SCORED)
    return scored, -(-prompts // scored)


def generation_programs(workload: Workload, prompts: int) -> list[Program]:
    """Prefill and decoding of `prompts` prompts."""
    config, g, t = workload.executed(workload.policy), workload.group_size, workload.completion_len
    graphdef, params = split_shapes(partial(Decoder, config), dtype=workload.generation_dtype)
    batch = _prompts(workload, prompts)

    def prefill(params, prompts):
        model = nnx.merge(graphdef, params)
        hidden, cache = model.prefill(prompts, group_size=g, max_new_tokens=t)
        return model.logits(hidden), cache, model.layer_weights()

    _, cache, layers = jax.eval_shape(prefill, params, batch)
    cache = jax.eval_shape(lambda cache: cache.with_room(t), cache)
    ends = {name: params[name] for name in params if name != "layers"}

    # Inside the loop layers stand apart, as the prefill left them.
    def decode(ends, layers, cache, tokens, step):
        model = nnx.merge(graphdef, nnx.State({**ends, "layers": params["layers"]}))
        hidden, cache = model.decode(layers, cache, tokens, step)
        return model.logits(hidden), cache

    one, step = _shape((prompts, g), jnp.int32), _shape((), jnp.int32)
    return [
        Program(name="prefill", side="actor", step=prefill, args=(params, batch),
                state=(0,), data=(1,)),
        Program(name="decode", side="actor", step=decode, args=(ends, layers, cache, one, step),
                calls=t, donate=(2,), parameters=GENERATION, on_device=True,
                state=(0, 1), data=(2, 3)),
    ]  # fmt: skip


def scoring_programs(workload: Workload, scored: int) -> list[Program]:
    """What reads the whole completions of `scored` prompts at once."""
    config, g, t = workload.executed(workload.policy), workload.group_size, workload.completion_len
    graphdef, params = split_shapes(partial(Decoder, config), dtype=jnp.bfloat16)

    def reference(params, prompts, tokens, mask):
        return policy_lib.evaluate(
            nnx.merge(graphdef, params), prompts, tokens, mask, temperature=1.0, with_entropy=False
        ).log_probs

    tokens, mask = _shape((scored, g, t), jnp.int32), _shape((scored, g, t), jnp.bool_)
    programs = [
        Program(name="reference", side="actor", step=reference,
                args=(params, _prompts(workload, scored), tokens, mask), parameters="reference",
                state=(0,), data=(1, 2, 3)),
    ]  # fmt: skip
    for name, trunk in (("reward", workload.reward_model), ("cost", workload.cost_model)):
        if trunk is not None:
            programs.append(_score(workload, name, trunk, scored * g))
    return programs


def _score(workload: Workload, name: str, trunk: DecoderConfig, rows: int) -> Program:
    graphdef, params = split_shapes(
        partial(ScalarModel, workload.executed(trunk), (name,)), dtype=jnp.bfloat16
    )

    def score(params, tokens, segments):
        return nnx.merge(graphdef, params).scores(tokens, segments)

    ids = _shape((rows, workload.prompt_len + workload.completion_len), jnp.int32)
    return Program(
        name=name, side="actor", step=_named(name, score), args=(params, ids, ids), parameters=name,
        state=(0,), data=(1, 2),
    )  # fmt: skip


def split_shapes(
    build: Callable[..., nnx.Module], *filters: Any, dtype: Any = None
) -> tuple[Any, ...]:
    """Structure and shapes of a model's parameters, which are never made.

    Args:
      build: makes the model, given `rngs`.
      filters: as of `nnx.split`: one state for each; one of all where there are none.
      dtype: of all parameters; None: as they are.
    """
    graphdef, *states = nnx.split(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))), *filters)
    if dtype is not None:
        states = jax.tree.map(lambda x: _shape(x.shape, dtype), states)
    return graphdef, *states


def _prompts(workload: Workload, count: int) -> Prompts:
    tokens = (count, workload.prompt_len)
    return Prompts(
        tokens=_shape(tokens, jnp.int32), mask=_shape(tokens, jnp.bool_),
        ids=_shape((count,), jnp.int32),
    )  # fmt: skip


def _rollouts(workload: Workload, count: int) -> Rollouts:
    groups = (count, workload.group_size)
    tokens = (*groups, workload.completion_len)
    greedy = None
    if workload.recipe.needs_greedy:
        greedy = {name: _shape((count,), jnp.float32) for name in ("reward", "cost")}
    return Rollouts(
        prompts=_prompts(workload, count),
        tokens=_shape(tokens, jnp.int32),
        mask=_shape(tokens, jnp.bool_),
        behaviour_log_probs=_shape(tokens, jnp.float32),
        reference_log_probs=_shape(tokens, jnp.float32),
        policy_version=_shape(tokens, jnp.int32),
        rewards={"reward": _shape(groups, jnp.float32)},
        costs={"cost": _shape(groups, jnp.float32)},
        greedy=greedy,
    )


def _named(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
    def program(*args):
        return step(*args)

    program.__name__ = name
    return program
