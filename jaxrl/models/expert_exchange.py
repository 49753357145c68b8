"""Experts that are divided among devices: rows travel to the experts that they chose, and back.

Every device routes its own tokens. Under the compiler's partitioner alone all tokens would be
sorted together, which takes them all to every device.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Int32

from jaxrl.models.layout import EXPERT_AXES, HEAD_AXES, SEQUENCE_AXES, Layout
from jaxrl.models.mixture import expert_rows, route


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """How rows and experts meet.

    Attributes:
      experts: of all devices.
      experts_per_token: k, that each token chooses.
      normalise: see `route`.
      activation: of the gate.
      ways: devices that experts are divided among.
      capacity_factor: rows that a device takes from each other, as a multiple of what a balanced
        router would send. Rows beyond are dropped: the token goes on without that expert, its
        other weights unchanged. None: room for whatever comes, and none is dropped.
      summed: mesh axes that divide the inner width of the experts, or ().
    """

    experts: int
    experts_per_token: int
    normalise: bool
    activation: Callable[[Array], Array]
    ways: int
    capacity_factor: float | None
    summed: tuple[str, ...]

    def capacity(self, tokens: int) -> int:
        """Rows that one device has room for from each of the devices.

        Args:
          tokens: of one device. A token's experts differ, so that no more than
            min(k, experts of a device) of its rows go to one device.
        """
        most = tokens * min(self.experts_per_token, self.experts // self.ways)
        if self.capacity_factor is None:
            return most
        balanced = tokens * self.experts_per_token / self.ways
        return min(most, math.ceil(balanced * self.capacity_factor))


def exchanged_experts(
    x: Float[Array, "*batch D"],
    router: Float[Array, "D E"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    layout: Layout,
    *,
    experts_per_token: int,
    normalise: bool,
    activation: Callable[[Array], Array],
    capacity_factor: float | None,
) -> Float[Array, "*batch D"]:
    """`mixture_of_experts` on a mesh: the batch by its axes, experts by "expert".

    Args:
      x: hidden states, [N, D] or [N, S, D].
      router: logits of the experts, computed in float32.
      gate: kernels of all experts, of what the activation takes.
      up: of what it multiplies.
      down: back to the width of `x`.
      layout: the mesh.
      experts_per_token: k.
      normalise: see `route`.
      activation: of the gate.
      capacity_factor: see `Exchange`.

    Raises:
      ValueError: experts that the mesh's expert axis does not divide.
    """
    experts = router.shape[-1]
    if experts % layout.expert_ways:
        raise ValueError(
            f"the expert axis must divide the experts: {layout.expert_ways} devices, {experts=}"
        )
    axes, summed = layout.axes(EXPERT_AXES, experts), layout.axes(HEAD_AXES, gate.shape[-1])
    exchange = Exchange(
        experts=experts, experts_per_token=experts_per_token, normalise=normalise,
        activation=activation, ways=layout.ways(axes), capacity_factor=capacity_factor,
        summed=summed,
    )  # fmt: skip
    rows = [layout.batch(x.shape[0]) or None]
    if x.ndim == 3:
        rows.append(layout.axes(SEQUENCE_AXES, x.shape[1]) or None)
    data = PartitionSpec(*rows)
    wide = PartitionSpec(axes or None, None, summed or None)
    narrow = PartitionSpec(axes or None, summed or None)
    run = jax.shard_map(
        partial(_on_device, exchange), mesh=layout.mesh,
        in_specs=(data, PartitionSpec(), wide, wide, narrow), out_specs=data, check_vma=False,
    )  # fmt: skip
    return run(x, router, gate, up, down)


def _on_device(
    exchange: Exchange,
    x: Float[Array, "*batch D"],
    router: Float[Array, "D E"],
    gate: Float[Array, "e D f"],
    up: Float[Array, "e D f"],
    down: Float[Array, "e f D"],
) -> Float[Array, "*batch D"]:
    tokens = x.reshape(-1, x.shape[-1])
    logits = jnp.matmul(tokens, router, preferred_element_type=jnp.float32)
    weights, chosen = route(
        logits, experts_per_token=exchange.experts_per_token, normalise=exchange.normalise
    )
    sent = _Sent.of(exchange, chosen)
    # Where nothing is sent stands the number after the last expert: such rows are sorted last.
    local = jnp.where(sent.used, sent.expert % gate.shape[0], gate.shape[0])
    rows, local = _swapped(exchange, sent.gathered(tokens)), _swapped(exchange, local)
    order = jnp.argsort(local, stable=True)
    sizes = jnp.bincount(local, length=gate.shape[0]).astype(jnp.int32)
    # A permutation: said so, its gradient is one too, and keeps no record of who wrote last.
    sorted_rows = rows.at[order].get(unique_indices=True)
    out = expert_rows(sorted_rows, gate, up, down, sizes, activation=exchange.activation)
    # What belongs to no expert a backend may leave as it was.
    out = jnp.where((local[order] < gate.shape[0])[:, None], out, 0)
    back = _swapped(exchange, jnp.zeros_like(out).at[order].set(out, unique_indices=True))
    result = sent.returned(back, weights, len(tokens))
    # Once, after all else: a device has the sums over its part of the inner width only.
    result = jax.lax.psum(result, exchange.summed) if exchange.summed else result
    return result.reshape(x.shape)


def _swapped(exchange: Exchange, rows: Array) -> Array:
    """Part i of the rows to device i of the expert axis."""
    if exchange.ways == 1:
        return rows
    return jax.lax.all_to_all(rows, EXPERT_AXES[0], split_axis=0, concat_axis=0, tiled=True)


@dataclass(frozen=True)
class _Sent:
    """The rows that a device sends: `capacity` places for each device.

    Attributes:
      pair: number of the token · k + its choice that stands in each place.
      used: whether one does.
      expert: its expert.
      experts_per_token: k.
    """

    pair: Int32[Array, " R"]
    used: Bool[Array, " R"]
    expert: Int32[Array, " R"]
    experts_per_token: int

    @classmethod
    def of(cls, exchange: Exchange, chosen: Int32[Array, "N k"]) -> "_Sent":
        experts = chosen.reshape(-1)
        order = jnp.argsort(experts, stable=True).astype(jnp.int32)  # and so by device
        capacity = exchange.capacity(chosen.shape[0])
        device = experts // (exchange.experts // exchange.ways)
        counts = jnp.bincount(device, length=exchange.ways)
        first = jnp.cumsum(counts) - counts
        inside = jnp.arange(capacity)[None]
        place = first[:, None] + inside  # among the sorted rows
        used = (inside < counts[:, None]).reshape(-1)
        pair = order[jnp.minimum(place, experts.size - 1).reshape(-1)]
        return cls(pair, used, experts[pair], chosen.shape[1])

    def gathered(self, tokens: Float[Array, "N D"]) -> Float[Array, "R D"]:
        """The rows, and zeros in places of none."""
        return jnp.where(self.used[:, None], tokens[self.pair // self.experts_per_token], 0)

    def returned(
        self, rows: Float[Array, "R D"], weights: Float32[Array, "N k"], tokens: int
    ) -> Float[Array, "N D"]:
        """Sums what came back by token, weighted."""
        weight = jnp.where(self.used, weights.reshape(-1)[self.pair], 0).astype(rows.dtype)
        out = jnp.zeros((tokens, rows.shape[1]), rows.dtype)
        return out.at[self.pair // self.experts_per_token].add(rows * weight[:, None])
