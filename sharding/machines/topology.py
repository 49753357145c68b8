"""Clusters: chips, how they are wired, and how fast a group of them exchanges data.

A cluster comes from a name (`v5p:8x8x16x2slices`, `h100:8x8`), from JAX devices, or from a JSON
file for anything else: mixed chips, links of different speed, a bandwidth matrix between nodes.
"""

import functools
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from sharding.machines.torus import AXES, Torus, assign, factorings
from sharding.programs.fused import Platform

# What a file holds that describes a cluster.
_FIELDS = {"name", "chip", "shape", "slices", "nodes", "bandwidth", "measured"}
_NODE = '{"chip": NAME, "count": CHIPS}'
_FORMS = (
    'it holds {"chip": NAME, "shape": [SIZES], "slices": N} or {"nodes": [' + _NODE + ", ...], "
    '"bandwidth": [[bytes/s between nodes]]}'
)
# What a group gets that the wires cannot hold: so slow that no search takes it.
_IMPOSSIBLE = 1.0


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One chip of the catalogue; see `catalog/chips.json` for units and sources.

    Attributes:
      name: its key in the catalogue.
      kind: "torus" or "switch".
      peak_flops: operand type ("bf16", "fp8", "fp4") to FLOP/s, dense.
      memory_bytes: device memory.
      hbm_bytes_per_s: bandwidth of that memory.
      link_bytes_per_s: one way; of a torus link, or of a chip into its switch.
      torus_rank: dimensions of the torus, 0 for a switch.
      wrap: torus dimensions that are a multiple of this are closed to rings.
      devices_per_chip: JAX devices that a chip shows.
      chips_per_host: chips that share a host (torus) or a switch domain (switch).
      host_bytes_per_s: one way, from a host or domain to the network between them.
      pcie_bytes_per_s: one way, between a chip and its host's memory.
      host_memory_bytes: of the host, a chip's share.
      matrix_tile: edge of the matrix unit or of the output tile of a product.
      largest: largest torus sold, or None.
      aliases: other spellings, lower case.
      source: where the figures are from.
    """

    name: str
    kind: str
    peak_flops: Mapping[str, float]
    memory_bytes: float
    hbm_bytes_per_s: float
    link_bytes_per_s: float
    torus_rank: int
    wrap: int
    devices_per_chip: int
    chips_per_host: int
    host_bytes_per_s: float
    pcie_bytes_per_s: float
    host_memory_bytes: float
    matrix_tile: int
    largest: tuple[int, ...] | None
    aliases: tuple[str, ...]
    source: str


@dataclass(frozen=True, kw_only=True)
class Node:
    """A group of equal chips behind one network interface.

    Attributes:
      chip: what it holds.
      count: how many.
      link_bytes_per_s: one way, a chip to its neighbours in the node.
      network_bytes_per_s: one way, the node to others.
    """

    chip: Chip
    count: int
    link_bytes_per_s: float
    network_bytes_per_s: float


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Chips and wires.

    Attributes:
      name: for reports.
      chip: the chip; of a mixed cluster, the one with the least memory.
      shape: torus dimensions of one slice, or (nodes, chips a node).
      slices: tori joined by the data-centre network.
      nodes: the nodes one by one if they differ, else empty.
      bandwidth: bytes/s one way between every pair of nodes, or empty.
      warnings: what is unusual about it.
      measured: fields of `sharding.costs.constants.Constants` that were measured on it, which take
        the place of the calibrated ones; `sharding.profile` makes them.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1
    nodes: tuple[Node, ...] = ()
    bandwidth: tuple[tuple[float, ...], ...] = ()
    warnings: tuple[str, ...] = field(default=())
    measured: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.shape or min(self.shape) < 1 or self.slices < 1:
            raise ValueError(f"cluster needs positive sizes: {self.shape=}, {self.slices=}")
        if self.bandwidth and any(len(r) != len(self.bandwidth) for r in self.bandwidth):
            raise ValueError("bandwidth is a square matrix, one row and column a node")

    @property
    def chip_count(self) -> int:
        """Chips of all slices or nodes."""
        if self.nodes:
            return sum(node.count for node in self.nodes)
        return math.prod(self.shape) * self.slices

    @property
    def device_count(self) -> int:
        """JAX devices."""
        return self.chip_count * self.chip.devices_per_chip

    @property
    def memory_bytes(self) -> float:
        """Memory of one device, the smallest of a mixed cluster."""
        return self.chip.memory_bytes / self.chip.devices_per_chip

    @property
    def is_mixed(self) -> bool:
        """Whether its chips differ in speed or memory."""
        return len({repr(node.chip) for node in self.nodes}) > 1

    @property
    def is_torus(self) -> bool:
        """Whether chips are wired as a torus."""
        return self.chip.kind == "torus"

    @property
    def platform(self) -> Platform:
        """What JAX calls its kind of device."""
        if self.chip.name == "cpu":
            return "cpu"
        return "tpu" if self.is_torus else "gpu"

    @property
    def node_size(self) -> int:
        """Devices within the fast domain: a node, or a whole slice."""
        if self.is_torus:
            return math.prod(self.shape) * self.chip.devices_per_chip
        return min((n.count for n in self.nodes), default=self.shape[-1])

    @property
    def host_bounds(self) -> tuple[int, ...]:
        """Chips that share a host, by torus dimension: the first dimensions, as even as can be.

        >>> Cluster.from_name("v5p:4x4x4").host_bounds, Cluster.from_name("v5e:4x8").host_bounds
        ((2, 2, 1), (2, 4))
        """
        bounds, left = [1] * len(self.shape), self.chip.chips_per_host
        planes = itertools.cycle((1, 0))
        idle = 0
        while left > 1 and idle < 2:
            i = next(planes)
            if left % 2 == 0 and self.shape[i] % (2 * bounds[i]) == 0:
                bounds[i], left, idle = 2 * bounds[i], left // 2, 0
            else:
                idle += 1
        return tuple(bounds)

    @property
    def host_size(self) -> int:
        """Devices that share a host, or behind a switch a node."""
        if not self.is_torus:
            return self.node_size
        return math.prod(self.host_bounds) * self.chip.devices_per_chip

    @property
    def link_bytes_per_s(self) -> float:
        """One way, a chip to its neighbours; the slowest of a mixed cluster."""
        return min((n.link_bytes_per_s for n in self.nodes), default=self.chip.link_bytes_per_s)

    @property
    def network_bytes_per_s(self) -> float:
        """One way and for each device, out of the node or slice; the slowest of a mixed cluster."""
        if len(self.bandwidth) > 1:
            pairs = itertools.combinations(range(len(self.bandwidth)), 2)
            slowest = min(min(self.bandwidth[i][j], self.bandwidth[j][i]) for i, j in pairs)
            return slowest / self.node_size
        if self.nodes:
            return min(n.network_bytes_per_s / n.count for n in self.nodes)
        per_host = self.chip.chips_per_host * self.chip.devices_per_chip
        return self.chip.host_bytes_per_s / per_host

    def axis_bandwidth(self, degrees: Sequence[int], first: str = "tensor") -> tuple[float, ...]:
        """Bytes/s at which the members of each axis' groups exchange, one way and a device.

        An all-gather of V bytes over n members takes V·(n-1)/n divided by this. Torus: a closed
        ring moves 2·W along each dimension it covers, an open line W (scaling-book, tpus.md);
        several lines that interleave on one dimension share it. Between nodes or slices the
        members that a group has within a node pool their network shares.

        Args:
          degrees: one per axis of `AXES`.
          first: the axis that takes its torus dimensions first, then inner to outer; "host" is
            tensor, within the chips of a host.
        """
        if self.is_torus:
            found = assign(self._torus, tuple(int(d) for d in degrees), first)
            return found.bandwidth if found else (_IMPOSSIBLE,) * len(AXES)
        return _switch_bandwidth(self, tuple(degrees))

    def placement(self, degrees: Sequence[int], first: str) -> dict[str, tuple[int, ...]]:
        """Which dimensions each axis takes, as `sharding.machines.torus.device_grid` reads it.

        Args:
          degrees: one per axis of `AXES`.
          first: as in `axis_bandwidth`.

        Returns:
          Axis to its factors over (slices, *dimensions, devices of a chip), the axis that takes
          first at the front, axes of size one left out; {} without a torus.

        >>> Cluster.from_name("v5e:4x8").placement((4, 1, 1, 8, 1, 1), "tensor")
        {'tensor': (1, 2, 2, 1), 'fsdp': (1, 2, 4, 1)}
        """
        found = assign(self._torus, tuple(degrees), first) if self.is_torus else None
        if found is None:
            return {}
        return {AXES[i]: found.factors[i] for i in found.order if degrees[i] > 1}

    @property
    def _torus(self) -> Torus:
        return Torus(
            shape=self.shape,
            slices=self.slices,
            wrap=self.chip.wrap,
            link=self.chip.link_bytes_per_s,
            cores=self.chip.devices_per_chip,
            network=self.network_bytes_per_s,
            host=self.host_bounds,
        )

    @classmethod
    def from_name(cls, name: str) -> "Cluster":
        """Reads a name, or a path to a JSON file (see `from_json`).

        `CHIP:AxB` or `CHIP:AxBxC` is a torus, as v5e:16x16 and v5p:8x8x16; `xNslices` behind it
        joins several by the network between them, as v5p:8x8x16x2slices. `CHIP:NODESxCHIPS` is
        of nodes with a switch, as h100:8x8. A single number is shaped as sold, as v5p:64.

        Raises:
          ValueError: no such chip or shape; the message lists what there is.

        >>> Cluster.from_name("v5p:8x8x16x2slices").device_count
        2048
        """
        if name.endswith(".json"):
            return cls.from_json(name)
        match = re.fullmatch(r"([a-z0-9-]+):(\d+(?:x\d+)*)(?:x(\d+)slices?)?", name.lower())
        if match is None or match[1] not in catalog():
            raise ValueError(
                f"no cluster is called {name!r}; write CHIP:SHAPE, as v5e:16x16, "
                f"v5p:8x8x16x2slices or h100:8x8 (nodes x chips), with a chip of "
                f"{', '.join(catalog())}, or name a .json file"
            )
        chip = catalog()[match[1]]
        shape = tuple(int(size) for size in match[2].split("x"))
        return cls.of(chip, shape, slices=int(match[3] or 1), name=name)

    @classmethod
    def of(
        cls, chip: Chip, shape: tuple[int, ...], *, slices: int = 1, name: str = ""
    ) -> "Cluster":
        """A cluster of equal chips.

        Args:
          chip: what it is made of.
          shape: torus dimensions or (nodes, chips a node); a single number is split as sold.
          slices: tori joined by the network.
          name: for reports.

        Raises:
          ValueError: a shape of the wrong rank.
        """
        rank = chip.torus_rank or 2
        if len(shape) == 1:
            shape = _shape_of(chip, shape[0])
        if len(shape) != rank or (slices > 1 and not chip.torus_rank):
            form = "x".join("ABC"[:rank]) if chip.torus_rank else "NODESxCHIPS"
            raise ValueError(
                f"{chip.name} is wired as {chip.kind} of rank {rank}: write {chip.name}:{form}"
                f"{'[xNslices]' if chip.torus_rank else ''}, got shape {shape} and {slices=}"
            )
        warnings = ()
        if chip.largest and any(
            a > b for a, b in zip(sorted(shape), sorted(chip.largest), strict=True)
        ):
            largest = "x".join(map(str, chip.largest))
            warnings = (f"{chip.name} is sold up to {largest} a slice; planning for {shape}",)
        if not chip.torus_rank and shape[1] > chip.chips_per_host:
            warnings = (
                f"{chip.name} is sold with up to {chip.chips_per_host} chips in one switch "
                f"domain; planning for {shape[1]}",
            )
        shown = name or f"{chip.name}:{'x'.join(map(str, shape))}"
        return cls(name=shown, chip=chip, shape=shape, slices=slices, warnings=warnings)

    @classmethod
    def from_json(cls, path: str | Path) -> "Cluster":
        """Reads a file that describes a cluster: what `to_json` wrote, or written by hand.

        Equal chips: `{"chip": "v5p", "shape": [4, 4, 8], "slices": 1}`. Nodes that differ:
        `{"nodes": [{"chip": "v100", "count": 4, ...}], "bandwidth": ...}`. A node may give
        `repeat`, `link_bytes_per_s`, `network_bytes_per_s`, and any field of `Chip` to override,
        as may `"chip": {"name": "v5p", ...}`; the file may give `name`, `measured`, and
        `bandwidth` (bytes/s between nodes).

        Raises:
          ValueError: not such a file; the message says what is wrong.
        """
        try:
            fields = json.loads(Path(path).read_text())
            return cls.from_fields(fields, name=str(path))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is no cluster file: {error}; {_FORMS}") from error

    @classmethod
    def from_fields(cls, fields: Any, *, name: str = "") -> "Cluster":
        """A cluster from what a file holds; see `from_json`.

        Args:
          fields: what JSON became.
          name: where the fields give none.

        Raises:
          ValueError: not such fields; the message says which.
        """
        if not isinstance(fields, Mapping) or not {"shape", "nodes"} & set(fields):
            raise ValueError("it has neither shape nor nodes")
        unknown = set(fields) - _FIELDS
        if unknown:
            raise ValueError(f"there are no fields {sorted(unknown)}, only {sorted(_FIELDS)}")
        name, measured = str(fields.get("name", name)), fields.get("measured", {})
        if "shape" in fields:
            shape = _positive("shape", fields["shape"])
            (slices,) = _positive("slices", [fields.get("slices", 1)])
            found = cls.of(_chip(fields.get("chip")), shape, slices=slices, name=name)
        else:
            entries = fields["nodes"]
            if not isinstance(entries, list) or not all(isinstance(e, Mapping) for e in entries):
                raise ValueError(f"nodes is a list of objects as {_NODE}, got {entries!r}")
            nodes = tuple(node for entry in entries for node in _nodes(entry))
            bandwidth = _matrix(fields.get("bandwidth", []), len(nodes))
            found = cls.of_nodes(nodes, name=name, bandwidth=bandwidth)
        if not isinstance(measured, Mapping):
            raise ValueError(f"measured holds constants by name, got {measured!r}")
        return replace(found, measured=dict(measured))

    def to_json(self) -> str:
        """The cluster as JSON, which `from_json` reads."""
        held: dict[str, Any] = {"name": self.name}
        if self.nodes:
            held["nodes"] = [
                {**asdict(n.chip), "chip": n.chip.name, "count": n.count,
                 "link_bytes_per_s": n.link_bytes_per_s,
                 "network_bytes_per_s": n.network_bytes_per_s}
                for n in self.nodes
            ]  # fmt: skip
        else:
            held |= {"chip": asdict(self.chip), "shape": self.shape, "slices": self.slices}
        if self.bandwidth:
            held["bandwidth"] = self.bandwidth
        return json.dumps(held | {"measured": dict(self.measured)}, indent=1)

    @classmethod
    def of_nodes(
        cls,
        nodes: Sequence[Node],
        *,
        name: str,
        bandwidth: tuple[tuple[float, ...], ...] = (),
    ) -> "Cluster":
        """A cluster of nodes that may differ."""
        if not nodes:
            raise ValueError("a cluster needs at least one node")
        least = min((n.chip for n in nodes), key=lambda c: (c.memory_bytes, c.peak_flops["bf16"]))
        shape = (len(nodes), min(n.count for n in nodes))
        chip = replace(least, kind="switch", torus_rank=0, devices_per_chip=1)
        return cls(name=name, chip=chip, shape=shape, nodes=tuple(nodes), bandwidth=bandwidth)

    @classmethod
    def from_devices(cls, devices: Sequence[Any]) -> "Cluster":
        """The cluster that JAX devices belong to.

        Raises:
          ValueError: no devices, a kind that the catalogue does not know, devices that do not
            fill a box of a torus, or nodes of different sizes.
        """
        if not devices:
            raise ValueError("a cluster needs devices, got none; pass jax.devices(), or a name")
        kind = str(getattr(devices[0], "device_kind", devices[0].platform)).lower()
        chip = find_chip("cpu" if devices[0].platform == "cpu" else kind)
        if chip is None:
            raise ValueError(
                f"no chip of the catalogue is called {kind!r}: {', '.join(catalog())}; "
                "describe the cluster in a JSON file"
            )
        if not chip.torus_rank:
            return cls.of(chip, node_shape(devices), name=f"{kind} x {len(devices)}")
        slices = len({getattr(d, "slice_index", 0) for d in devices})
        coords = [d.coords[: chip.torus_rank] for d in devices]
        shape = tuple(1 + max(c[i] for c in coords) - min(c[i] for c in coords) for i in
                      range(chip.torus_rank))  # fmt: skip
        found = cls.of(chip, shape, slices=slices)
        if found.device_count != len(devices):
            raise ValueError(
                f"{len(devices)} devices do not fill the box that they span, {found.name} of "
                f"{slices} slices and {found.device_count} devices; pass those of whole boxes of "
                "the torus"
            )
        return found


def node_shape(devices: Sequence[Any]) -> tuple[int, int]:
    """(nodes, devices a node) of devices behind switches.

    A process is not a node: where one runs for each GPU, the devices of a node say so by their
    `slice_index` (JAX's name for what a fast network joins). Without it processes are nodes.

    Raises:
      ValueError: nodes of different numbers of devices.
    """
    slices = [getattr(d, "slice_index", None) for d in devices]
    named = slices if None not in slices else [d.process_index for d in devices]
    sizes = sorted({named.count(node) for node in named})
    if len(sizes) > 1:
        raise ValueError(
            f"nodes of {sizes} devices cannot form one mesh evenly; pass as many of each node, or "
            "describe the cluster in a JSON file"
        )
    return len(named) // sizes[0], sizes[0]


@functools.cache
def catalog() -> Mapping[str, Chip]:
    """Chips by name."""
    text = resources.files("sharding").joinpath("catalog/chips.json").read_text()
    return {
        name: Chip(
            name=name,
            **{
                **fields,
                "aliases": tuple(fields["aliases"]),
                "largest": tuple(fields["largest"]) if fields["largest"] else None,
            },
        )
        for name, fields in json.loads(text)["chips"].items()
    }


def find_chip(text: str) -> Chip | None:
    """The chip whose name or alias occurs in a text, the longest match; None if there is none.

    >>> find_chip("A100 SXM 40GB (1600 Gb/s RoCE per node)").name
    'a100-40gb'
    """
    text = text.lower()
    found = [
        (len(alias), chip)
        for chip in catalog().values()
        for alias in (chip.name, *chip.aliases)
        if re.search(rf"(?<![a-z0-9]){re.escape(alias)}", text)
    ]
    return max(found, key=lambda pair: pair[0])[1] if found else None


def _nodes(entry: Mapping[str, Any]) -> list[Node]:
    fields = dict(entry)
    name = fields.pop("chip", None)
    count, repeat = _positive("count and repeat", [fields.pop("count", 1), fields.pop("repeat", 1)])
    chip = _chip({"name": name})
    link = fields.pop("link_bytes_per_s", chip.link_bytes_per_s)
    network = fields.pop("network_bytes_per_s", chip.host_bytes_per_s)
    link, network = _speeds("link_bytes_per_s and network_bytes_per_s", [link, network])
    node = Node(
        chip=_chip({**fields, "name": name}),
        count=count,
        link_bytes_per_s=link,
        network_bytes_per_s=network,
    )
    return [node] * repeat


def _positive(name: str, sizes: Any) -> tuple[int, ...]:
    if not isinstance(sizes, list) or not all(isinstance(n, int) and n > 0 for n in sizes):
        raise ValueError(f"{name} takes positive whole numbers, as [4, 4, 8], got {sizes!r}")
    return tuple(sizes)


def _speeds(name: str, speeds: Any) -> tuple[float, ...]:
    if not isinstance(speeds, list) or not all(isinstance(x, (int, float)) for x in speeds):
        raise ValueError(f"{name} takes numbers of bytes/s, got {speeds!r}")
    return tuple(float(x) for x in speeds)


def _matrix(rows: Any, nodes: int) -> tuple[tuple[float, ...], ...]:
    if not isinstance(rows, list):
        raise ValueError(f"bandwidth takes numbers of bytes/s, a row a node, got {rows!r}")
    found = tuple(_speeds("bandwidth", row) for row in rows)
    if found and len(found) != nodes:
        raise ValueError(f"bandwidth has {len(found)} rows for {nodes} nodes")
    if any(len(row) != nodes for row in found):
        raise ValueError(
            f"bandwidth has rows of {[len(row) for row in found]} numbers for {nodes} nodes"
        )
    return found


def _chip(entry: Any) -> Chip:
    """A chip of the catalogue by its name, or with fields that differ."""
    fields = dict(entry) if isinstance(entry, Mapping) else {"name": entry}
    name = fields.pop("name", None)
    unknown = set(fields) - set(Chip.__dataclass_fields__)
    if unknown:
        raise ValueError(
            f"a chip has no fields {sorted(unknown)}; {', '.join(Chip.__dataclass_fields__)}"
        )
    if not isinstance(name, str) or (
        name not in catalog() and len(fields) < len(Chip.__dataclass_fields__) - 1
    ):
        raise ValueError(
            f"a node's chip is {name!r}; one of {', '.join(catalog())}, or all fields of `Chip`"
        )
    for key in ("aliases", "largest"):
        if isinstance(fields.get(key), list):
            fields[key] = tuple(fields[key])
    return replace(catalog().get(name, catalog()["cpu"]), **fields, name=name)


def _shape_of(chip: Chip, count: int) -> tuple[int, ...]:
    """The most cubic torus of `count` chips, or full nodes."""
    if not chip.torus_rank:
        per_node = math.gcd(count, chip.chips_per_host) if count > chip.chips_per_host else count
        return count // per_node, per_node
    shapes = [s for s in factorings(count, chip.torus_rank) if list(s) == sorted(s)]
    return min(shapes, key=lambda s: (max(s) / min(s), s))


def _switch_bandwidth(cluster: Cluster, degrees: tuple[int, ...]) -> tuple[float, ...]:
    stride, found = 1, []
    for degree in degrees:
        inside = max(1, min(degree, cluster.node_size // stride)) if stride else 1
        network = inside * cluster.network_bytes_per_s
        fits = degree * stride <= cluster.node_size
        found.append(cluster.link_bytes_per_s if fits else min(cluster.link_bytes_per_s, network))
        stride *= degree
    return tuple(found)
