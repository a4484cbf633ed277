"""Animations of trajectories as a GIF."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffmbrl.render.palette import INK, MUTED, PALETTE, blank, dress
from diffmbrl.render.scene import (
    EDGE,
    INSIDE,
    ROLES,
    WIDTH,
    Array,
    Frames,
    Numbers,
    behind,
    checked,
    finite_limits,
    span,
    view_of,
)
from diffmbrl.render.shapes import Circle, Polygon, Rod

if TYPE_CHECKING:
    import matplotlib.axes


def gif(
    path: str | Path,
    frames: Frames,
    a: Numbers,
    *,
    dt: float,
    a_low: Numbers,
    a_high: Numbers,
    action_names: Sequence[str] | None = None,
    title: str = "",
    most_frames: int = 101,
) -> None:
    """Write the animation of a trajectory as a repeating GIF in real time, to hundredths of a second.

    Args:
        path: The file.
        frames: The shapes of each state, T+1 lists; all have the same kinds of shapes with as many points each.
        a: Actions, shape [T, m].
        dt: Seconds between two states.
        a_low, a_high: Limits of the actions, shape [m] each; infinite ones are not drawn.
        action_names: A name for each action; `action 1`, ... if None.
        title: A heading, empty for none.
        most_frames: The maximum number of frames; states are left out of longer trajectories.

    Raises:
        ValueError: If frames and actions do not fit each other, a coordinate is not finite, or `most_frames` is below 2.

    Cost: at least 50 ms and about 2 kB a frame.
    """
    from PIL import Image

    a, low, high, names = checked(frames, a, a_low, a_high, action_names)
    if most_frames < 2:
        raise ValueError(f"most_frames must be at least 2, got {most_frames}")
    # Browsers show a frame that asks for less than 2/100 s for 10/100 s.
    stride = max(math.ceil(len(a) / (most_frames - 1)), math.ceil(0.02 / dt - 1e-9))
    steps = [*range(0, len(a), stride), len(a)]
    painter = _Painter(frames, a, dt, low, high, names, title)
    # One palette without dithering: pixels at rest are then equal in all frames and stored once.
    pictures = [Image.fromarray(painter.paint(k)) for k in steps]
    colours = np.array(pictures[len(steps) // 2].quantize(32, Image.Quantize.MAXCOVERAGE).getpalette()).reshape(-1, 3)
    colours[colours.min(axis=1) > 240] = 255  # the paper, blended with the edges of letters
    palette = Image.new("P", (1, 1))
    palette.putpalette(colours.ravel().tolist())
    images = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    durations = [10 * round(100 * (after - before) * dt) for before, after in itertools.pairwise(steps)]
    durations = [max(duration, 20) for duration in durations]
    images[0].save(
        path, format="GIF", save_all=True, append_images=images[1:], duration=[*durations, 700], loop=0, disposal=1
    )


class _Painter:
    """A matplotlib figure that is redrawn for each frame after its moving parts are changed."""

    def __init__(self, frames: Frames, a: Array, dt: float, low: Array, high: Array, names: Sequence[str], title: str):
        from matplotlib.lines import Line2D
        from matplotlib.patches import Circle as Disc
        from matplotlib.patches import Polygon as Patch

        self.frames, self.dt = frames, dt
        x, y, scale, tall = view_of(frames)
        m, bottom = a.shape[1], 0.3
        heights = np.array([tall / 100, *[0.5] * m])
        total = heights.sum() + 0.12 * m + bottom + 0.3
        self.figure = blank((WIDTH / 100, total))
        top = total - 0.3
        if title:
            self.figure.text(0.02, 1 - 0.2 / total, title, fontsize=9, color=INK, va="center", parse_math=False)
        axis = self.figure.add_axes((0.0, (top - heights[0]) / total, 1.0, heights[0] / total))
        axis.set(xlim=(x, x + WIDTH / scale), ylim=(y - tall / scale, y))
        axis.set_axis_off()
        self.artists = []
        for shape in frames[0]:
            colour, width, opacity = ROLES[shape.role]
            colour = INK if colour.startswith("var") else colour
            if isinstance(shape, Rod):
                thick = 2 * scale * shape.radius
                strokes = [(EDGE, max(thick, 1.0)), (INSIDE[shape.role], max(thick - 2, 0.5))]
                # Markers for its ends: a line of no length, a sphere, would not be drawn.
                ends = {"solid_capstyle": "butt", "marker": "o", "markeredgewidth": 0}
                drawn = [Line2D([], [], color=c, linewidth=0.72 * w, markersize=0.72 * w, **ends) for c, w in strokes]
            elif isinstance(shape, Polygon):
                drawn = [Patch(shape.points, closed=True, facecolor=INSIDE[shape.role], edgecolor=EDGE, linewidth=0.7)]
            elif isinstance(shape, Circle):
                drawn = [Disc(tuple(shape.centre), shape.radius, color=colour, alpha=opacity, lw=0)]
            else:
                drawn = [Line2D([], [], color=colour, linewidth=0.75 * width)]
            self.artists.append([axis.add_artist(artist) for artist in drawn])
        self.cursors = []
        time = dt * np.arange(len(a) + 1)
        for j in range(m):
            level = top - heights[0] - (j + 1) * 0.62
            strip = self.figure.add_axes((0.3, level / total, 0.67, 0.5 / total))
            dress(strip)
            strip.grid(False)
            strip.stairs(a[:, j], time, baseline=None, color=PALETTE[0], linewidth=1.0)
            _limits(strip, low[j], high[j])
            strip.set(xlim=(0, time[-1]), ylim=span(a[:, j], low[j], high[j]))
            strip.tick_params(labelsize=7, labelbottom=j == m - 1, length=2)
            self.figure.text(0.02, (level + 0.25) / total, names[j], fontsize=8, va="center", parse_math=False)
            self.cursors.append(strip.axvline(0.0, color=PALETTE[1], linewidth=1.2))
        self.clock = self.figure.text(0.98, 1 - 0.2 / total, "", fontsize=8, ha="right", va="center", color=MUTED)

    def paint(self, k: int) -> Array:
        """Return the pixels of frame k, shape [height, width, 3]."""
        for rank, i in enumerate(behind(self.frames[k])):
            shape = self.frames[k][i]
            for artist in self.artists[i]:
                artist.set_zorder(rank)
                if isinstance(shape, Circle):
                    artist.set_center(tuple(shape.centre))
                elif isinstance(shape, Polygon):
                    artist.set_xy(shape.points)
                else:
                    artist.set_data(*np.asarray(shape.points).T)
        for cursor in self.cursors:
            cursor.set_xdata([k * self.dt] * 2)
        self.clock.set_text(f"{k * self.dt:.2f} s")
        self.figure.canvas.draw()
        return np.asarray(self.figure.canvas.buffer_rgba())[..., :3].copy()


def _limits(axis: "matplotlib.axes.Axes", low: float, high: float) -> None:
    for limit in finite_limits(low, high):
        axis.axhline(limit, color="#d55e00", linestyle=(0, (4, 3)), linewidth=0.8)
