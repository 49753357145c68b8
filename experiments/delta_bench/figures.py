"""The plots of the report."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments.harness.plots import INK, SERIES, draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "osD^vPX*h"
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))

Points = Sequence[tuple[float, float]]


def _look(place: int) -> dict[str, Any]:
    """Ours is first and heavy; colours repeat after eight series, dashes and markers do not."""
    return {
        "color": SERIES[place % len(SERIES)],
        "marker": _MARKERS[place % len(_MARKERS)],
        "linestyle": _DASHES[place // len(SERIES)],
        "linewidth": 2.6 if place == 0 else 1.2,
        "markersize": 7 if place == 0 else 4.5,
        "zorder": 5 if place == 0 else 3,
    }


def bits_against_density(
    panels: Mapping[str, Mapping[str, Points]],
    limits: Mapping[str, Mapping[str, Points]],
    order: Sequence[str],
) -> "Figure":
    """Bits per changed element over the density, a panel for each kind of data.

    Args:
      panels: title to (codec to (density, bits)).
      limits: title to (limit to (density, bits)).
      order: of the codecs; the first is drawn heavy.
    """

    def paint(*axes: "Axes") -> None:
        for axis, (title, lines) in zip(axes, panels.items(), strict=True):
            for name in order:
                if points := lines.get(name):
                    axis.plot(*zip(*points, strict=True), label=name, **_look(order.index(name)))
            for i, (name, points) in enumerate(limits[title].items()):
                axis.plot(
                    *zip(*points, strict=True), label=name, color=INK, lw=1.4, ls=_DASHES[i + 1],
                    zorder=6,
                )  # fmt: skip
            axis.set(title=title, xlabel="changed elements", xscale="log", yscale="log")
            axis.set_ylim(4, 75)
            axis.set_yticks([4, 6, 8, 12, 16, 24, 32, 48, 64], minor=False)
            axis.set_yticks([], minor=True)
            axis.yaxis.set_major_formatter("{x:g}")
            axis.set_xticks([1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0], minor=False)
            axis.set_xticks([], minor=True)
            axis.xaxis.set_major_formatter(lambda x, _: f"{100 * x:g} %")
            axis.set_xlim(7e-4, 1.4)
        axes[0].set_ylabel("bits per changed element")

    return draw(paint, columns=len(panels), size=(9.6, 5.6))


def size_against_speed(
    encode: Mapping[str, tuple[float, float]],
    apply: Mapping[str, tuple[float, float]],
    *,
    floors: tuple[float, float],
    limit: float,
    order: Sequence[str],
) -> "Figure":
    """Bits per change over speed; down and to the right is better.

    Args:
      encode: codec to (GB/s of dense weights, bits).
      apply: the same.
      floors: GB/s of the comparison alone, and of a copy alone.
      limit: bits per change given the old exponents.
      order: of the codecs; the first is drawn heavy.
    """

    def paint(*axes: "Axes") -> None:
        titles = ("encode", "apply")
        for axis, title, points, floor in zip(axes, titles, (encode, apply), floors, strict=True):
            axis.axhline(limit, color=INK, lw=1.2, ls=_DASHES[1], label="limit, exponents known")
            axis.axvline(floor, color=INK, lw=1.2, ls=_DASHES[2], label="NumPy alone")
            for name in order:
                if name in points:
                    look = _look(order.index(name)) | {"linestyle": "none", "markersize": 9}
                    axis.plot(*points[name], label=name, **look)
            axis.set(title=title, xlabel="GB/s of dense weights, 1 thread", xscale="log")
            axis.set(yscale="log", ylim=(5, 60))
            axis.set_yticks([6, 8, 12, 16, 24, 32, 48], minor=False)
            axis.set_yticks([], minor=True)
            axis.yaxis.set_major_formatter("{x:g}")
            axis.set_xticks([0.5, 1, 2, 4, 8, 16, 32], minor=False)
            axis.set_xticks([], minor=True)
            axis.xaxis.set_major_formatter("{x:g}")
            axis.margins(x=0.12)
        axes[0].set_ylabel("bits per changed element")

    return draw(paint, columns=2, size=(9.6, 5.0))
