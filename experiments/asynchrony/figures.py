"""The plots of the report."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments.asynchrony.scenarios import ACTORS, RATIOS, TBA_SPEEDUP, Speedups
from experiments.asynchrony.simulator import ideal_speedup
from experiments.harness.plots import INK, SERIES, draw, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "osD^vPX*"
Curve = tuple[Sequence[float], Sequence[float]]


def _look(place: int) -> dict[str, Any]:
    return style(place) | {"marker": _MARKERS[place % len(_MARKERS)], "markersize": 3.5}


def overview(
    by_clock: Mapping[str, Curve],
    by_samples: Mapping[str, Curve],
    *,
    before: float,
    speedups: Mapping[str, Speedups],
    grid: Mapping[float, Speedups],
    actors: Sequence[int],
    here: float,
    reached: float = TBA_SPEEDUP,
) -> "Figure":
    """Learning by the clock and by samples; speed-up by actors and by G/T.

    Args:
      by_clock: seconds and accuracy by method.
      by_samples: thousands of completions and accuracy by method, in the same order.
      before: accuracy of the SFT policy.
      speedups: by what they are for; thin lines are the closed form of each.
      grid: by ratio of generation to training time; lines are closed forms.
      actors: numbers of them in `grid`.
      here: the ratio that was measured.
      reached: a speed-up to compare with.
    """

    def paint(*axes: "Axes") -> None:
        _learning(axes[0], by_clock, "seconds of training", before)
        _learning(axes[1], by_samples, "completions trained on, thousands", before)
        axes[0].set_ylabel("held-out accuracy of samples")
        _many_actors(axes[2], speedups)
        _fourfold(axes[3], grid, actors, here)
        for axis in axes[2:]:
            axis.axhline(reached, color=INK, lw=0.9, alpha=0.6)
            axis.annotate(
                f"{reached:g} × (TBA)", (1, reached), xycoords=("axes fraction", "data"),
                va="bottom", ha="right", fontsize=8,
            )  # fmt: skip
            _own_legend(axis)

    return draw(paint, columns=2, rows=2, size=(9.6, 8.4))


def _learning(axis: "Axes", curves: Mapping[str, Curve], label: str, before: float) -> None:
    axis.axhline(before, color=INK, lw=0.9, alpha=0.5)
    for place, (name, (x, y)) in enumerate(curves.items()):
        axis.plot(x, y, label=name, **_look(place))
    axis.set(xlabel=label, xlim=(0, None))


def _many_actors(axis: "Axes", curves: Mapping[str, Speedups]) -> None:
    for place, (name, found) in enumerate(curves.items()):
        axis.plot(ACTORS, found.ideal, color=INK, lw=0.7, alpha=0.5)
        axis.plot(ACTORS, found.speedups, label=name, **_look(place))
    axis.set(xscale="log", yscale="log", xlabel="actors", ylabel="speed-up")
    axis.set_xticks(ACTORS, [f"{n:,}" for n in ACTORS], fontsize=8)
    axis.set_xticks([], minor=True)
    axis.yaxis.set_major_formatter("{x:g}")


def _fourfold(
    axis: "Axes", simulated: Mapping[float, Speedups], actors: Sequence[int], here: float
) -> None:
    axis.axvline(here, color=INK, lw=0.9, alpha=0.6, linestyle=":")
    axis.annotate(" this run", (here, 1), fontsize=8)
    dense = [RATIOS[0] * (RATIOS[-1] / RATIOS[0]) ** (i / 200) for i in range(201)]
    for place, count in enumerate(actors):
        look = style(place)
        label = f"{count:,} actor{'s' * (count > 1)}"
        axis.plot(dense, [ideal_speedup(r, count) for r in dense], label=label, **look)
        found = [simulated[ratio].speedups[place] for ratio in RATIOS]
        axis.plot(RATIOS, found, linestyle="none", marker=_MARKERS[place], color=look["color"])
    axis.set(xscale="log", yscale="log", xlabel="G/T: generation over training time")
    for which in (axis.xaxis, axis.yaxis):
        which.set_major_formatter("{x:g}")


def _own_legend(axis: "Axes") -> None:
    """A legend within the axis, and none of it in that of the figure."""
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles, labels, fontsize=8, loc="upper left")
    for handle in handles:
        handle.set_label("_")


def idle(learner: Mapping[str, float], actors: Mapping[str, float]) -> "Figure":
    """Idle shares of learner and actors, by method."""

    def paint(axis: "Axes") -> None:
        names, height = list(learner), 0.38
        for i, (label, shares) in enumerate((("learner", learner), ("actors", actors))):
            places = [n + (i - 0.5) * height for n in range(len(names))]
            values = [shares[name] for name in names]
            bars = axis.barh(places, values, height=height, color=SERIES[i], label=label)
            axis.bar_label(bars, [f"{value:.0%}" for value in values], padding=3, fontsize=8)
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.xaxis.set_major_formatter(lambda x, _: f"{100 * x:g} %")
        axis.set(xlabel="share of the time without work", xlim=(0, 1))
        axis.grid(axis="y", visible=False)

    return draw(paint, size=(7.2, 0.55 * len(learner) + 1.3))


def staleness(shares: Mapping[str, Mapping[int, float]], *, longest: int = 12) -> "Figure":
    """Histogram of the age of trained tokens, a panel for each method.

    Args:
      shares: of the tokens by their age in versions, by method.
      longest: older ones are counted together.
    """

    def paint(*axes: "Axes") -> None:
        for place, (axis, (name, found)) in enumerate(zip(axes, shares.items(), strict=True)):
            heights = [found.get(age, 0.0) for age in range(longest)]
            heights.append(sum(share for age, share in found.items() if age >= longest))
            axis.bar(range(longest + 1), heights, color=SERIES[place % len(SERIES)], width=0.8)
            axis.set_xticks([0, 4, 8, longest], ["0", "4", "8", f"≥ {longest}"])
            axis.yaxis.set_major_formatter(lambda y, _: f"{100 * y:g} %")
            axis.set(title=name, xlabel="versions behind the learner")
        axes[0].set_ylabel("share of trained tokens")

    return draw(paint, columns=len(shares), size=(2.4 * len(shares), 2.8))


def agreement(measured: Mapping[str, float], simulated: Mapping[str, float]) -> "Figure":
    """Measured and simulated updates a second on this machine, by method."""

    def paint(axis: "Axes") -> None:
        places = range(len(measured))
        axis.bar(places, list(simulated.values()), color=SERIES[0], alpha=0.45, label="simulated")
        axis.plot(places, list(measured.values()), "o", color=SERIES[1], label="measured")
        axis.set_xticks(places, [name.replace(", ", ",\n") for name in measured], fontsize=8)
        axis.set(ylabel="updates a second", ylim=(0, None))
        axis.grid(axis="x", visible=False)

    return draw(paint, size=(7.2, 3.4))
