"""Animations of trajectories: HTML that needs nothing but itself, and a GIF. Shapes and numbers in, no task and no algorithm.

A frame is a list of shapes as in `tasks/drawing.py`, those without a depth first, the others from the deepest on; below it,
each action over time between its limits.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffmbrl.runs import page
from diffmbrl.runs.figures import INK, MUTED, PALETTE, blank, dress
from diffmbrl.tasks.drawing import Circle, Polygon, Rod

Array = np.ndarray
WIDTH, TALLEST, STRIP = 560, 400, 44  # pixels
MOST = 400  # frames of the HTML; a longer trajectory leaves some out
ROLES = {  # colour, width of a line in pixels, opacity of a disc
    "ground": (MUTED, 1.0, 0.3),
    "target": ("#009e73", 2.0, 0.45),
    "obstacle": ("#d55e00", 1.5, 0.25),
    "body": ("var(--ink, #1b1f24)", 3.0, 1.0),
    "accent": ("#0072b2", 2.5, 1.0),
}
INSIDE = {
    "ground": "#c9ced4",
    "target": "#66c2a5",
    "obstacle": "#f0a27a",
    "body": "#aab4bf",
    "accent": "#6aaed6",
}  # of solids
EDGE = "#3a424b"  # and around them
STYLE = """.film { max-width: 560px; font: 13px/1.4 -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
.film svg { display: block; width: 100%; height: auto; } .film svg * { vector-effect: non-scaling-stroke; }
.film text { fill: var(--muted, #5d666f); font-size: 12px; }
.film .bar { display: flex; gap: .7em; align-items: center; } .film input { flex: 1; min-width: 4em; }
.film button { font: inherit; width: 4.5em; }
.film output { width: 5.5em; text-align: right; font-variant-numeric: tabular-nums; }"""
# Frames are whole tenths of a pixel, all moving numbers of one after those of the other.
SCRIPT = """(() => {
const film = document.getElementById("@id@"), data = @data@;
const moving = [...film.querySelectorAll("[data-moves]")], cursors = [...film.querySelectorAll(".now")];
const values = [...film.querySelectorAll(".value")], scene = film.querySelector("svg"), parts = [...scene.children];
let order = 0;
const [button, slider, clock] = ["button", "input", "output"].map(name => film.querySelector(name));
const show = k => {
  const numbers = data.frames[k]; let i = 0;
  for (const e of moving) {
    const size = +e.dataset.moves, part = numbers.slice(i, i += size).map(x => x / 10);
    if (e.tagName === "circle") { e.setAttribute("cx", part[0]); e.setAttribute("cy", part[1]); }
    else for (const line of e.tagName === "g" ? e.children : [e]) line.setAttribute("points", part.join(" "));
  }
  if (data.order[k] !== order) { order = data.order[k]; scene.append(...data.orders[order].map(i => parts[i])); }
  const t = data.times[k], step = Math.min(data.steps[k], data.actions.length - 1);
  for (const c of cursors) c.setAttribute("transform", `translate(${data.width * t / data.end} 0)`);
  values.forEach((v, j) => { v.textContent = data.actions[step][j]; });
  slider.value = k; clock.textContent = t.toFixed(2) + " s";
};
let playing = false, begun = 0;
const last = data.frames.length - 1;
const tick = now => {
  if (!playing) return;
  const t = (now - begun) / 1000 % (data.end + .7);  // a rest at the end
  let k = last; while (k > 0 && data.times[k] > t) k--;
  show(k); requestAnimationFrame(tick);
};
const play = on => {
  playing = on; button.textContent = on ? "Pause" : "Play";
  if (!on) return;
  begun = performance.now() - 1000 * (+slider.value < last ? data.times[+slider.value] : 0);
  requestAnimationFrame(tick);
};
button.addEventListener("click", () => play(!playing));
slider.addEventListener("input", () => { play(false); show(+slider.value); });
show(0);
if (!matchMedia("(prefers-reduced-motion: reduce)").matches) play(true);
})();"""


def animate(
    frames: Sequence[Sequence[Any]],
    a: Any,
    *,
    dt: float,
    a_low: Any,
    a_high: Any,
    action_names: Sequence[str] | None = None,
    title: str = "",
) -> str:
    """A piece of HTML: the drawing as SVG, a strip for each action, a button, a slider and the script that moves them.

    `frames` of T+1 states, `a` [T, m] in the units of its limits [m] (infinite ones are not drawn). It plays in real time,
    unless the reader's system asks for less motion, and shows the first frame where scripts do not run. About 5 bytes a
    moving coordinate and frame. Several can stand on one page.

    Raises: `ValueError` if frames and actions do not fit one another, or a coordinate is not finite.
    """
    a, low, high, names = _checked(frames, a, a_low, a_high, action_names)
    stride = math.ceil(len(a) / MOST)
    steps = [*range(0, len(a), stride), len(a)]
    view = _view(frames)
    first = _behind(frames[0])  # the elements stand in this order in the page
    sorts = [tuple(first.index(i) for i in _behind(frames[k])) for k in steps]
    orders = list(dict.fromkeys(sorts))
    pixels = [[np.rint(10 * _pixels(frames[k][i], view)).astype(int) for i in first] for k in steps]
    still = [all(np.array_equal(frame[i], pixels[0][i]) for frame in pixels) for i in range(len(pixels[0]))]
    drawn = [_element(frames[0][i], pixels[0][j], view, still[j]) for j, i in enumerate(first)]
    moving = [
        [x for part, rests in zip(frame, still, strict=True) if not rests for x in part.tolist()] for frame in pixels
    ]
    data = {
        "frames": moving,
        "times": [round(k * dt, 4) for k in steps],
        "steps": steps,
        "end": round(len(a) * dt, 4),
        "actions": [[f"{x:.3g}".replace("-", "\u2212") for x in step] for step in a],
        "width": WIDTH,
        "orders": orders,
        "order": [orders.index(sort) for sort in sorts],
    }
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    strips = "\n".join(_strip(a[:, j], low[j], high[j], names[j]) for j in range(a.shape[1]))
    label = page.escape(title or "animation of the trajectory")
    scene = (
        f'<svg viewBox="0 0 {WIDTH} {view[3]:.0f}" role="img" aria-label="{label}">\n' + "\n".join(drawn) + "\n</svg>"
    )
    heading = f"<h3>{page.escape(title)}</h3>\n" if title else ""
    controls = (
        f'<div class="bar"><button type="button">Play</button><input type="range" min="0" max="{len(steps) - 1}" value="0" '
        'aria-label="time"><output>0.00 s</output></div>'
    )
    name = "film-" + hashlib.sha256((text + strips + title).encode()).hexdigest()[:10]
    script = SCRIPT.replace("@id@", name).replace("@data@", text)
    return (
        f'<div class="film" id="{name}">\n<style>{STYLE}</style>\n{heading}{scene}\n{strips}\n{controls}\n'
        f"<script>{script}</script>\n</div>"
    )


def animation_page(title: str, fragment: str) -> str:
    """The fragment as a file of its own."""
    return page.document(title, fragment)


def gif(
    path: str | Path,
    frames: Sequence[Sequence[Any]],
    a: Any,
    *,
    dt: float,
    a_low: Any,
    a_high: Any,
    action_names: Sequence[str] | None = None,
    title: str = "",
    most_frames: int = 101,
) -> None:
    """The same as a GIF that repeats, in real time to the hundredth of a second that the format knows.

    About 2 kB a frame, and slow to draw, 50 ms a frame and more. Raises: `ValueError` as `animate`, or for fewer than 2 frames.
    """
    from PIL import Image

    a, low, high, names = _checked(frames, a, a_low, a_high, action_names)
    if most_frames < 2:
        raise ValueError(f"most_frames must be at least 2, got {most_frames}")
    # A frame is shown for 2/100 s at least: what asks for less, browsers show for 10.
    stride = max(math.ceil(len(a) / (most_frames - 1)), math.ceil(0.02 / dt - 1e-9))
    steps = [*range(0, len(a), stride), len(a)]
    painter = _Painter(frames, a, dt, low, high, names, title)
    # One palette without dithering: what rests is then the same in each frame, and is stored once.
    pictures = [Image.fromarray(painter.paint(k)) for k in steps]
    colours = np.array(pictures[len(steps) // 2].quantize(32, Image.Quantize.MAXCOVERAGE).getpalette()).reshape(-1, 3)
    colours[colours.min(axis=1) > 240] = 255  # the paper, which has been mixed with the edges of letters
    palette = Image.new("P", (1, 1))
    palette.putpalette(colours.ravel().tolist())
    images = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    durations = [10 * round(100 * (after - before) * dt) for before, after in itertools.pairwise(steps)]
    durations = [max(duration, 20) for duration in durations]
    images[0].save(
        path, format="GIF", save_all=True, append_images=images[1:], duration=[*durations, 700], loop=0, disposal=1
    )


class _Painter:
    """A matplotlib figure that is drawn again for each frame, only what moves being changed."""

    def __init__(self, frames: Any, a: Array, dt: float, low: Array, high: Array, names: Sequence[str], title: str):
        from matplotlib.lines import Line2D
        from matplotlib.patches import Circle as Disc
        from matplotlib.patches import Polygon as Patch

        self.frames, self.dt = frames, dt
        x, y, scale, tall = _view(frames)
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
                looks = [(EDGE, max(thick, 1.0)), (INSIDE[shape.role], max(thick - 2, 0.5))]
                # Markers for its ends: a line of no length, a sphere, would not be drawn.
                ends = {"solid_capstyle": "butt", "marker": "o", "markeredgewidth": 0}
                drawn = [Line2D([], [], color=c, linewidth=0.72 * w, markersize=0.72 * w, **ends) for c, w in looks]
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
            strip.set(xlim=(0, time[-1]), ylim=_span(a[:, j], low[j], high[j]))
            strip.tick_params(labelsize=7, labelbottom=j == m - 1, length=2)
            self.figure.text(0.02, (level + 0.25) / total, names[j], fontsize=8, va="center", parse_math=False)
            self.cursors.append(strip.axvline(0.0, color=PALETTE[1], linewidth=1.2))
        self.clock = self.figure.text(0.98, 1 - 0.2 / total, "", fontsize=8, ha="right", va="center", color=MUTED)

    def paint(self, k: int) -> Array:
        """Frame k, [height, width, 3]."""
        for rank, i in enumerate(_behind(self.frames[k])):
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


def _checked(frames: Any, a: Any, a_low: Any, a_high: Any, names: Any) -> tuple[Array, Array, Array, list[str]]:
    a = np.asarray(a, np.float64)
    if a.ndim != 2 or len(a) < 1 or len(frames) != len(a) + 1:
        raise ValueError(f"expected actions [T, m] and T+1 frames, got {list(a.shape)} and {len(frames)} frames")
    m = a.shape[1]
    low, high = (np.asarray(limit, np.float64) for limit in (a_low, a_high))
    names = [f"action {j + 1}" for j in range(m)] if names is None else list(names)
    for what, size in [("a_low", low.shape), ("a_high", high.shape), ("action_names", (len(names),))]:
        if size != (m,):
            raise ValueError(f"{what} must have shape [{m}], got {list(size)}")
    kinds = [[(type(shape), _numbers(shape).size) for shape in frame] for frame in frames]
    if any(kind != kinds[0] for kind in kinds):
        raise ValueError("every frame must have the same shapes, each with as many points")
    for k, frame in enumerate(frames):
        if not all(np.all(np.isfinite(_numbers(shape))) for shape in frame) or not np.all(np.isfinite(a[k : k + 1])):
            raise ValueError(f"a coordinate or action of step {k} is not finite: cut the trajectory there")
    return a, low, high, names


def _numbers(shape: Any) -> Array:
    return np.asarray(shape[0], np.float64).reshape(-1, 2)  # centre or points


def _view(frames: Any) -> tuple[float, float, float, float]:
    """Left and top in metres, pixels a metre, height in pixels; as much is seen as all frames need."""
    margins = [(_numbers(shape), getattr(shape, "radius", 0.0)) for frame in frames for shape in frame]
    low = np.min([points.min(axis=0) - radius for points, radius in margins], axis=0)
    high = np.max([points.max(axis=0) + radius for points, radius in margins], axis=0)
    size = np.maximum(high - low, 1e-6 + 0.1 * np.max(high - low))
    scale = float(min((WIDTH - 24) / size[0], (TALLEST - 24) / size[1]))
    tall = float(size[1] * scale + 24)
    middle = (low + high) / 2
    return float(middle[0] - WIDTH / scale / 2), float(middle[1] + tall / scale / 2), scale, tall


def _behind(shapes: Sequence[Any]) -> list[int]:
    """The order in which shapes are drawn: the deepest first, and before them those that have no depth."""
    return sorted(range(len(shapes)), key=lambda i: -getattr(shapes[i], "depth", math.inf))


def _pixels(shape: Any, view: tuple[float, float, float, float]) -> Array:
    x, y, scale, _ = view
    return ((_numbers(shape) - [x, y]) * [scale, -scale]).reshape(-1)


def _element(shape: Any, pixels: Array, view: tuple[float, float, float, float], still: bool) -> str:
    colour, width, opacity = ROLES[shape.role]
    moves = "" if still else f' data-moves="{pixels.size}"'
    if isinstance(shape, Circle):
        radius = max(shape.radius * view[2], 1.5)
        x, y = pixels / 10
        return f'<circle cx="{x:g}" cy="{y:g}" r="{radius:.4g}" style="fill:{colour};fill-opacity:{opacity:g}"{moves}/>'
    points = " ".join(f"{x / 10:g}" for x in pixels)
    if isinstance(shape, Rod):
        thick = 2 * view[2] * shape.radius
        looks = [(EDGE, max(thick, 1.0)), (INSIDE[shape.role], max(thick - 2, 0.5))]
        lines = "".join(
            f'<polyline points="{points}" style="fill:none;stroke:{c};stroke-width:{w:.4g};stroke-linecap:round;'
            'vector-effect:none"/>'
            for c, w in looks
        )
        return f"<g{moves}>{lines}</g>"
    if isinstance(shape, Polygon):
        return (
            f'<polygon points="{points}" style="fill:{INSIDE[shape.role]};stroke:{EDGE};stroke-linejoin:round"{moves}/>'
        )
    return (
        f'<polyline points="{points}" style="fill:none;stroke:{colour};stroke-width:{width:g};'
        f'stroke-linejoin:round;stroke-linecap:round"{moves}/>'
    )


def _strip(a: Array, low: float, high: float, name: str) -> str:
    bottom, top = _span(a, low, high)
    place = lambda x: 18 + (STRIP - 20) * (1 - (x - bottom) / (top - bottom))  # noqa: E731
    edges = np.linspace(0, WIDTH, len(a) + 1)
    corners = np.column_stack([np.repeat(edges, 2)[1:-1], np.repeat(place(a), 2)])
    points = " ".join(f"{x:.5g},{y:.4g}" for x, y in corners)
    lines = "".join(
        f'<path d="M0 {place(x):.4g}H{WIDTH}" stroke="#d55e00" stroke-dasharray="4 3"/>' for x in _finite(low, high)
    )
    limits = f" ({low:.3g} to {high:.3g})" if len(_finite(low, high)) == 2 else ""
    label = page.prose(name + limits)
    return (
        f'<svg viewBox="0 0 {WIDTH} {STRIP}" role="img" aria-label="{label}"><text x="0" y="11">{label}</text>'
        f'<text class="value" x="{WIDTH}" y="11" text-anchor="end"></text>{lines}'
        f'<polyline points="{points}" style="fill:none;stroke:{PALETTE[0]};stroke-width:1.3"/>'
        f'<path class="now" d="M0 15V{STRIP}" stroke="var(--ink, #1b1f24)"/></svg>'
    )


def _span(a: Array, low: float, high: float) -> tuple[float, float]:
    seen = [a.min(), a.max(), *_finite(low, high)]
    bottom, top = float(min(seen)), float(max(seen))
    pad = 0.06 * (top - bottom) or 1.0
    return bottom - pad, top + pad


def _finite(*limits: float) -> list[float]:
    return [float(x) for x in limits if np.isfinite(x)]


def _limits(axis: Any, low: float, high: float) -> None:
    for limit in _finite(low, high):
        axis.axhline(limit, color="#d55e00", linestyle=(0, (4, 3)), linewidth=0.8)
