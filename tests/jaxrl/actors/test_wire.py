"""Results as bytes: what goes in comes out, and what was not put in is refused."""

import contextlib
import dataclasses
import json

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl.actors import Refusal, Result, WorkItem
from jaxrl.actors.wire import (
    Malformed,
    item_from_json,
    item_to_json,
    result_from_wire,
    result_to_wire,
)


def same(a, b):
    assert jax.tree.structure(a.rollouts) == jax.tree.structure(b.rollouts)
    for x, y in zip(jax.tree.leaves(a.rollouts), jax.tree.leaves(b.rollouts), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
    assert dataclasses.replace(a, rollouts=None) == dataclasses.replace(b, rollouts=None)


def test_a_result_survives_the_way_through_json_and_bytes(make_item, make_result):
    result = make_result(make_item(4))
    greedy = {"reward": np.float32([1, 2]), "cost": np.float32([0, -1])}
    for rollouts in (result.rollouts, result.rollouts.replace(greedy=greedy)):
        whole = dataclasses.replace(result, rollouts=rollouts)
        header, body = result_to_wire(whole)
        same(result_from_wire(json.loads(json.dumps(header)), body), whole)
        assert len(body) == sum(x.nbytes for x in jax.tree.leaves(rollouts))


def test_a_refusal_survives_too():
    refusal = Refusal(reason="scores", detail="NaN", item=3, actor="a")
    result = Result(item=3, actor="a", version=1, rollouts=None, refusal=refusal)
    header, body = result_to_wire(result)
    assert (result_from_wire(json.loads(json.dumps(header)), body), body) == (result, b"")


def test_an_item_survives(make_item):
    item = make_item(5, rows=(0, 2), min_version=9)
    assert item_from_json(json.loads(json.dumps(item_to_json(item)))) == item
    assert isinstance(item, WorkItem)
    for broken in ({}, {"id": 1.5}, item_to_json(item) | {"rows": "ab"}, {"id": True}):
        with pytest.raises(Malformed):
            item_from_json(broken)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["arrays"][0].__setitem__(1, "object"), "no result: KeyError"),
        (lambda h: h["arrays"][0].__setitem__(2, [1 << 40, 1 << 40]), "needs bytes up to"),
        (lambda h: h["arrays"][0].__setitem__(2, [-2, -4]), "impossible"),
        (lambda h: h["arrays"].append(["tokens", "int32", [0]]), "comes twice"),
        (lambda h: h["arrays"].pop(), "belong to no array"),
        (lambda h: h.pop("version"), "KeyError"),
        (lambda h: h.__setitem__("timings", {"sleep": 1.0}), "TypeError"),
        (lambda h: h.__setitem__("refusal", {"reason": 1}), "KeyError"),
    ],
)
def test_headers_that_lie_are_refused(make_item, make_result, change, message):
    header, body = result_to_wire(make_result(make_item(4)))
    header = json.loads(json.dumps(header))
    change(header)
    with pytest.raises(Malformed, match=message):
        result_from_wire(header, body)


def test_a_truth_value_is_0_or_1(make_item, make_result):
    header, body = result_to_wire(make_result(make_item(4)))
    before = sum(4 * np.prod(s) for n, _, s in header["arrays"][:1] if n == "prompts.tokens")
    damaged = bytearray(body)
    damaged[int(before)] = 7  # the first byte of prompts.mask
    with pytest.raises(Malformed, match="other bytes than 0 and 1"):
        result_from_wire(header, bytes(damaged))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(["item", "version", "refusal", "timings", "arrays", "actor"]), JSON)
def test_whatever_stands_in_a_header_gives_a_result_or_malformed(field, value):
    header = {"item": 0, "actor": "a", "version": 0, "refusal": None, "timings": {}, "arrays": []}
    with contextlib.suppress(Malformed):
        assert isinstance(result_from_wire(header | {field: value}, b""), Result)
