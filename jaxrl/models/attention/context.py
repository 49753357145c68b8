"""Attention of rows that are divided among devices along the sequence (context parallelism).

Every device holds a part of each row's queries, keys and values. It takes the keys and values of
the others in turn, either handed on around a ring (Ring Attention, arXiv:2310.01889) or gathered
at once, and joins what it finds by the running maximum and sum of the softmax, so that scores
exist of two parts only. Parts of which nothing is visible are passed over. In a causal row the
last part would have the most to do; each device therefore holds two pieces, one from the front
and one from the back ("zig-zag", arXiv:2311.09431), and all have the same work.

The functions here run inside `jax.shard_map`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32

from jaxrl.models.attention.pattern import Pattern
from jaxrl.models.attention.plain import Scores, ungrouped, with_groups
from jaxrl.models.cache import KeyValue

_LOWEST = -1e30  # finite: the difference of two such maxima must not become NaN
_PIECES = 2
_product = partial(jnp.einsum, preferred_element_type=jnp.float32)


def zigzag(size: int, ways: int) -> np.ndarray:
    """Columns in the order in which `ways` devices hold them: device i has pieces i and 2·ways-1-i.

    Args:
      size: columns, a multiple of 2 · ways.
      ways: devices.

    >>> zigzag(8, 2)
    array([0, 1, 6, 7, 2, 3, 4, 5])
    """
    pieces = np.arange(size).reshape(_PIECES * ways, -1)
    order = [piece for i in range(ways) for piece in (i, 2 * ways - 1 - i)]
    return pieces[order].reshape(-1)


@dataclass(frozen=True, kw_only=True)
class Division:
    """How a row is divided.

    Attributes:
      axis: mesh axis along which it is.
      ways: devices on that axis.
      exchange: "ring" or "all_gather".
      pattern: which columns see which.
      softcap: of the scores.
    """

    axis: str
    ways: int
    exchange: Literal["ring", "all_gather"]
    pattern: Pattern
    softcap: float | None


class Columns(NamedTuple):
    """Which columns of the rows a device holds, and their segments; 0 is padding."""

    number: Int32[Array, " s"]
    segment: Int32[Array, "n s"]


class _Running(NamedTuple):
    """A softmax under way: Σ weights · values, its maximum and Σ weights."""

    out: Float32[Array, "n s K h d"]
    top: Float32[Array, "n K h s"]
    total: Float32[Array, "n K h s"]


def attend(
    query: Float[Array, "n s Q d"],
    kv: KeyValue,
    columns: Columns,
    division: Division,
    *,
    rule: Scores,
) -> Float[Array, "n s Q d"]:
    """Attention of the rows of which this device holds some columns, under `jax.shard_map`.

    Args:
      query: rotated queries of the columns held.
      kv: rotated keys, and values, of the same columns.
      columns: which they are.
      division: how the rows are divided.
      rule: the scale of the scores; their cap is the division's.
    """
    grouped = with_groups(query, kv.key.shape[-2], rule)
    return ungrouped(_attend(division, grouped, kv, columns))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(division: Division, query: Array, kv: KeyValue, columns: Columns) -> Array:
    return _forward(division, query, kv, columns)[0]


def _forward(division: Division, query: Array, kv: KeyValue, columns: Columns) -> Any:
    n, size, kv_heads, group, _ = query.shape
    running = _Running(
        jnp.zeros(query.shape, jnp.float32),
        jnp.full((n, kv_heads, group, size), _LOWEST, jnp.float32),
        jnp.zeros((n, kv_heads, group, size), jnp.float32),
    )

    def visit(running: _Running, kv: KeyValue, theirs: Columns, _: Any) -> tuple[_Running, None]:
        return _join(division, running, query, kv, columns, theirs), None

    running, _ = _tour(division, visit, running, kv, columns, None)
    total = jnp.maximum(running.total, jnp.finfo(jnp.float32).tiny)  # padding may see nothing
    out = running.out / _by_column(total)
    log_total = running.top + jnp.log(total)
    return out.astype(query.dtype), (query, kv, columns, out.astype(query.dtype), log_total)


def _backward(division: Division, saved: Any, cotangent: Array) -> Any:
    query, kv, columns, out, log_total = saved
    mean = jnp.einsum("nskhd,nskhd->nkhs", cotangent.astype(jnp.float32), out.astype(jnp.float32))
    given = _Given(query, cotangent, log_total, mean)

    def visit(of_query: Array, kv: KeyValue, theirs: Columns, of_kv: KeyValue) -> Any:
        return _differentiate(division, of_query, of_kv, given, kv, columns, theirs)

    zeros = KeyValue(*(jnp.zeros(x.shape, jnp.float32) for x in kv))
    of_query, of_kv = _tour(
        division, visit, jnp.zeros(query.shape, jnp.float32), kv, columns, zeros
    )
    of_kv = KeyValue(*(g.astype(x.dtype) for g, x in zip(of_kv, kv, strict=True)))
    return of_query.astype(query.dtype), of_kv, None


_attend.defvjp(_forward, _backward)


def _tour(
    division: Division,
    visit: Callable[..., tuple[Any, Any]],
    state: Any,
    kv: KeyValue,
    columns: Columns,
    sums: KeyValue | None,
) -> tuple[Any, Any]:
    """Visits the keys and values of every device, its own first.

    Args:
      division: how they are divided.
      visit: (state, keys and values, their columns, sums of their gradients) -> state, sums.
      state: stays here.
      kv: of this device.
      columns: of this device.
      sums: travel with the keys and values that they belong to, and come home; None: there are
        none.
    """
    if division.exchange == "ring":
        around = [(i, (i + 1) % division.ways) for i in range(division.ways)]

        def step(carry: Any, _: None) -> tuple[Any, None]:
            state, kv, theirs, sums = carry
            state, sums = visit(state, kv, theirs, sums)
            return (state, *_handed_on((kv, theirs, sums), division.axis, around)), None

        carry = state, kv, columns, sums
        if sums is not None:  # gradients have to come home: one step more
            (state, _, _, sums), _ = jax.lax.scan(step, carry, length=division.ways)
            return state, sums
        (state, kv, theirs, _), _ = jax.lax.scan(step, carry, length=division.ways - 1)
        return visit(state, kv, theirs, None)

    everything = jax.tree.map(partial(jax.lax.all_gather, axis_name=division.axis), (kv, columns))

    def each(state: Any, part: Any) -> tuple[Any, Any]:
        empty = None if sums is None else jax.tree.map(jnp.zeros_like, sums)
        return visit(state, *part, empty)

    state, of_all = jax.lax.scan(each, state, everything)
    if sums is None:
        return state, None
    return state, jax.tree.map(
        lambda x: jax.lax.psum_scatter(x, division.axis, scatter_dimension=0), of_all
    )


def _handed_on(tree: Any, axis: str, around: list[tuple[int, int]]) -> Any:
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, around), tree)


def _pieces(x: Array, axis: int) -> list[Array]:
    """The two pieces that a device holds, where its columns are even in number."""
    return jnp.split(x, _PIECES, axis=axis) if x.shape[axis] % _PIECES == 0 else [x]


def _visible(division: Division, mine: Columns, theirs: Columns) -> Bool[Array, "n s t"]:
    seen = division.pattern.visible(mine.number[:, None], theirs.number[None])[None]
    same = mine.segment[:, :, None] == theirs.segment[:, None]
    return seen & same & (theirs.segment[:, None] != 0)


def _split_columns(columns: Columns) -> list[Columns]:
    pairs = zip(_pieces(columns.number, 0), _pieces(columns.segment, 1), strict=True)
    return [Columns(*pair) for pair in pairs]


def _scores(
    division: Division, query: Array, key: Array
) -> tuple[Float32[Array, "n K h s t"], Float32[Array, "n K h s t"] | float]:
    """Scores, and the derivative of the soft cap at each."""
    raw = _product("nskhd,ntkd->nkhst", query, key)
    if division.softcap is None:
        return raw, 1.0
    bent = jnp.tanh(raw / division.softcap)
    return bent * division.softcap, 1.0 - bent * bent


def _where_seen(visible: Bool[Array, "n s t"], change: Callable[[Any], Any], state: Any) -> Any:
    """The changed state, or at no cost the same one where nothing is visible."""
    return jax.lax.cond(jnp.any(visible), change, lambda state: state, state)


def _join(
    division: Division,
    running: _Running,
    query: Array,
    kv: KeyValue,
    mine: Columns,
    theirs: Columns,
) -> _Running:
    """Adds the keys and values of one device to the softmax, piece by piece."""
    joined = []
    rows = zip(
        _pieces(query, 1), _pieces(running.out, 1), _pieces(running.top, 3),
        _pieces(running.total, 3), _split_columns(mine), strict=True,
    )  # fmt: skip
    for part, out, top, total, own in rows:
        state = _Running(out, top, total)
        pieces = zip(_pieces(kv.key, 1), _pieces(kv.value, 1), _split_columns(theirs), strict=True)
        for key, value, their in pieces:
            visible = _visible(division, own, their)
            change = partial(_join_piece, division, part, KeyValue(key, value), visible)
            state = _where_seen(visible, change, state)
        joined.append(state)
    return _Running(
        jnp.concatenate([s.out for s in joined], axis=1),
        jnp.concatenate([s.top for s in joined], axis=3),
        jnp.concatenate([s.total for s in joined], axis=3),
    )


def _join_piece(
    division: Division, query: Array, kv: KeyValue, visible: Array, state: _Running
) -> _Running:
    """The online softmax: what was summed is scaled to the new maximum."""
    scores, _ = _scores(division, query, kv.key)
    seen = visible[:, None, None]
    top = jnp.maximum(state.top, jnp.max(jnp.where(seen, scores, _LOWEST), axis=-1))
    weights = jnp.where(seen, jnp.exp(scores - top[..., None]), 0.0)
    kept = jnp.exp(state.top - top)
    added = _product("nkhst,ntkd->nskhd", weights.astype(kv.value.dtype), kv.value)
    return _Running(
        state.out * _by_column(kept) + added, top, state.total * kept + jnp.sum(weights, axis=-1)
    )


class _Given(NamedTuple):
    """What the backward pass knows of queries.

    Attributes:
      query: grouped and scaled.
      cotangent: of their results.
      log_total: of the softmax: log Σ exp(score).
      mean: Σ over keys of weight · its gradient, which the softmax takes off each.
    """

    query: Float[Array, "n s K h d"]
    cotangent: Float[Array, "n s K h d"]
    log_total: Float32[Array, "n K h s"]
    mean: Float32[Array, "n K h s"]

    def pieces(self) -> list["_Given"]:
        axes = (1, 1, 3, 3)
        parts = (_pieces(x, axis) for x, axis in zip(self, axes, strict=True))
        return [_Given(*piece) for piece in zip(*parts, strict=True)]


def _differentiate(
    division: Division,
    of_query: Array,
    of_kv: KeyValue,
    given: _Given,
    kv: KeyValue,
    mine: Columns,
    theirs: Columns,
) -> tuple[Array, KeyValue]:
    """Adds what the keys and values of one device give to queries and get from them."""
    keys, values, their = _pieces(kv.key, 1), _pieces(kv.value, 1), _split_columns(theirs)
    to_keys, to_values = _pieces(of_kv.key, 1), _pieces(of_kv.value, 1)
    done = []
    rows = zip(_split_columns(mine), _pieces(of_query, 1), given.pieces(), strict=True)
    for own, to_query, part in rows:
        for i, (key, value) in enumerate(zip(keys, values, strict=True)):
            visible = _visible(division, own, their[i])
            change = partial(_differentiate_piece, division, part, KeyValue(key, value), visible)
            sums = to_query, to_keys[i], to_values[i]
            to_query, to_keys[i], to_values[i] = _where_seen(visible, change, sums)
        done.append(to_query)
    of_kv = KeyValue(jnp.concatenate(to_keys, axis=1), jnp.concatenate(to_values, axis=1))
    return jnp.concatenate(done, axis=1), of_kv


def _differentiate_piece(
    division: Division,
    given: _Given,
    kv: KeyValue,
    visible: Array,
    sums: tuple[Array, Array, Array],
) -> tuple[Array, Array, Array]:
    """Gradients to queries, keys and values, with weights made again from their logarithm's sum."""
    to_query, to_key, to_value = sums
    scores, bend = _scores(division, given.query, kv.key)
    weights = jnp.where(visible[:, None, None], jnp.exp(scores - given.log_total[..., None]), 0.0)
    of_value = _product("nkhst,nskhd->ntkd", weights.astype(kv.value.dtype), given.cotangent)
    of_weights = _product("nskhd,ntkd->nkhst", given.cotangent, kv.value)
    of_scores = weights * (of_weights - given.mean[..., None]) * bend
    of_scores = of_scores.astype(given.query.dtype)
    of_query = _product("nkhst,ntkd->nskhd", of_scores, kv.key)
    of_key = _product("nkhst,nskhd->ntkd", of_scores, given.query)
    return to_query + of_query, to_key + of_key, to_value + of_value


def _by_column(x: Float32[Array, "n K h s"]) -> Float32[Array, "n s K h 1"]:
    return jnp.moveaxis(x, 3, 1)[..., None]
