"""The strategy of a row of a table of runs: degrees, micro-batches, rematerialisation."""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sharding.costs.strategies import Strategy
from sharding.machines.topology import Cluster
from sharding.measured.run_row import Row
from sharding.programs.transformer import TransformerConfig

# Tokens of a micro-batch where nothing is said.
_TOKENS_OF_A_MICROBATCH = 8192
_COLUMNS = {"data": "dp", "fsdp": "fsdp", "tensor": "tp", "stage": "pp", "context": "sp_or_cp",
            "expert": "ep"}  # fmt: skip


def read_strategy(
    row: Row, cluster: Cluster, config: TransformerConfig
) -> tuple[Strategy, str, TransformerConfig]:
    """The strategy, the rematerialisation that the row names or "", and the batch's sizes."""
    degree = {name: row.whole(column) for name, column in _COLUMNS.items()}
    known = _degrees(row, cluster, degree)
    zero = _zero(row, cluster, known)
    batch, per_device = _batch(row, known, config)
    if config.experts:
        _place_experts(known)
    known["expert"] = known["expert"] if config.experts else 1
    replicas = known["data"] * known["fsdp"] * known["expert"]
    virtual = re.search(r"VP=(\d+)", row.text("notes"))
    remat, offload = _remat(row)
    whole = cluster.is_torus and per_device * cluster.device_count == batch
    strategy = Strategy(
        **known,
        microbatches=1 if whole else max(1, round(batch / (replicas * per_device))),
        interleave=int(virtual[1]) if virtual and known["stage"] > 1 else 1,
        zero=zero,
        sequence_parallel=not row.is_old,  # since arXiv:2205.05198
        remat=remat or "none",
        offload=offload,
    )
    return strategy, remat, replace(config, global_batch=batch)


def _degrees(row: Row, cluster: Cluster, degree: Mapping[str, int | None]) -> dict[str, Any]:
    """All degrees, the blank ones filled, so that they make the devices."""
    devices = cluster.device_count
    known: dict[str, Any] = {k: v or 1 for k, v in degree.items()}
    if _product(known) * cluster.chip.devices_per_chip == devices:
        known["fsdp"] *= cluster.chip.devices_per_chip  # degrees that count chips
    batch = row.whole("global_batch_sequences") or devices
    if not degree["data"] and not degree["fsdp"]:
        rest = max(1, devices // max(1, known["tensor"] * known["stage"] * known["context"]))
        while rest > batch and rest % 2 == 0:  # a sequence is the least that a replica takes
            rest //= 2
        known["fsdp" if cluster.is_torus else "data"] = rest
        row.fill("dp, fsdp: what the other degrees leave, up to the batch", None)
    elif not degree["data"] or (not degree["fsdp"] and cluster.is_torus):
        blank = "data" if not degree["data"] else "fsdp"
        known[blank] = max(1, devices // (_product(known) // known[blank]))
    left = devices // _product(known)
    if left > 1 and not degree["tensor"]:
        inside = math.gcd(left, cluster.chip.chips_per_host)
        known["tensor"] *= inside
        left //= inside
        row.fill("tp: what dp leaves, up to a node", None)
    if left > 1 and not degree["stage"]:
        known["stage"] *= left
        left = 1
        row.fill("pp: what dp and tp leave", None)
    if left > 1 and devices % _product(known) == 0:
        axis = "data" if known["data"] * known["fsdp"] * left <= batch else "context"
        known[axis] *= left
        row.fill("dp or cp: raised so that the degrees make the devices", None)
    if _product(known) != devices:
        known = {**dict.fromkeys(known, 1), "fsdp": devices, "expert": known["expert"]}
        row.fill("degrees that do not make the devices: FSDP instead", None)
    return known


def _product(known: Mapping[str, int]) -> int:
    return math.prod(value for name, value in known.items() if name != "expert")


def _zero(row: Row, cluster: Cluster, known: dict[str, Any]) -> int:
    """The ZeRO stage; one that is not over an `fsdp` degree moves `dp` there."""
    sharding = row.text("optimizer_sharding").lower()
    if known["fsdp"] > 1:
        return 3
    blank = not sharding and not cluster.is_torus and not row.is_old
    if blank or "zero1" in sharding or "zero2" in sharding:
        known["fsdp"], known["data"] = known["data"], 1
        return 2 if "zero2" in sharding else 1
    return 0


def _place_experts(known: dict[str, Any]) -> None:
    """Experts divide what divides the batch: data parallelism first."""
    experts = min(known["expert"], known["data"] * known["fsdp"])
    inside = math.gcd(known["data"], experts)
    known["data"] //= inside
    within = math.gcd(known["fsdp"], experts // inside)
    known["fsdp"] //= within
    known["expert"] = inside * within


def _batch(row: Row, known: Mapping[str, int], config: TransformerConfig) -> tuple[int, int]:
    replicas = known["data"] * known["fsdp"]
    batch, per_device = row.whole("global_batch_sequences"), row.whole("microbatch")
    if batch is None:
        per_device = per_device or row.fill("microbatch: 1", 1)
        many = 4 * known["stage"] if known["stage"] > 1 else 1
        return row.fill("global batch: one micro-batch a replica, four a stage",
                        replicas * per_device * many), per_device  # fmt: skip
    if per_device is None:
        share = max(1, batch // replicas)
        fits = max(1, _TOKENS_OF_A_MICROBATCH // config.seq_len)
        per_device = row.fill("microbatch: a power of two that divides, up to 8,192 tokens",
                              math.gcd(share, 2 ** int(math.log2(fits))))  # fmt: skip
    return max(batch, 1), per_device


def _remat(row: Row) -> tuple[str, str]:
    text = row.text("remat").lower()
    if not text:
        row.fill("remat: the least that fits", None)
        return "", "none"
    offload = "activations" if "offload" in text else "none"
    if "full" in text or text in ("custom(offload layer_in)",):
        return "full", offload
    if "selective" in text or "attention" in text:
        return "attention", offload
    if "minimal" in text or "dots" in text:
        return "dots", offload
    if "remat" in text and "q,k,v" in text:  # they are what is computed again
        return "full", offload
    if "q,k,v" in text or "qkv" in text or "custom" in text or "out_proj" in text:
        return "projections", offload
    if text in ("none", "no", "false", "0", "off"):
        return "none", offload
    return row.fill(f"remat: {text!r} is read as full", "full"), offload
