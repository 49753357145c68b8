"""Plots for a report. Colours are placeholders that the page turns into its light or dark ones.

Lines differ in colour, dash and marker, so that they can be told apart without colour.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # matplotlib takes half a second to import: not for every `--help`
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"
"""Text and axes; the report replaces it by the page's text colour."""
SERIES = ("#010101", "#010102", "#010104", "#010105", "#010106", "#010107", "#010108", "#010109")
"""Series colours; the report replaces them by its palette."""
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
_MARKERS = "osD^vPX*"

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10.0,
    "svg.fonttype": "none",
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.13,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


def draw(
    paint: Callable[..., None], *, columns: int = 1, rows: int = 1, size: tuple[float, float]
) -> "Figure":
    """A figure in the report's style.

    Args:
      paint: given one `Axes` for each of rows × columns, draws on them.
      columns: of axes.
      rows: of axes.
      size: width and height of the figure in inches.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).ravel())
        paint(*axes)
        _legend(figure, axes)
    return figure


def _legend(figure: "Figure", axes: Sequence["Axes"]) -> None:
    """One legend for all axes, above them, where it hides no data."""
    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if len(entries) > 1:
        columns = min(len(entries), 4)
        figure.legend(entries.values(), entries.keys(), loc="outside upper left", ncols=columns)


def style(index: int) -> dict[str, Any]:
    """Colour and dash of the i-th series."""
    return {"color": SERIES[index % len(SERIES)], "linestyle": _DASHES[index % len(_DASHES)]}


def _places(order: Sequence[str], *names: str) -> dict[str, int]:
    """Place of each series in the palette: first those of `order`, then the others."""
    return {name: i for i, name in enumerate(dict.fromkeys([*order, *names]))}


def tradeoff(
    points: Mapping[str, tuple[float, float]],
    *,
    errors: Mapping[str, tuple[float, float]] | None = None,
    frontier: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    x_label: str = "safety rate",
    y_label: str = "reward",
    order: Sequence[str] = (),
) -> "Figure":
    """Reward against safety, one marker for each policy; up and to the right is better.

    Args:
      points: safety and reward by policy.
      errors: their standard errors.
      frontier: curves to compare with, such as the exact limits.
      x_label: what the first numbers are.
      y_label: what the second numbers are.
      order: all series of the report, so that each keeps its colour from plot to plot.
    """
    places = _places(order, *points)

    def paint(axis: "Axes") -> None:
        for i, (name, (xs, ys)) in enumerate((frontier or {}).items()):
            axis.plot(xs, ys, label=name, lw=1.2, color=INK, alpha=0.7, linestyle=_DASHES[i])
        for name, (x, y) in points.items():
            i = places[name]
            x_error, y_error = (errors or {}).get(name, (0.0, 0.0))
            axis.errorbar(
                x,
                y,
                xerr=x_error or None,
                yerr=y_error or None,
                color=SERIES[i % len(SERIES)],
                marker=_MARKERS[i % len(_MARKERS)],
                markersize=8,
                linestyle="none",
                label=name,
            )
        axis.set(xlabel=x_label, ylabel=y_label)
        axis.margins(0.08)

    return draw(paint, size=(7.2, 4.2))


def sorted_prompts(
    values: Mapping[str, np.ndarray],
    *,
    y_label: str,
    threshold: float | None = 0.0,
    order: Sequence[str] = (),
) -> "Figure":
    """A number per prompt, each policy's prompts from worst to best.

    Args:
      values: one number per prompt, by policy.
      y_label: what it is.
      threshold: a line to compare with, or None.
      order: all series of the report, so that each keeps its colour from plot to plot.
    """
    places = _places(order, *values)

    def paint(axis: "Axes") -> None:
        if threshold is not None:
            axis.axhline(threshold, color=INK, lw=0.9, alpha=0.6)
        for name, numbers in values.items():
            ordered = np.sort(np.asarray(numbers, dtype=float))[::-1]
            share = (np.arange(ordered.size) + 0.5) / ordered.size
            axis.plot(share, ordered, label=name, **style(places[name]))
        axis.set(xlabel="share of the prompts, worst first", ylabel=y_label, xlim=(0, 1))

    return draw(paint, size=(7.2, 3.6))


def agreement(
    points: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    quantity: str,
    truth: str = "measured",
) -> "Figure":
    """Predicted against true values on logarithmic axes; on the line both are equal.

    Args:
      points: true and predicted values by series, all positive.
      quantity: what they are, with its unit: "step time (s)".
      truth: how the true ones were found.
    """

    def paint(axis: "Axes") -> None:
        for i, (name, (true, predicted)) in enumerate(points.items()):
            axis.plot(
                true,
                predicted,
                color=SERIES[i % len(SERIES)],
                marker=_MARKERS[i % len(_MARKERS)],
                markersize=4,
                linestyle="none",
                alpha=0.6,
                label=name,
            )
        values = [v for pair in points.values() for series in pair for v in series]
        ends = [min(values), max(values)]
        axis.plot(ends, ends, color=INK, lw=0.9, alpha=0.6)
        axis.set(xscale="log", yscale="log")
        axis.set(xlabel=f"{truth} {quantity}", ylabel=f"predicted {quantity}")

    return draw(paint, size=(7.2, 5.4))


Curve = tuple[Sequence[float], Sequence[float]]


def curves(
    panels: Mapping[str, Mapping[str, Curve]],
    *,
    x_label: str = "step",
    columns: int = 2,
    smooth: int = 1,
    order: Sequence[str] = (),
) -> "Figure":
    """Lines over steps, one panel for each quantity.

    Args:
      panels: title to (series to (steps, values)); values that are not finite leave a gap.
      x_label: what the first numbers are.
      columns: panels beside each other.
      smooth: steps over which values are averaged; the raw ones stay visible behind.
      order: all series of the report, so that each keeps its colour from plot to plot.
    """
    places = _places(order, *(name for panel in panels.values() for name in panel))
    rows = -(-len(panels) // columns)

    def paint(*axes: "Axes") -> None:
        for axis, (title, panel) in zip(axes, panels.items(), strict=False):
            for name, (steps, values) in panel.items():
                _line(
                    axis, np.asarray(steps), np.asarray(values, float), smooth, name, places[name]
                )
            axis.set(title=title, xlabel=x_label)
            if _spread(panel.values()) > _LINEAR_UP_TO:
                axis.set_yscale("symlog", linthresh=1.0)
        for axis in axes[len(panels) :]:
            axis.remove()

    wide = min(columns, len(panels))
    return draw(paint, rows=rows, columns=wide, size=(7.2, 2.4 * rows + 0.5))


_LINEAR_UP_TO = 20.0
"""Above this ratio of the largest to the median end, a linear axis flattens most lines to one."""


def _spread(panel: Iterable[Curve]) -> float:
    """Largest end of the lines over the median one; at most 1 where there is nothing to part."""
    ends = np.abs([float(values[-1]) for _, values in panel if len(values)])
    ends = ends[np.isfinite(ends)]
    return float(ends.max() / max(float(np.median(ends)), 1.0)) if ends.size > 1 else 0.0


def _line(axis: "Axes", x: np.ndarray, y: np.ndarray, smooth: int, name: str, place: int) -> None:
    look = style(place)
    if smooth > 1 and y.size > 2 * smooth:
        axis.plot(x, y, color=look["color"], lw=0.6, alpha=0.3)
        y = running_mean(y, smooth)
    dot = "o" if y.size == 1 else None
    axis.plot(x, y, label=name, marker=dot, **look)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` values at each place; of fewer at the start.

    >>> running_mean(np.array([1.0, 3.0, 5.0]), 2)
    array([1., 2., 4.])
    """
    total = np.cumsum(np.concatenate([np.zeros(1), values]))
    last = np.arange(1, values.size + 1)
    first = np.maximum(last - window, 0)
    return (total[last] - total[first]) / (last - first)


TRAINING = {
    "reward": "reward",
    "cost": "cost",
    "safety": "safety rate",
    "multiplier": "multiplier λ",
    "kl": "KL from the reference (nats)",
}
"""Metrics that `training` shows, with their titles."""


def training(
    rows: Sequence[Mapping[str, Any]],
    stages: Sequence[str],
    *,
    smooth: int = 10,
    order: Sequence[str] = (),
) -> "Figure | None":
    """What a person watched while a run went on; None where nothing of it was logged.

    Args:
      rows: of metrics.jsonl, see `Metrics.rows`.
      stages: which to show: the algorithms.
      smooth: see `curves`.
      order: see `curves`.
    """
    panels: dict[str, dict[str, Curve]] = {}
    for metric, title in TRAINING.items():
        found = {s: _series(rows, s, metric) for s in stages}
        found = {stage: curve for stage, curve in found.items() if curve[0]}
        if found:
            panels[title] = found
    return curves(panels, smooth=smooth, order=order) if panels else None


def _series(rows: Sequence[Mapping[str, Any]], stage: str, metric: str) -> Curve:
    chosen = [row for row in rows if row["stage"] == stage and metric in row]
    values = [float("nan") if row[metric] is None else float(row[metric]) for row in chosen]
    return [float(row["step"]) for row in chosen], values
