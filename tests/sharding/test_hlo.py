"""Collectives read from HLO, against programs whose collectives are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sharding.hlo import Traffic, collectives


def _compiled(run, *shapes_and_specs):
    mesh = Mesh(np.asarray(jax.devices()), ("x",))
    args = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in shapes_and_specs
    ]
    out = NamedSharding(mesh, P())
    return jax.jit(run, out_shardings=out).lower(*args).compile().as_text()


def test_a_sum_over_devices_is_one_all_reduce():
    text = _compiled(lambda x: x.sum(0), ((16, 8), P("x")))
    assert collectives(text) == {"all-reduce": Traffic(1, 8 * 4)}


def test_a_gather_returns_the_whole():
    text = _compiled(lambda x: x * 2, ((16, 8), P("x")))
    assert collectives(text) == {"all-gather": Traffic(1, 16 * 8 * 4)}


def test_what_is_whole_needs_none():
    assert collectives(_compiled(lambda x: x * 2, ((16, 8), P()))) == {}


def test_a_loop_counts_as_often_as_it_runs():
    def run(x, weights):
        return jax.lax.scan(lambda c, w: ((c @ w) @ w.T, None), x, weights)[0]

    text = _compiled(run, ((4, 8), P()), ((5, 8, 16), P(None, None, "x")))
    assert collectives(text)["all-reduce"] == Traffic(5, 5 * 4 * 8 * 4)


def test_asynchronous_and_scattered_forms():
    text = """HloModule m

ENTRY %main (p: f32[8,4]) -> f32[2,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %g = (f32[8,4]{1,0}, f32[32,4]{1,0}) all-gather-start(%p), replica_groups=[2,4]<=[8]
  %d = f32[32,4]{1,0} all-gather-done(%g)
  ROOT %s = bf16[2,4]{1,0} reduce-scatter(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}
"""
    # Of a start the largest shape is the result; a reduce-scatter takes in four times its result.
    assert collectives(text) == {
        "all-gather": Traffic(1, 32 * 4 * 4),
        "reduce-scatter": Traffic(1, 4 * 2 * 4 * 2),
    }


def test_text_that_is_no_module_is_refused():
    with pytest.raises(ValueError, match="no HLO module"):
        collectives("nothing")
