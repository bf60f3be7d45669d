"""What curves of results share: how one is told from another, and a legend that fits.

Relies on matplotlib; `pictures` and the pictures of `lm` rely on it.

Colours are those of Okabe and Ito, which people with any kind of colour vision can tell apart; markers and
outlines say the same again. Of many losses those of one colour differ in their markers and lines.
"""

from __future__ import annotations

from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["legend_below", "line_style"]

_COLOURS: Final = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2")
_MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X", "*")  # one more than colours: both together repeat late
_LINES: Final = ("-", "--", "-.", ":")

# Of a legend, in inches: a letter, what an entry needs beside its letters, a row.
_LETTER, _ENTRY, _ROW = 0.08, 0.65, 0.2


def line_style(i: int) -> dict[str, Any]:
    """Colour, marker and line of the loss of this index; no two of up to 56 are alike."""
    turn, colour = divmod(i, len(_COLOURS))
    line = _LINES[turn % len(_LINES)]
    return {"color": _COLOURS[colour], "marker": _MARKERS[i % len(_MARKERS)], "linestyle": line}


def legend_below(figure: Figure, axes: Axes, title: str) -> None:
    """A legend of what `axes` shows below all axes, in rows that fit; the figure grows by these rows."""
    handles, labels = axes.get_legend_handles_labels()
    width, height = figure.get_size_inches()
    columns = max(1, int(width / (_LETTER * max(map(len, labels)) + _ENTRY)))
    figure.set_size_inches(width, height + _ROW * -(-len(labels) // columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)), title=title, fontsize=9)
