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
  `params_b` if it tells, else from the name; so do tied heads, and heads wider than
  d_model / heads.
* vocabulary blank: GPT-2's on GPUs; Megatron pads it to even shards of a multiple of 128.
* degrees: `n_chips`·devices a chip / the others; a blank tensor degree takes what data
  parallelism leaves, up to a node; the pipeline takes the rest. All blank: FSDP.
* experts' degree lies within the data and FSDP degrees.
* `optimizer_sharding` blank: ZeRO-3 with an `fsdp` degree, on GPUs ZeRO-1 over `dp`,
  in float16 none.
* `microbatch` is of a replica; on TPUs of a device if micro-batch x devices is the global batch.
* micro-batch blank: the largest power of two that divides a replica's batch, at most 8,192 tokens.
* rematerialisation blank: the least that fits in memory; where launches of a problem failed, the
  least with which all of its launches that ran fit, for all of them.
* software: XLA on TPUs or where the source says so; PyTorch FSDP for ZeRO-2/3 on GPUs; Megatron
  for the rest, in float16 without fused attention.
"""

import csv
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sharding.costs.strategies import Strategy
from sharding.machines.topology import Cluster
from sharding.measured.run_cluster import read_chip, read_cluster, read_stack
from sharding.measured.run_model import read_config, with_padded_vocab, with_types
from sharding.measured.run_row import Row
from sharding.measured.run_strategy import read_strategy
from sharding.programs.transformer import TransformerConfig, transformer

# Tables whose TFLOP/s count recomputation.
_COUNTED_RECOMPUTE = re.compile(r"Megatron-LM README Jan-2021|SC21", re.IGNORECASE)


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
    def is_complete(self) -> bool:
        """Whether the table says what ran: constants are fitted to such runs only."""
        guessed = ("dp", "degrees", "sizes", "parameters", "global batch")
        return self.measured_s is not None and not any(r.startswith(guessed) for r in self.filled)

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
        row = Row(raw)
        try:
            runs.append(_parse(index, row))
        except (ValueError, ZeroDivisionError, OverflowError) as error:
            skipped.append(
                Skipped(row=index, source=row.text("source"), hardware=row.text("hardware"),
                        model=row.text("model"), reason=str(error))
            )  # fmt: skip
    return runs, skipped


def _parse(index: int, row: Row) -> Run:
    chips = row.whole("n_chips")
    chip = read_chip(row)
    if chips is None:
        raise ValueError("n_chips is blank or no number")
    measures = ("step_time_s", "tokens_per_s_per_chip", "tflops_per_chip", "mfu")
    failed = re.search(r"INFEASIBLE|out of memory|\bOOM\b|failed", row.text("notes")) is not None
    if not failed and not any(row.number(name) for name in measures):
        raise ValueError("no measured quantity")
    cluster = read_cluster(row, chip, chips)
    config = read_config(row, cluster)
    strategy, remat, config = read_strategy(row, cluster, config)
    stack = read_stack(row, chip)
    config = with_types(row, config, stack)
    config = with_padded_vocab(row, config, stack, strategy.tensor)
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


def _measured(row: Row, config: TransformerConfig, cluster: Cluster) -> float:
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
