"""What was wanted, what was reached, and why not where it was not."""

import math
from collections.abc import Mapping
from typing import Any

from experiments.delta_bench.measure import FLOOR
from experiments.delta_bench.peers import DENSE_XOR
from experiments.delta_bench.recorded import SQUASHED
from jaxrl.learner import OptimizerConfig

Summary = Mapping[str, Any]
Row = dict[str, Any]


def targets(summary: Summary, ours: str) -> dict[str, Row]:
    """Every number of the issue that this run can answer; of those missed, the reason."""
    rows: dict[str, Row] = {}
    for density, label in ((0.0062, "0.62 %"), (0.01, "1 %"), (0.05, "5 %")):
        name = _synthetic(summary, density)
        if name is None:
            continue
        pair = summary["pairs"][name]
        size, why = pair["sizes"][ours], _size_reason(pair)
        if density == 0.0062:
            rows[f"bits per change at {label}"] = _row("≤", 8.5, size["bits"], why)
            rows[f"ratio to dense at {label}"] = _row("≥", 300, size["ratio"], why)
        else:
            over = 100 * size["over_exponent"]
            rows[f"over the conditional limit at {label}, %"] = _row("≤", 10, over, why)
    rows |= _speed_targets(summary, ours)
    for kernel in ("pack", "compact"):
        moved = summary["traffic"][f"TPU {kernel}"]["bytes_per_element"]
        rows[f"bytes an element, TPU {kernel}"] = _row("≤", 4.2, moved, _traffic_reason(summary))
    rows["largest payload ÷ (dense + 1 % + 4 KiB)"] = _row("≤", 1, _largest(summary, ours), "")
    return rows


def _row(sign: str, bound: float, got: float, why: str) -> Row:
    met = bool(got >= bound if sign == "≥" else got <= bound)
    return {"wanted": f"{sign} {bound:g}", "got": got, "met": met, "why": "" if met else why}


def _synthetic(summary: Summary, density: float) -> str | None:
    """The synthetic pair of this density, if there is one."""
    for name, pair in summary["pairs"].items():
        if pair["source"] == "synthetic" and abs(pair["density"] / density - 1) < 0.05:
            return name
    return None


def _size_reason(pair: Mapping[str, Any]) -> str:
    limit, parts = pair["limits"]["given_exponent"], pair["anatomy"]
    return (
        f"the limit is {limit:.2f} bits, the tiles take {parts['tile_bits'] - limit:.2f} more, "
        f"manifest and tables {parts['manifest_bits']:.2f}"
    )


def _traffic_reason(summary: Summary) -> str:
    moved = summary["traffic"]["TPU compact"]
    return (
        f"old and new take 4; slots have a fixed capacity, of which 1 % fills "
        f"{100 * moved['slots_filled']:.0f} %, so that not one block in 10^8 overflows"
    )


def _speed_targets(summary: Summary, ours: str) -> dict[str, Row]:
    name = _synthetic(summary, 0.01)
    if name is None:
        return {}
    rows = {}
    for threads, found in summary["speeds"][name].items():
        for what in ("encode", "apply"):
            own, floor = found[ours], found[FLOOR]
            why = (
                f"NumPy's {'comparison' if what == 'encode' else 'copy'} alone is "
                f"{floor[f'{what}_times']:.1f} times as fast as slime; ours works at "
                f"{own[what]:.1f} GB/s with {own[f'{what}_cores']:.1f} cores, NumPy at "
                f"{floor[what]:.1f}; in CPU time ours is "
                f"{own[f'{what}_cpu_times']:.1f} times as fast as slime"
            )
            label = f"{what} at 1 %, {threads} thread{'s' if threads != '1' else ''}, × slime"
            rows[label] = _row("≥", 3, own[f"{what}_times"], why)
    pair = summary["pairs"][name]
    sizes = pair["sizes"]
    share = sizes[ours]["payload_bytes"] / sizes[DENSE_XOR.name]["payload_bytes"]
    rows["size at 1 %, ÷ slime's"] = _row("≤", 0.5, share, _size_reason(pair))
    return rows


def _largest(summary: Summary, ours: str) -> float:
    return max(
        pair["sizes"][ours]["payload_bytes"] / (2 * 1.01 * pair["elements"] + 4096)
        for pair in summary["pairs"].values()
    )


_SPEED = """
On these {megabytes:.0f} MB of weights NumPy's comparison alone takes {compare:.2f} ms and a copy
{copy:.2f} ms with one thread; ours takes {encode:.2f} ms and {apply:.2f} ms. By its times at
{few:.2g} % changed, {encode_fixed:.2f} and {apply_fixed:.2f} ms of that are for looking at every
old element, whose class says how likely it changed, and {encode_ns:.0f} and {apply_ns:.0f} ns for
each of the {changes:.0f} thousand changes. Payloads of ours carry checksums and digests and are
checked against them; the peers' carry and check nothing. The sparse peers share one compiled
search for changes, which their own projects do not have.
"""

_CATCHING_UP = """
Adam's first moment ties steps together: where gradients are white noise, {count} steps move a
weight √(Σ b1^|i−j|) = {moved:.1f} times as far as one (b1 = {b1}). The share of changed elements
then grows {least:.1f}- to {most:.1f}-fold over {count} versions, and so does what any lossless
delta must say: the limits alone grow {limit_least:.1f}- to {limit_most:.1f}-fold. Published runs
in which {count} steps changed only 1.6 times as many elements as one moved less far than that.
"""


def notes(summary: Summary, ours: str) -> dict[str, str]:
    """Prose of the report with this run's numbers, by the heading that it stands under."""
    missed = {k: row["why"] for k, row in summary["targets"].items() if row["why"]}
    found = {"Wanted and reached": "".join(f"- {k}: {why}\n" for k, why in missed.items())}
    name, few = _synthetic(summary, 0.01), _synthetic(summary, 0.001)
    if name is not None and few is not None:
        found["Speed"] = _speed_note(summary, name, few, ours)
    if summary["catch_up"]:
        found["Catching up"] = _catching_up_note(list(summary["catch_up"].values()))
    return found


def _speed_note(summary: Summary, name: str, few: str, ours: str) -> str:
    def seconds(pair: str, codec: str, what: str) -> float:
        dense = 2 * summary["pairs"][pair]["elements"]
        return dense / summary["speeds"][pair]["1"][codec][what] / 1e9

    changes = [summary["pairs"][pair]["changed"] for pair in (name, few)]
    values = {}
    for what in ("encode", "apply"):
        many_s, few_s = (seconds(pair, ours, what) for pair in (name, few))
        each_s = (many_s - few_s) / (changes[0] - changes[1])
        values[what] = 1e3 * many_s
        values[f"{what}_fixed"] = 1e3 * (few_s - changes[1] * each_s)
        values[f"{what}_ns"] = 1e9 * each_s
    return _SPEED.format(
        megabytes=2 * summary["pairs"][name]["elements"] / 1e6,
        compare=1e3 * seconds(name, FLOOR, "encode"),
        copy=1e3 * seconds(name, FLOOR, "apply"),
        few=100 * summary["pairs"][few]["density"],
        changes=changes[0] / 1e3,
        **values,
    )


def _catching_up_note(rows: list[Mapping[str, Any]]) -> str:
    b1, lags = OptimizerConfig().b1, range(1 - SQUASHED, SQUASHED)
    return _CATCHING_UP.format(
        count=SQUASHED,
        b1=b1,
        moved=math.sqrt(sum((SQUASHED - abs(lag)) * b1 ** abs(lag) for lag in lags)),
        least=min(row["growth"] for row in rows),
        most=max(row["growth"] for row in rows),
        limit_least=min(row["limit_growth"] for row in rows),
        limit_most=max(row["limit_growth"] for row in rows),
    )
