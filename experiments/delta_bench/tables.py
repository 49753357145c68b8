"""The tables, made from the summary alone."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.delta_bench.ours import FAST
from experiments.delta_bench.peers import MODELLED_BITS
from experiments.delta_bench.traffic import CHIPS, HALVES, TRAINER
from experiments.harness.tables import Table

Summary = Mapping[str, Any]

LIMITS = {
    "given_exponent": "limit, exponents known",
    "iid": "limit, i.i.d.",
    "new_value": "limit of sending new values",
}
_MODEL = "SparseRL-Sync's own model"


def density_text(density: float) -> str:
    """A density as per cent, with two digits.

    >>> density_text(0.00099), density_text(0.00621), density_text(0.3), density_text(1.0)
    ('0.099 %', '0.62 %', '30 %', '100 %')
    """
    return f"{float(f'{100 * density:.2g}'):g} %"


def pairs_of(summary: Summary, source: str) -> list[str]:
    """Names of the pairs of a source, "synthetic", "recorded" or "squashed", in order."""
    return [name for name, pair in summary["pairs"].items() if pair["source"] == source]


def nearest(summary: Summary, density: float) -> str:
    """The synthetic pair whose density is nearest, as a factor."""
    pairs = {name: summary["pairs"][name]["density"] for name in pairs_of(summary, "synthetic")}
    return min(pairs, key=lambda name: abs(math.log(pairs[name] / density)))


def curves(summary: Summary, source: str) -> dict[str, list[tuple[float, float]]]:
    """Of each codec (density, bits per change) over the pairs of a source."""
    found: dict[str, list[tuple[float, float]]] = {}
    for pair in (summary["pairs"][name] for name in pairs_of(summary, source)):
        for codec, size in pair["sizes"].items():
            found.setdefault(codec, []).append((pair["density"], size["bits"]))
    return found


def limit_curves(summary: Summary, source: str) -> dict[str, list[tuple[float, float]]]:
    """Of the limits for codecs that send changes, the same."""
    pairs = [summary["pairs"][name] for name in pairs_of(summary, source)]
    return {
        LIMITS[key]: [(p["density"], p["limits"][key]) for p in pairs]
        for key in ("given_exponent", "iid")
    }


def _bits_and_ratio(bits: float, density: float) -> str:
    ratio = 16 / (density * bits)
    return f"{bits:.2f} ({ratio:,.0f}×)" if ratio >= 10 else f"{bits:.2f} ({ratio:.1f}×)"


def sizes(summary: Summary, names: Sequence[str], headings: Sequence[str], caption: str) -> Table:
    """Bits per changed element and ratio to dense weights: codecs × pairs, then the limits."""
    pairs = [summary["pairs"][name] for name in names]
    codecs = list(dict.fromkeys(codec for pair in pairs for codec in pair["sizes"]))
    rows = [
        (codec, *(_bits_and_ratio(p["sizes"][codec]["bits"], p["density"]) for p in pairs))
        for codec in codecs
    ]
    for key, label in LIMITS.items():
        rows.append((label, *(_bits_and_ratio(p["limits"][key], p["density"]) for p in pairs)))
    rows.append((_MODEL, *(_bits_and_ratio(MODELLED_BITS, p["density"]) for p in pairs)))
    return Table(columns=("", *headings), rows=tuple(rows), caption=caption)


def synthetic(summary: Summary) -> Table:
    """Sizes over the synthetic pairs."""
    names = pairs_of(summary, "synthetic")
    headings = [density_text(summary["pairs"][name]["density"]) for name in names]
    caption = "Synthetic pairs: bits per changed element (ratio to dense bf16), headers included"
    return sizes(summary, names, headings, caption)


def recorded(summary: Summary) -> Table:
    """Sizes over the recorded pairs of consecutive versions."""
    names = pairs_of(summary, "recorded")
    headings = [
        f"{name.split(', ')[1]}: {density_text(summary['pairs'][name]['density'])}".replace(
            " ", "\N{NO-BREAK SPACE}"
        )
        for name in names
    ]
    caption = "Recorded RePO training, one version to the next: bits per changed element (ratio)"
    return sizes(summary, names, headings, caption)


def excess(summary: Summary, ours: str) -> Table:
    """How far above the limit given the old exponents, in per cent: ours and the best peer."""
    rows = []
    for name, pair in summary["pairs"].items():
        found = pair["sizes"]
        peers = {k: v["bits"] for k, v in found.items() if k not in (ours, FAST)}
        best = min(peers, key=lambda k: peers[k])
        own = found.get(ours, {})
        rows.append(
            (
                name,
                density_text(pair["density"]),
                pair["limits"]["given_exponent"],
                own.get("bits"),
                None if not own else 100 * own["over_exponent"],
                peers[best],
                best,
                None if not own else peers[best] / own["bits"],
            )
        )
    columns = (
        "", "changed", "limit, bits", "ours, bits", "over limit, %", "best peer, bits",
        "which", "best peer ÷ ours",
    )  # fmt: skip
    return Table(columns=columns, rows=tuple(rows), caption="Against the limit")


def anatomy(summary: Summary, ours: str) -> Table:
    """Where the bits of our payloads go, and what a full version of the same weights takes."""
    rows = []
    for name, pair in summary["pairs"].items():
        parts, limit = pair["anatomy"], pair["limits"]["given_exponent"]
        modes = ", ".join(f"{count} {mode}" for mode, count in parts["modes"].items())
        rows.append(
            (
                name,
                limit,
                parts["tile_bits"] - limit,
                parts["manifest_bits"],
                pair["sizes"][ours]["bits"],
                modes,
                pair["anchor"]["ours"],
                pair["anchor"]["zstd-1"],
            )
        )
    columns = (
        "", "limit", "+ tiles above it", "+ manifest and tables", "= bits a change", "tiles",
        "anchor, × smaller", "zstd-1 of it",
    )  # fmt: skip
    caption = "Where our bits go; and full versions (anchors) of the same weights"
    return Table(columns=columns, rows=tuple(rows), caption=caption)


def speed(summary: Summary, name: str) -> Table:
    """Speeds of all on one pair, at each number of threads."""
    pair = summary["pairs"][name]
    records: dict[str, dict[str, Any]] = {}
    for threads, found in summary["speeds"][name].items():
        for codec, values in found.items():
            record = records.setdefault(codec, {})
            record |= {f"{key}@{threads}": value for key, value in values.items()}
            record["bits"] = pair["sizes"].get(codec, {}).get("bits")
    columns = {"bits": "bits a change"}
    for what in ("encode", "apply"):
        for threads in summary["speeds"][name]:
            columns[f"{what}@{threads}"] = f"{what} GB/s, {threads} thr."
            columns[f"{what}_times@{threads}"] = "× slime"
            if threads == "1":
                columns[f"{what}_cpu_times@{threads}"] = "in CPU time"
    caption = f"Speed at {density_text(pair['density'])} changed: medians of interleaved rounds"
    return Table.of(records, columns, caption=caption)


def speed_by_density(summary: Summary, what: str) -> Table:
    """GB/s with one thread: codecs × pairs."""
    records: dict[str, dict[str, float]] = {}
    headings = {}
    for name, by_threads in summary["speeds"].items():
        headings[name] = density_text(summary["pairs"][name]["density"])
        for codec, values in by_threads["1"].items():
            records.setdefault(codec, {})[name] = values[what]
    return Table.of(records, headings, caption=f"{what}, GB/s of dense weights, 1 thread")


def catch_up(summary: Summary) -> Table:
    """One payload over several versions against one version and against all of them."""
    columns = {
        "density_one": "changed by 1", "density_all": "changed by 8", "growth": "growth",
        "one_bytes": "1 version, bytes", "sum_bytes": "8 deltas, bytes",
        "squash_bytes": "squashed, bytes", "of_sum": "of the 8 deltas",
        "of_one": "× 1 version", "limit_growth": "… of the limits",
    }  # fmt: skip
    densities = ("density_one", "density_all")
    records = {
        name: row | {key: density_text(row[key]) for key in densities}
        for name, row in summary["catch_up"].items()
    }
    return Table.of(records, columns, caption="Eight versions squashed into one delta")


def cold(summary: Summary) -> Table:
    """Seconds of a process's first calls."""
    columns = {
        "import_s": "import s", "first_encode_s": "first encode s",
        "second_encode_s": "second encode s", "first_apply_s": "first apply s",
        "second_apply_s": "second apply s",
    }  # fmt: skip
    return Table.of(summary["cold"], columns, caption="First calls in a new process")


def traffic(summary: Summary) -> Table:
    """Bytes that the accelerators' kernels move for each element."""
    columns = {
        "bytes_per_element": "bytes an element", "least": "least possible", "ratio": "ratio",
    }  # fmt: skip
    caption = "bf16 traffic of the kernels, counted from their blocks, results and gathers"
    return Table.of(summary["traffic"], columns, caption=caption)


def traffic_by_model(summary: Summary) -> Table:
    """The same for all matrices of well-known models, between usual shardings."""
    columns = {f"{chip}_{half}": f"{chip} {half}" for chip in CHIPS for half in HALVES}
    caption = f"Bytes an element, from rows over {TRAINER} devices to tensor parallelism"
    return Table.of(summary["traffic_by_model"], columns, caption=caption)


def targets(summary: Summary) -> Table:
    """Wanted against reached."""
    rows = tuple(
        (name, row["wanted"], row["got"], "yes" if row["met"] else "no")
        for name, row in summary["targets"].items()
    )
    return Table(
        columns=("", "wanted", "reached", "met"),
        rows=rows,
        caption="Numbers that the codec was asked for",
    )
