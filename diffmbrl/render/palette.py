"""Colours of all pictures, and empty figures in these colours.

The palette is Okabe and Ito's, which people with any colour vision can distinguish. matplotlib is imported on first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import matplotlib.axes

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31")
INK, MUTED, RULE, PAPER = "#1b1f24", "#6a737d", "#e3e6ea", "#ffffff"


def blank(size: tuple[float, float]) -> Any:
    """Return a figure of this size in inches, without axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def dress(axis: "matplotlib.axes.Axes") -> None:
    """Set background, frame, ticks and grid of an axis."""
    axis.set_facecolor(PAPER)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(MUTED)
    axis.tick_params(which="both", color=MUTED, labelcolor=INK, labelsize=9)
    axis.grid(True, color=RULE, linewidth=0.8)
    axis.set_axisbelow(True)
