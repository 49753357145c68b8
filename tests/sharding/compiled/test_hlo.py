"""Collectives read from HLO, against programs whose collectives are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sharding.compiled.hlo import Group, Traffic, groups
from sharding.compiled.hlo import collectives as by_kind


def collectives(text):
    return by_kind(groups(text))


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


def test_the_start_of_an_exchange_counts_what_it_returns():
    text = """HloModule m

ENTRY %main (p: bf16[4,8]) -> bf16[4,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  %s = ((bf16[4,8]{1,0}), bf16[4,8]{1,0}) all-to-all-start(%p), replica_groups=[2,4]<=[8]
  ROOT %d = bf16[4,8]{1,0} all-to-all-done(%s)
}
"""
    assert collectives(text) == {"all-to-all": Traffic(1, 4 * 8 * 2)}


def test_asynchronous_and_scattered_forms():
    text = """HloModule m

ENTRY %main (p: f32[8,4]) -> f32[2,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %g = (f32[8,4]{1,0}, f32[32,4]{1,0}) all-gather-start(%p), replica_groups=[2,4]<=[8]
  %d = f32[32,4]{1,0} all-gather-done(%g)
  ROOT %s = bf16[2,4]{1,0} reduce-scatter(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}
"""
    # Of a start the second half is the result; a reduce-scatter takes in four times its result.
    assert collectives(text) == {
        "all-gather": Traffic(1, 32 * 4 * 4),
        "reduce-scatter": Traffic(1, 4 * 2 * 4 * 2),
    }


def test_groups_are_read_in_every_notation():
    text = """HloModule m

ENTRY %main (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %a = f32[4]{0} all-reduce(%p), replica_groups={{0,1},{2,3}}, to_apply=%add
  %b = f32[4]{0} all-reduce(%a), replica_groups=[2,4]<=[8], to_apply=%add
  %c = f32[4]{0} all-reduce(%b), replica_groups=mesh['x'=8,'y'=2] {'x'}, to_apply=%add
  %d = f32[4]{0} all-reduce(%c), replica_groups=mesh['x'=8,'y'=3] {'x':(2)4,'y'}, to_apply=%add
  ROOT %e = f32[4]{0} all-reduce(%d), replica_groups={{0},{1}}, to_apply=%add
}
"""
    assert groups(text) == [Group("all-reduce", n, 1, 16) for n in (2, 4, 8, 12)]


def test_steps_of_one_asynchronous_collective_are_one():
    text = """HloModule m

%start (p: f32[2]) -> f32[8] {
  ROOT %g = f32[8]{0} all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4]
}

%step (p: f32[2]) -> f32[8] {
  ROOT %h = f32[8]{0} all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4]
}

ENTRY %main (p: f32[2]) -> f32[8] {
  %p = f32[2]{0} parameter(0)
  %s = f32[8]{0} fusion(%p), kind=kCustom, calls=%start
  ROOT %t = f32[8]{0} fusion(%p), kind=kCustom, calls=%step
}
"""
    assert collectives(text) == {"all-gather": Traffic(1, 32)}


def test_collectives_that_a_program_asks_for_itself_share_a_channel():
    text = """HloModule m

ENTRY %main (p: bf16[4,8]) -> bf16[4,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  %i = s32[4]{0} parameter(1)
  %a = bf16[4,8]{1,0} all-to-all(%p), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  %b = s32[4]{0} all-to-all(%i), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %c = bf16[4,8]{1,0} all-to-all(%a), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
}
"""
    assert collectives(text) == {"all-to-all": Traffic(3, 64 + 16 + 64)}


def test_a_windowed_product_counts_as_the_gather_that_it_stands_for():
    # Four devices, two parts sent in each of two rounds; an outer loop that runs three times.
    text = """HloModule m

%windowed_dot_general_body_ag (q: (f32[2], u32[])) -> (f32[2], u32[]) {
  %q = (f32[2]{0}, u32[]) parameter(0)
  %x = f32[2]{0} get-tuple-element(%q), index=0
  %y = f32[2]{0} collective-permute(%x), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  ROOT %r = (f32[2]{0}, u32[]) tuple(%y, %n)
}

%body (q: (f32[2], s32[])) -> (f32[2], s32[]) {
  %q = (f32[2]{0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%q), index=1
  %two = s32[] constant(2)
  %j = s32[] add(%i, %two)
  %w = (f32[2]{0}, u32[]) while(%t), condition=%c, body=%windowed_dot_general_body_ag
  ROOT %r = (f32[2]{0}, s32[]) tuple(%v, %j)
}

%condition (q: (f32[2], s32[])) -> pred[] {
  %q = (f32[2]{0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%q), index=1
  %six = s32[] constant(6)
  ROOT %less = pred[] compare(%i, %six), direction=LT
}

ENTRY %main (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  %w = (f32[2]{0}, s32[]) while(%t), condition=%condition, body=%body
  ROOT %o = f32[2]{0} get-tuple-element(%w), index=0
}
"""
    assert groups(text) == [Group("all-gather", 4, 3, 3 * 4 * 8)]


def test_text_that_is_no_module_is_refused():
    with pytest.raises(ValueError, match="no HLO module"):
        groups("nothing")
