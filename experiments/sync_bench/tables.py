"""Tables of the report."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.harness import Table
from experiments.sync_bench import cost_model
from jaxrl.sync import Link

OURS, DENSE = "ours", "dense"
MODELLED = {"as modelled: sparse": "sparse", "as modelled: compressed": "compressed"}
MODELS = {"8 B": 8e9, "70 B": 70e9, "671 B": 671e9}


def sizes(summary: Mapping[str, Any]) -> Table:
    """Bytes of a version by learning rate."""
    rows = []
    for rate, found in summary["rates"].items():
        dense = found["dense_bytes"]
        modelled = cost_model.sizes(found["elements"], found["density"])
        entries = found["sizes"] | {n: getattr(modelled, key) for n, key in MODELLED.items()}
        for name, size in sorted(entries.items(), key=lambda entry: -entry[1]):
            bits = 8 * size / (found["density"] * found["elements"])
            rows.append((rate, f"{found['density']:.3%}", name, int(size), dense / size, bits))
    return Table(
        columns=("learning rate", "changed", "", "bytes", "times smaller", "bits a change"),
        rows=tuple(rows),
        caption="Bytes of one version of the recorded training, medians over versions.",
    )


def times(summary: Mapping[str, Any]) -> Table:
    """Seconds of a version of the trained policy by link, beside its training step."""
    step_s = summary["step_s"]
    return _times(
        summary["links"],
        caption=f"One version of the trained policy at learning rate {summary['reference_rate']}, "
        f"medians; a training step takes {step_s:.3g} s. Pause: what generation waits for.",
        step_s=step_s,
    )


def times_of_copies(summary: Mapping[str, Any]) -> Table:
    """Seconds of a version of the larger model by link."""
    elements = summary["copies"] * summary["rates"][summary["reference_rate"]]["elements"]
    return _times(
        summary["larger"],
        caption=f"The same weights and changes {summary['copies']} times beside each other, "
        f"{elements / 1e6:.3g} M weights.",
    )


def _times(
    links: Mapping[str, Mapping[str, Any]], *, caption: str, step_s: float | None = None
) -> Table:
    columns = ("link", "", "bytes", "send ms", "fetch ms", "apply ms", "all ms", "pause ms")
    rows = []
    for link, found in links.items():
        for name, m in found.items():
            parts = (f"{1e3 * m[key]:.1f}" for key in ("send_s", "fetch_s", "apply_s", "total_s"))
            row = link, name, int(m["size_bytes"]), *parts, f"{1e3 * m['pause_s']:.3g}"
            rows.append(row if step_s is None else (*row, f"{m['total_s'] / step_s:.1%}"))
    columns = columns if step_s is None else (*columns, "all / step")
    return Table(columns=columns, rows=tuple(rows), caption=caption)


def models(summary: Mapping[str, Any], links: Sequence[str]) -> Table:
    """Transfer times of larger models by the cost model, ours at the measured bits a change."""
    found = summary["rates"][summary["reference_rate"]]
    density = found["density"]
    ours_bits = 8 * found["sizes"][OURS] / (density * found["elements"])
    rows = []
    for title, elements in MODELS.items():
        modelled = cost_model.sizes(elements, density)
        ours = density * elements * ours_bits / 8
        entries = {
            DENSE: modelled.dense, **{n: getattr(modelled, k) for n, k in MODELLED.items()},
            OURS: ours,
        }  # fmt: skip
        for name, size in entries.items():
            seconds = (cost_model.seconds(Link.parse(link), size) for link in links)
            rows.append((title, name, size / 1e9, *seconds))
    return Table(
        columns=("weights", "", "GB", *(f"s over {link}" for link in links)),
        rows=tuple(rows),
        caption=f"Computed, not measured: transfers of larger models if {density:.3%} change too, "
        "by SparseRL-Sync's cost model, and ours at the bits a change that were measured.",
    )
