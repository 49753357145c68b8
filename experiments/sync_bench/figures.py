"""Plots of the report."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.harness import plots
from experiments.sync_bench import cost_model
from experiments.sync_bench.tables import DENSE
from jaxrl.sync import Link

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PARTS = {"send_s": "send", "fetch_s": "fetch", "apply_s": "apply"}


def ratio_against_density(summary: Mapping[str, Any]) -> "Figure":
    """How many times smaller than dense: the cost model's lines, and what was measured."""
    from matplotlib.ticker import LogLocator

    def paint(axis: "Axes") -> None:
        rates = summary["rates"].values()
        densities = [found["density"] for found in rates]
        x = np.geomspace(min(densities) / 1.5, max(densities) * 1.5, 50)
        model = [cost_model.sizes(1.0, d) for d in x]
        for i, key in enumerate(("sparse", "compressed")):
            y = [m.dense / getattr(m, key) for m in model]
            axis.plot(x, y, color=plots.INK, lw=1.1, ls=("-", "--")[i], label=f"model: {key}")
        names = [name for found in rates for name in found["sizes"] if name != DENSE]
        for i, name in enumerate(dict.fromkeys(names)):
            y = [found["dense_bytes"] / found["sizes"][name] for found in rates]
            axis.plot(densities, y, label=name, marker="osD^"[i], ms=7, ls="none",
                      color=plots.SERIES[i])  # fmt: skip
        axis.set(xscale="log", yscale="log", xlabel="changed weights", ylabel="times smaller")
        axis.xaxis.set_major_formatter(lambda v, _: f"{100 * v:g} %")
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()

    return plots.draw(paint, size=(7.2, 4.0))


def seconds_by_link(summary: Mapping[str, Any]) -> "Figure":
    """Where the time of one version goes, a panel for each link, with the model's transfer."""
    links = summary["larger"]

    def paint(*axes: "Axes") -> None:
        for axis, (link, found) in zip(axes, links.items(), strict=True):
            names = list(found)[::-1]
            left = np.zeros(len(names))
            for i, (part, label) in enumerate(_PARTS.items()):
                width = np.asarray([1e3 * found[name][part] for name in names])
                axis.barh(names, width, left=left, height=0.62, label=label, color=plots.SERIES[i])
                left += width
            if link in summary["emulated"]:
                model = [
                    1e3 * found[name]["send_s"]
                    + 1e3
                    * cost_model.seconds(
                        Link.parse(link),
                        found[name]["size_bytes"],
                        requests=found[name]["requests"],
                    )
                    for name in names
                ]
                axis.plot(
                    model, names, ls="none", marker="D", ms=5, color=plots.INK,
                    label="end of the fetch by the cost model",
                )  # fmt: skip
            axis.set(title=link, xlabel="ms a version")

    rows = -(-len(links) // 2)
    return plots.draw(paint, columns=2, rows=rows, size=(7.2, 1.9 * rows + 0.5))
