"""The cluster and the software of a row of a table of runs."""

import math
import re
from dataclasses import replace

from sharding.costs.strategies import divisors
from sharding.machines.topology import Chip, Cluster, Node, find_chip
from sharding.measured.run_row import Row


def read_chip(row: Row) -> Chip:
    text = row.text("hardware")
    if not text and "vtrain" in row.text("source").lower():
        text = row.fill("hardware: A100, as vTrain's paper says", "a100")
    chip = find_chip(text)
    if chip is None:
        raise ValueError(f"hardware {text!r} is not in the catalogue")
    return chip


def read_cluster(row: Row, chip: Chip, chips: int) -> Cluster:
    text = row.text("hardware")
    mixed = re.findall(r"(\d+)x\s*([A-Za-z]\w*)", text.split("(")[0])
    if chip.torus_rank:
        match = re.search(r"(\d+) slice", row.text("notes"))
        slices = int(match[1]) if match else 1
        largest = math.prod(chip.largest or (chips,))
        while chips // slices > largest and chips % (2 * slices) == 0:
            slices *= 2
        return Cluster.of(chip, (chips // slices,), slices=slices)
    per_node = min(row.whole("chips_per_node") or chip.chips_per_host, chips)
    if chip.chips_per_host > 8:  # a rack is one domain, however many boards it has
        per_node = min(chip.chips_per_host, chips)
    per_node = max(d for d in divisors(chips) if d <= per_node)
    inter, intra = _bandwidths(text, per_node)
    link = intra or chip.link_bytes_per_s
    network = inter or chip.host_bytes_per_s / chip.chips_per_host * per_node
    kinds = [(int(count), find_chip(name)) for count, name in mixed if find_chip(name)]
    if len(kinds) < 2 or sum(count for count, _ in kinds) != chips:
        kinds = [(chips, chip)]
    nodes = tuple(
        Node(chip=kind, count=per_node, link_bytes_per_s=link, network_bytes_per_s=network)
        for count, kind in kinds
        if kind is not None
        for _ in range(count // per_node)
    )
    if len(kinds) > 1:
        return Cluster.of_nodes(nodes, name=text)
    wires = replace(chip, link_bytes_per_s=link, host_bytes_per_s=network, chips_per_host=per_node)
    return Cluster.of(wires, (chips // per_node, per_node), name=text or chip.name)


def _bandwidths(text: str, per_node: int) -> tuple[float | None, float | None]:
    """Bytes/s of a node to others and of a chip in its node, where the hardware's name says."""
    found: dict[str, float] = {}
    for value, what in re.findall(r"([\d.]+)\s*Gb/s\s*(\w* ?per node|inter|intra|)", text):
        found.setdefault(what.split()[-1] if what.strip() else "both", float(value) * 1e9 / 8)
    inter = found.get("node") or found.get("inter") or found.get("both")
    return inter, found.get("intra") or found.get("both")


def read_stack(row: Row, chip: Chip) -> str:
    source = row.text("source").lower()
    if chip.torus_rank:
        return "xla_tpu"
    if re.search(r"jax|pax|maxtext|xla|levanter|alpa", source):
        return "xla_gpu"
    if re.search(r"zero-?[23]", row.text("optimizer_sharding").lower()):
        return "fsdp"
    return "megatron_fp16" if row.is_old else "megatron"
