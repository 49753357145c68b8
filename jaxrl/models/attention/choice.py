"""Which attention runs: the switch, what each implementation cannot do, and its mesh axes."""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int32

import sharding
from jaxrl.models.attention import context, cudnn, plain, splash
from jaxrl.models.attention.pattern import Pattern
from jaxrl.models.attention.plain import Scores, Window
from jaxrl.models.cache import KeyValue
from jaxrl.models.layout import SEQUENCE_AXES, Layout, platform, unknown_axes

_LOG = logging.getLogger(__name__)

Implementation = Literal["auto", "xla", "splash", "cudnn"]
IMPLEMENTATIONS = ("auto", "xla", "splash", "cudnn")
ContextExchange = Literal["auto", "ring", "all_gather", "partitioner"]
CONTEXT_EXCHANGES = ("auto", "ring", "all_gather", "partitioner")

UNLIMITED = 1 << 30  # the window of a layer without one, where other layers have one
_OF_PLATFORM = {"tpu": "splash", "gpu": "cudnn"}
_NO_MESH = (
    "there are several devices and no mesh in the context, so nobody knows how arrays are divided; "
    "enter `jax.set_mesh(plan.bind().mesh)` for a kernel"
)


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Attention of whole rows, as a model's configuration wants it.

    Attributes:
      implementation: "splash" (TPU), "cudnn" (GPU) or "xla"; "auto" takes the kernel of the
        machine that the program is for. What a kernel cannot do, XLA does, and the log says why.
        "splash" on a CPU runs in Pallas' interpreter.
      exchange: how keys and values travel where the mesh has a context axis of several devices:
        around a "ring", by "all_gather", or as the compiler's "partitioner" likes. What is
        gathered on TPUs splash kernels read; a ring computes its scores in XLA, of two devices'
        columns at a time. "auto" gathers where the kernels read it, and is a ring elsewhere.
      rule: scale and soft cap of the scores.
      windows: of every layer, or ().
    """

    implementation: Implementation = "auto"
    exchange: ContextExchange = "auto"
    rule: Scores = field(default_factory=Scores)
    windows: tuple[int | None, ...] = ()

    def width(self, size: int) -> int:
        """Columns that a row of `size` has to be filled up to, so that devices divide it."""
        ways = self._context_ways
        return size if ways == 1 else size + -size % (2 * ways)

    def order(self, pattern: Pattern, size: int) -> np.ndarray | None:
        """Order in which columns have to stand, for the whole of the network; None: as they are.

        A prompt with completions stays as it is: the columns of completions, each of which sees
        the prompt and itself, have about the same to do.
        """
        ways = self._context_ways
        return None if ways == 1 or pattern.completion else context.zigzag(size, ways)

    def __call__(
        self,
        query: Float[Array, "N S Q d"],
        kv: KeyValue,
        segments: Int32[Array, "N S"],
        pattern: Pattern,
        *,
        window: Window = None,
        packed: bool,
    ) -> Float[Array, "N S Q d"]:
        """Attention of rows whose columns stand in `order`.

        Args:
          query: rotated queries.
          kv: rotated keys, and values, [N, S, K, d].
          segments: 0 marks padding; a column sees columns of its own segment only.
          pattern: which columns see which, besides, in their natural order.
          window: of this layer, which inside a scan may be an array.
          packed: a row may hold several segments, not only one and padding.
        """
        if self._context_ways > 1:
            run = functools.partial(self._divided, query, kv, segments, pattern)
            return self._by_window(run, window)
        chosen = self._chosen(query, kv, pattern, packed)
        if chosen == "xla":
            return plain.rows(query, kv, segments, pattern, rule=self.rule, window=window)

        def kernel(window: int | None) -> Float[Array, "N S Q d"]:
            of_layer = replace(pattern, window=window)
            if chosen == "splash":
                interpret = platform() == "cpu"
                run = functools.partial(
                    splash.attend, pattern=of_layer, rule=self.rule, interpret=interpret
                )
            else:
                run = functools.partial(
                    cudnn.attend, pattern=of_layer, rule=self.rule, packed=packed
                )
            return _on_each_device(run, query, kv, segments)

        return self._by_window(kernel, window)

    @property
    def _context_ways(self) -> int:
        layout = Layout.current()
        return 1 if layout is None or self.exchange == "partitioner" else layout.context_ways

    def _chosen(self, query: Array, kv: KeyValue, pattern: Pattern, packed: bool) -> str:
        wanted = self.implementation
        if wanted == "auto":
            wanted = _OF_PLATFORM.get(platform(), "xla")
            alone = Layout.current() is None and not unknown_axes()
            here = sharding.planned_for() is None
            if wanted != "xla" and here and alone and jax.device_count() > 1:
                return _instead_of(wanted, _NO_MESH)
        if wanted != "xla" and unknown_axes():
            return _instead_of(
                wanted, f"the mesh has axes {', '.join(unknown_axes())}, and only those named as "
                "the planner's (data, fsdp, expert, tensor, context, stage) say what they divide"
            )  # fmt: skip
        if wanted == "splash" and platform() == "gpu":
            return _instead_of(wanted, "its kernels are for TPUs")
        if wanted == "cudnn":
            obstacle = "it runs on NVIDIA GPUs"
            if platform() == "gpu":
                windows = {replace(pattern, window=w) for w in self.windows or (None,)}
                found = (
                    cudnn.obstacle(query, kv, of_layer, rule=self.rule, packed=packed)
                    for of_layer in windows
                )
                obstacle = next(filter(None, found), "")
            if obstacle:
                return _instead_of(wanted, obstacle)
        return wanted

    def _by_window(
        self, run: Callable[[int | None], Float[Array, "N S Q d"]], window: Window
    ) -> Float[Array, "N S Q d"]:
        """`run` with the layer's window as a number, of those that the layers have."""
        kinds = tuple(dict.fromkeys(self.windows)) or (None,)
        if len(kinds) == 1:
            return run(kinds[0])
        if sharding.planned_for() is not None:  # of branches it counts all; a layer takes one
            return run(max(kinds, key=lambda w: UNLIMITED if w is None else w))
        numbers = jnp.asarray([UNLIMITED if w is None else w for w in kinds], jnp.int32)
        place = jnp.argmax(numbers == window)
        return jax.lax.switch(place, [functools.partial(run, w) for w in kinds])

    def _divided(
        self, query: Array, kv: KeyValue, segments: Array, pattern: Pattern, window: int | None
    ) -> Float[Array, "N S Q d"]:
        """Attention of rows that are divided along the sequence."""
        layout = cast(Layout, Layout.current())
        size = query.shape[1]
        order = self.order(pattern, size)
        index = np.asarray(np.arange(size) if order is None else order, np.int32)
        batch, heads, kv = _head_axes(layout, query, kv)
        row = PartitionSpec(batch, SEQUENCE_AXES, heads)
        of_layer = replace(pattern, window=window)
        for_splash = self._gathers_for_splash()
        if for_splash and sharding.planned_for() is not None:
            run = functools.partial(
                splash.attend_part_planned, pattern=of_layer, axis=SEQUENCE_AXES[0], rule=self.rule
            )
            return _on_columns(
                run, jnp.asarray(index), PartitionSpec(SEQUENCE_AXES), query, kv, segments, row
            )
        if for_splash:
            kernels = splash.divided(
                index.reshape(layout.context_ways, -1), of_layer,
                query.shape[2] // layout.ways(heads or ()), rule=self.rule,
                interpret=platform() == "cpu",
            )  # fmt: skip
            run = functools.partial(splash.attend_part, axis=SEQUENCE_AXES[0], rule=self.rule)
            masks = kernels.manual_sharding_spec(
                NamedSharding(layout.mesh, PartitionSpec(None, SEQUENCE_AXES))
            )
            return _on_columns(run, kernels, masks, query, kv, segments, row)
        exchange: Literal["ring", "all_gather"] = (
            "all_gather" if self.exchange == "all_gather" else "ring"
        )
        division = context.Division(
            axis=SEQUENCE_AXES[0], ways=layout.context_ways, exchange=exchange,
            pattern=of_layer, softcap=self.rule.softcap,
        )  # fmt: skip
        # Specs stand where the tree that they are for has arrays, which its annotations do not say.
        columns = context.Columns(PartitionSpec(SEQUENCE_AXES), PartitionSpec(batch, SEQUENCE_AXES))  # type: ignore[arg-type]
        run = jax.shard_map(
            functools.partial(context.attend, division=division, rule=self.rule),
            mesh=layout.mesh, in_specs=(row, KeyValue(row, row), columns), out_specs=row,  # type: ignore[arg-type]
            check_vma=False,
        )  # fmt: skip
        return run(query, kv, context.Columns(jnp.asarray(index), segments))

    def _gathers_for_splash(self) -> bool:
        if self.exchange not in ("auto", "all_gather") or platform() == "gpu":
            return False
        # Gradients of what was gathered are summed, for which XLA:TPU (libtpu 0.0.42) has no code
        # along an odd number of devices: "AllReduce fusion with 3 sized replica_groups".
        even = self._context_ways % 2 == 0
        automatic = self.implementation == "auto" and platform() == "tpu"
        return even and (self.implementation == "splash" or automatic)


def _on_columns(
    run: Callable[..., Array],
    extra: Any,
    extra_spec: Any,
    query: Array,
    kv: KeyValue,
    segments: Array,
    row: PartitionSpec,
) -> Float[Array, "N S Q d"]:
    """`run` on the columns of each device, which has its own part of `extra`, as its spec says."""
    layout = cast(Layout, Layout.current())
    batch, sequence, _ = row
    # Specs stand where `KeyValue` has arrays, which its annotations do not say.
    divided = jax.shard_map(
        run, mesh=layout.mesh, out_specs=row, check_vma=False,
        in_specs=(extra_spec, row, KeyValue(row, row), PartitionSpec(batch, sequence)),  # type: ignore[arg-type]
    )  # fmt: skip
    return divided(extra, query, kv, segments)


def _on_each_device(
    run: Callable[..., Array], query: Array, kv: KeyValue, segments: Array
) -> Float[Array, "N S Q d"]:
    """A kernel on the rows and heads of each device; the compiler cannot divide one."""
    layout = Layout.current()
    if layout is None:
        return run(query, kv, segments)
    batch, heads, kv = _head_axes(layout, query, kv)
    row = PartitionSpec(batch, None, heads)
    # Specs stand where `KeyValue` has arrays, which its annotations do not say.
    divided = jax.shard_map(
        run, mesh=layout.mesh, in_specs=(row, KeyValue(row, row), PartitionSpec(batch)),  # type: ignore[arg-type]
        out_specs=row, check_vma=False,
    )  # fmt: skip
    return divided(query, kv, segments)


def _head_axes(
    layout: Layout, query: Array, kv: KeyValue
) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None, KeyValue]:
    """Axes that divide rows and heads, and keys and values with as many heads as these need.

    Fewer key heads than devices are repeated: each device then holds the one that it reads.
    """
    batch, heads = layout.batch(query.shape[0]), layout.heads(query.shape[2])
    ways, kv_heads = layout.ways(heads), kv.key.shape[2]
    if kv_heads % ways:
        if ways % kv_heads:
            return batch or None, None, kv
        kv = KeyValue(*(jnp.repeat(x, ways // kv_heads, axis=2) for x in kv))
    return batch or None, heads or None, kv


def _instead_of(wanted: str, reason: str) -> str:
    _say(f"attention by XLA instead of {wanted}: {reason}")
    return "xla"


@functools.cache
def _say(message: str) -> None:
    """Once: a program is traced many times."""
    _LOG.warning(message)
