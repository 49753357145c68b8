"""Figures as PNG files, for pages that cannot follow a reader's colours."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.harness.plots import INK, SERIES
from experiments.harness.report import LIGHT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK = "#1b1d21"
_COLOURED = ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor")


def save_png(figure: "Figure", path: Path | str, *, dpi: int = 110) -> None:
    """Writes a figure of `plots` in the report's light colours on white.

    The figure keeps these colours: give it to a report before.

    Args:
      figure: from `plots.draw`.
      path: of the file.
      dpi: pixels an inch.
    """
    from matplotlib.colors import to_hex

    palette = dict(zip(SERIES, LIGHT, strict=True)) | {INK: _INK}

    def repainted(value: Any) -> str | None:
        try:
            return palette.get(to_hex(value))
        except ValueError:  # a list of colours, or none
            return None

    for artist in figure.findobj():
        for name in _COLOURED:
            getter = getattr(artist, f"get_{name}", None)
            setter = getattr(artist, f"set_{name}", None)
            if getter is None or setter is None:
                continue
            colour = repainted(getter())
            if colour is not None:
                setter(colour)
    figure.savefig(path, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
