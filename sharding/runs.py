"""Tables of measured runs: each row becomes a program, a strategy, a cluster and a time.

Blanks are filled by the rules below, and every rule that was used is listed in `Run.filled`, so
that coverage can be printed. A row that cannot be read is a `Skipped` with its reason; nothing
crashes on it. The rules:

* measured time: `step_time_s`; else tokens / (`tokens_per_s_per_chip`·chips); else model FLOPs /
  (`tflops_per_chip`·chips); else model FLOPs / (`mfu`·peak·chips). Model FLOPs are 3 forward
  passes with full, not causal, attention; 4 where the row's source counted recomputation.
* model: sizes in the row; then those of a published model of that name; then a decoder of the
  usual proportions with the parameters that `params_b`, the name, or (TFLOP/s) / (tokens/s) / 6
  tell. Whether the feed-forward is gated follows from
  `params_b` if it tells, else from the name.
* degrees: `n_chips`·devices a chip / the others; a blank tensor degree takes what data
  parallelism leaves, up to a node; the pipeline takes the rest. All blank: FSDP.
* experts' degree lies within the data and FSDP degrees.
* `optimizer_sharding` blank: ZeRO-3 with an `fsdp` degree, on GPUs ZeRO-1 over `dp`,
  in float16 none.
* `microbatch` is of a replica; on TPUs of a device if micro-batch x devices is the global batch.
* micro-batch blank: the largest power of two that divides a replica's batch, at most 8,192 tokens.
* rematerialisation blank: the least that fits in memory.
* software: XLA on TPUs or where the source says so; PyTorch FSDP for ZeRO-2/3 on GPUs; Megatron
  for the rest, in float16 without fused attention.
"""

import csv
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sharding.strategies import Strategy, divisors
from sharding.topology import Chip, Cluster, Node, find_chip
from sharding.transformer import TransformerConfig, find_model, transformer

# Columns of other tables, by the name used here.
_SYNONYMS = {
    "n_gpus": "n_chips", "num_gpus": "n_chips", "global_batch": "global_batch_sequences",
    "micro_batch": "microbatch", "micro_batch_size": "microbatch", "batch": "microbatch",
    "num_layers": "n_layers", "hidden_size": "d_model", "num_heads": "n_heads", "cp": "sp_or_cp",
}  # fmt: skip
_UNGATED = re.compile(r"gpt-?\d|^gpt|mpt|opt-|pythia|nemotron|bert|bloom|falcon", re.IGNORECASE)
_COUNTED_RECOMPUTE = re.compile(r"Megatron-LM README Jan-2021|SC21", re.IGNORECASE)
_TOKENS_OF_A_MICROBATCH = 8192


@dataclass(frozen=True, kw_only=True)
class Run:
    """A measured run.

    Attributes:
      row: its number in the table, from 0.
      source: who published it.
      hardware: as the table writes it.
      model: as the table writes it.
      config: its sizes.
      strategy: how it was divided; `remat` is "" where the table does not say.
      cluster: where it ran.
      stack: software.
      measured_s: seconds of a step, or None for a launch that failed.
      filled: which rules filled blanks.
    """

    row: int
    source: str
    hardware: str
    model: str
    config: TransformerConfig
    strategy: Strategy
    remat: str
    cluster: Cluster
    stack: str
    measured_s: float | None
    filled: tuple[str, ...]

    @property
    def problem(self) -> tuple[Any, ...]:
        """Runs of one problem may be compared: same model, batch and cluster."""
        return (self.source, self.cluster.name, self.config.name, self.config.global_batch,
                self.config.seq_len, self.config.layers, self.config.d_model,
                self.config.precision)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A row that was not used, and why."""

    row: int
    source: str
    hardware: str
    model: str
    reason: str


def read_runs(path: str | Path) -> tuple[list[Run], list[Skipped]]:
    """Reads a table of runs.

    Raises:
      ValueError: a file that is no table with a header.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no table of runs ({error}); it is a CSV with a header") from (
            error)  # fmt: skip
    return parse_rows(rows)


def parse_rows(rows: Iterable[Mapping[str, Any]]) -> tuple[list[Run], list[Skipped]]:
    """Turns rows into runs; what cannot be read is skipped with its reason."""
    runs: list[Run] = []
    skipped: list[Skipped] = []
    for index, raw in enumerate(rows):
        row = _Row(raw)
        try:
            runs.append(_parse(index, row))
        except (ValueError, ZeroDivisionError, OverflowError) as error:
            skipped.append(
                Skipped(row=index, source=row.text("source"), hardware=row.text("hardware"),
                        model=row.text("model"), reason=str(error))
            )  # fmt: skip
    return runs, skipped


class _Row:
    """Reads cells, however they are written."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.cells = {
            _SYNONYMS.get(str(k).strip().lower(), str(k).strip().lower()): str(v or "").strip()
            for k, v in raw.items()
            if k is not None
        }
        self.filled: list[str] = []
        if not self.cells.get("source"):
            self.cells["source"] = self.cells.get("source_path", "")

    def text(self, name: str) -> str:
        return self.cells.get(name, "")

    def number(self, name: str) -> float | None:
        match = re.fullmatch(r"[~<>]?\s*([-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?)\s*%?", self.text(name),
                             re.IGNORECASE)  # fmt: skip
        if match is None:
            return None
        value = float(match[1].replace(",", ""))
        return value if math.isfinite(value) and value > 0 else None

    def whole(self, name: str) -> int | None:
        value = self.number(name)
        return None if value is None else max(1, round(value))

    def fill(self, rule: str, value: Any) -> Any:
        self.filled.append(rule)
        return value


def _parse(index: int, row: _Row) -> Run:
    chips = row.whole("n_chips")
    chip = _chip(row)
    if chips is None:
        raise ValueError("n_chips is blank or no number")
    measures = ("step_time_s", "tokens_per_s_per_chip", "tflops_per_chip", "mfu")
    failed = re.search(r"INFEASIBLE|out of memory|\bOOM\b|failed", row.text("notes")) is not None
    if not failed and not any(row.number(name) for name in measures):
        raise ValueError("no measured quantity")
    cluster = _cluster(row, chip, chips)
    config = _config(row, cluster)
    strategy, remat, config = _strategy(row, cluster, config)
    stack = _stack(row, chip)
    config = _types(row, config, stack)
    return Run(
        row=index,
        source=row.text("source"),
        hardware=row.text("hardware"),
        model=row.text("model") or config.name,
        config=config,
        strategy=strategy,
        remat=remat,
        cluster=cluster,
        stack=stack,
        measured_s=None if failed else _measured(row, config, cluster),
        filled=tuple(row.filled),
    )


def _chip(row: _Row) -> Chip:
    text = row.text("hardware")
    if not text and "vtrain" in row.text("source").lower():
        text = row.fill("hardware: A100, as vTrain's paper says", "a100")
    chip = find_chip(text)
    if chip is None:
        raise ValueError(f"hardware {text!r} is not in the catalogue")
    return chip


def _cluster(row: _Row, chip: Chip, chips: int) -> Cluster:
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


def _config(row: _Row, cluster: Cluster) -> TransformerConfig:
    name = row.text("model")
    published = find_model(name) if name else None
    names = {"layers": "n_layers", "d_model": "d_model", "heads": "n_heads", "d_ff": "d_ff",
             "kv_heads": "n_kv_heads", "vocab": "vocab"}  # fmt: skip
    cells = {field: row.whole(column) for field, column in names.items()}
    sizes: dict[str, Any] = {field: value for field, value in cells.items() if value}
    seq_len = row.whole("seq_len") or row.fill("seq_len: 4096, or 1024 before 2021", 4096)
    if published is not None:
        # The published sizes also hold what the table has no column for; experts' width is in
        # d_ff there.
        if published.experts:
            sizes.pop("d_ff", None)
        config = replace(published, **sizes)
    elif {"layers", "d_model"} <= set(sizes):
        width = sizes["d_model"]
        if "heads" not in sizes:
            sizes["heads"] = row.fill("heads: of 64", max(1, width // 64))
        sizes.setdefault("vocab", 51200 if cluster.chip.kind == "switch" else 32000)
        gated = not _UNGATED.search(name or "gpt")
        if "d_ff" not in sizes:
            sizes["d_ff"] = row.fill("d_ff: 4·d_model", 4 * width)
            gated = False
        config = TransformerConfig(name=name or f"decoder-{sizes['layers']}x{width}", **sizes)
        config = _as_counted(row, replace(config, gated=gated))
    else:
        config = _of_params(row, name)
    if sizes.get("heads") == 1:  # a table that does not know: heads of 64
        heads = max(1, config.d_model // 64)
        config = replace(config, heads=heads, kv_heads=None)
    if not config.gated and not published:
        config = replace(config, rotary=False)
    return replace(config, name=name or config.name, seq_len=seq_len)


def _as_counted(row: _Row, config: TransformerConfig) -> TransformerConfig:
    """Gates the feed-forward and ties the head if the number of parameters says so."""
    wanted = row.number("params_b")
    if not wanted:
        return config
    choices = [
        replace(config, gated=gated, tied=tied)
        for gated in (config.gated, not config.gated)
        for tied in (False, True)
    ]
    error = [abs(math.log(transformer(c).parameter_count / wanted / 1e9)) for c in choices]
    best = min(range(len(choices)), key=error.__getitem__)
    # A rounded number of parameters tells the feed-forward only if it is nearly right.
    return choices[best] if error[best] < 0.05 and error[best] < error[0] - 0.01 else config


def _of_params(row: _Row, name: str) -> TransformerConfig:
    """A decoder of usual proportions: width 128 times the depth, and twelve width² a layer."""
    match = re.search(r"(\d+(?:\.\d+)?)\s*b\b.*?a(\d+(?:\.\d+)?)b", name, re.IGNORECASE)
    billions = float(match[2]) if match else row.number("params_b")
    if billions is None:
        match = re.search(r"(\d+(?:\.\d+)?)\s*([bmt])\b", name, re.IGNORECASE)
        rate, speed = row.number("tflops_per_chip"), row.number("tokens_per_s_per_chip")
        if match is not None:
            billions = float(match[1]) * {"m": 1e-3, "b": 1.0, "t": 1e3}[match[2].lower()]
        elif rate and speed:
            billions = row.fill("parameters: FLOPs a token / 6", rate * 1e3 / speed / 6)
        else:
            billions = row.fill("parameters: 7 B, nothing is known", 7.0)
    row.fill("sizes: usual proportions for the number of parameters", None)
    layers = max(4, round((billions * 1e9 / (12 * 128**2)) ** (1 / 3)))
    width = max(256, 128 * round((billions * 1e9 / (12 * layers)) ** 0.5 / 128))
    return TransformerConfig(name=name, layers=layers, d_model=width, heads=max(1, width // 128),
                             d_ff=4 * width, vocab=51200, gated=False, rotary=False)  # fmt: skip


def _strategy(
    row: _Row, cluster: Cluster, config: TransformerConfig
) -> tuple[Strategy, str, TransformerConfig]:
    sharding = row.text("optimizer_sharding").lower()
    degree = {k: row.whole(c) for k, c in
              {"data": "dp", "fsdp": "fsdp", "tensor": "tp", "stage": "pp", "context": "sp_or_cp",
               "expert": "ep"}.items()}  # fmt: skip
    devices = cluster.device_count
    if _product(degree) * 2 == cluster.device_count and cluster.chip.devices_per_chip == 2:
        devices = cluster.chip_count
    known: dict[str, Any] = {k: v or 1 for k, v in degree.items()}
    if not degree["data"] and not degree["fsdp"]:
        rest = devices // max(1, known["tensor"] * known["stage"] * known["context"])
        known["fsdp" if cluster.is_torus else "data"] = max(1, rest)
        row.fill("dp, fsdp: what the other degrees leave", None)
    elif not degree["data"] or (not degree["fsdp"] and cluster.is_torus):
        blank = "data" if not degree["data"] else "fsdp"
        others = math.prod(v for k, v in known.items() if k not in (blank, "expert"))
        known[blank] = max(1, devices // others)
    ways = known["data"] * known["fsdp"] * known["context"]
    left = max(1, devices // max(1, ways * known["tensor"] * known["stage"]))
    if left > 1 and not degree["tensor"]:
        known["tensor"] = math.gcd(left, cluster.chip.chips_per_host)
        left //= known["tensor"]
        row.fill("tp: what dp leaves, up to a node", None)
    if left > 1 and not degree["stage"]:
        known["stage"], left = left, 1
        row.fill("pp: what dp and tp leave", None)
    if left > 1 or math.prod(known[k] for k in known if k != "expert") != devices:
        total = math.prod(known[k] for k in known if k != "expert")
        if devices % total:
            raise ValueError(f"degrees {known} do not make {devices} devices")
        known["data"] *= devices // total
        row.fill("dp: raised so that the degrees make the devices", None)
    zero = 3 if known["fsdp"] > 1 else 0
    if (
        "zero2" in sharding
        or "zero1" in sharding
        or (not sharding and not cluster.is_torus and not _is_old(row))
    ):
        zero = 3 if known["fsdp"] > 1 else 2 if "zero2" in sharding else 1
        if known["fsdp"] == 1:
            known["fsdp"], known["data"] = known["data"], 1
    batch, per_device = _batch(row, known, config)
    experts = min(known["expert"], known["data"] * known["fsdp"]) if config.experts else 1
    inside = math.gcd(known["data"], experts)
    known["data"] //= inside
    within = math.gcd(known["fsdp"], experts // inside)
    known["fsdp"] //= within
    known["expert"] = inside * within
    replicas = known["data"] * known["fsdp"] * known["expert"]
    virtual = re.search(r"VP=(\d+)", row.text("notes"))
    remat, offload = _remat(row)
    strategy = Strategy(
        **known,
        microbatches=1
        if cluster.is_torus and per_device * devices == batch
        else max(1, round(batch / (replicas * per_device))),
        interleave=int(virtual[1]) if virtual and known["stage"] > 1 else 1,
        zero=zero,
        remat=remat or "none",
        offload=offload,
    )
    return strategy, remat, replace(config, global_batch=batch)


def _product(degree: Mapping[str, int | None]) -> int:
    return math.prod(value or 1 for name, value in degree.items() if name != "expert")


def _batch(row: _Row, known: Mapping[str, int], config: TransformerConfig) -> tuple[int, int]:
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


def _remat(row: _Row) -> tuple[str, str]:
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


def _stack(row: _Row, chip: Chip) -> str:
    source = row.text("source").lower()
    if chip.torus_rank:
        return "xla_tpu"
    if re.search(r"jax|pax|maxtext|xla|levanter|alpa", source):
        return "xla_gpu"
    if re.search(r"zero-?[23]", row.text("optimizer_sharding").lower()):
        return "fsdp"
    return "megatron_fp16" if _is_old(row) else "megatron"


def _is_old(row: _Row) -> bool:
    """Before fused attention and sharded optimisers, when training was in float16."""
    return row.text("dtype").lower().startswith("fp16") or "vtrain" in row.text("source").lower()


def _types(row: _Row, config: TransformerConfig, stack: str) -> TransformerConfig:
    dtype = row.text("dtype").lower()
    notes = row.text("notes").lower()
    precision = "fp8" if "fp8" in dtype else "int8" if "int8" in dtype + notes else "bf16"
    if "fp4" in dtype:
        precision = "fp4"
    changes: dict[str, Any] = {"precision": precision}
    capacity = re.search(r"capacity(?:[ _]factor)?[ =]+([\d.]+)", notes)
    if capacity and config.experts:
        changes["capacity"] = float(capacity[1])
    if stack == "megatron_fp16":
        wide = "fp32 allreduce" in dtype
        changes |= {"flash": False, "fused_loss": False, "weight_dtype": "float16",
                    "optimizer_bytes": 12.0,
                    "gradient_dtype": "float32" if wide else "float16"}  # fmt: skip
    elif stack == "megatron":
        changes |= {"weight_dtype": "bfloat16", "optimizer_bytes": 12.0}
    elif dtype == "bf16" and stack == "fsdp":  # "pure": everything in bfloat16
        changes |= {"weight_dtype": "bfloat16", "optimizer_bytes": 4.0,
                    "gradient_dtype": "bfloat16"}  # fmt: skip
    elif stack == "fsdp":
        changes |= {"gradient_dtype": "float32"}
    return replace(config, **changes)


def _measured(row: _Row, config: TransformerConfig, cluster: Cluster) -> float:
    step = row.number("step_time_s")
    if step:
        return step
    tokens = config.global_batch * config.seq_len
    speed = row.number("tokens_per_s_per_chip")
    if speed:
        return row.fill("step time: from tokens/s", tokens / (speed * cluster.chip_count))
    flops = 3 * full_flops(config)
    if _COUNTED_RECOMPUTE.search(row.text("source")):
        flops *= 4 / 3
    rate = row.number("tflops_per_chip")
    if rate is None:
        share = row.number("mfu")
        assert share is not None, "callers check that something was measured"
        share = share / 100 if share > 1 else share
        rate = share * cluster.chip.peak_flops["bf16"] / 1e12
        row.fill("step time: from MFU", None)
    row.fill("step time: from model FLOPs", None)
    return flops / (rate * 1e12 * cluster.chip_count)


def full_flops(config: TransformerConfig) -> float:
    """FLOPs of a forward pass as tables count them: attention in full, nothing padded."""
    program = transformer(replace(config, capacity=0.0))
    return sum(
        program.flops(op) / op.fraction * block.repeat
        for block in program.blocks
        for op in block.ops
        if op.is_matmul
    )
