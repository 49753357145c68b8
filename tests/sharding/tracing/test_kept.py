"""What is kept of functions: as long as they live, and as JAX traces them as before."""

import gc
import weakref

import jax
import jax.numpy as jnp

import sharding
from sharding.execution.step_trace import trace_step
from sharding.tracing.kept import Kept

SHAPE = jax.ShapeDtypeStruct((8, 16), jnp.float32)


def _jaxpr(function, shape=SHAPE):
    return jax.make_jaxpr(function)(shape).jaxpr


def test_is_made_once_for_a_function_a_key_and_a_trace():
    kept, made = Kept(), []

    def get(function, key, shape=SHAPE):
        jaxpr = _jaxpr(function, shape)
        return kept.get(function, key, jaxpr, lambda: made.append(key) or len(made))

    def double(x):
        return x * 2

    def triple(x):
        return x * 3

    assert [get(double, "a"), get(double, "b"), get(triple, "a")] == [1, 2, 3]
    assert [get(double, "a"), get(double, "b"), get(triple, "a")] == [1, 2, 3]
    # Of other shapes JAX makes another trace: what followed from the first is not given out.
    assert get(double, "a", jax.ShapeDtypeStruct((4, 4), jnp.float32)) == 4


def test_what_jax_traces_again_is_found_again():
    def step(w, x):
        return x @ w

    w = jax.ShapeDtypeStruct((16, 4), jnp.float32)
    first = trace_step(step, (w, SHAPE))
    assert trace_step(step, (w, SHAPE)) is first
    with jax.default_matmul_precision("highest"):
        precise = trace_step(step, (w, SHAPE))
    (before,), (after,) = (found.closed.jaxpr.eqns for found in (first, precise))
    assert before.params["precision"] != after.params["precision"]


def test_roles_are_part_of_what_is_asked():
    def step(w, x):
        return x @ w

    args = (jax.ShapeDtypeStruct((16, 4), jnp.float32), SHAPE)
    stated = trace_step(step, args, state=(0,), data=(1,))
    swapped = trace_step(step, args, state=(1,), data=(0,))
    assert [leaf.role for leaf in stated.inputs] == ["param", "data"]
    # With a batch it is no parameter but a cache.
    assert [leaf.role for leaf in swapped.inputs] == ["data", "state"]


def test_a_plan_of_a_step_that_was_planned_before_is_the_same():
    def step(w, x):
        return jnp.tanh(x @ w) @ w.T

    args = (jax.ShapeDtypeStruct((256, 512), jnp.float32),
            jax.ShapeDtypeStruct((64, 256), jnp.float32))  # fmt: skip
    options = {"state": (0,), "data": (1,)}

    for cluster in ("v5e:2x4", "h100:1x8", "v5e:2x4", "h100:1x4"):
        again = sharding.plan(step, args, cluster=cluster, **options)
        alone = sharding.plan(lambda w, x: step(w, x), args, cluster=cluster, **options)
        assert again.mesh == alone.mesh
        assert again.memory_bytes == alone.memory_bytes
        assert again.prediction.collectives == alone.prediction.collectives


def test_nothing_outlives_the_function():
    def planned():
        def step(w, x):
            return x @ w

        args = (jax.ShapeDtypeStruct((16, 4), jnp.float32), SHAPE)
        sharding.plan(step, args, cluster="v5e:2x4", state=(0,), data=(1,))
        return weakref.ref(step)

    gone = planned()
    gc.collect()
    assert gone() is None


def test_what_cannot_be_known_again_is_made_every_time():
    class Unhashable(list):
        def __call__(self, x):
            return x

    kept, made, function = Kept(), [], Unhashable()
    for _ in range(2):
        kept.get(function, (), _jaxpr(lambda x: x), lambda: made.append(1))
    assert len(made) == 2
