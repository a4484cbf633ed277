"""Animations of trajectories as self-contained HTML, from shapes and numbers; no task and no algorithm is in here.

A frame is a list of shapes (`render/shapes.py`). Shapes without a depth are drawn first, then the others from the deepest on.
Below the drawing, each action is plotted over time between its limits.
"""

import hashlib
import json
import math
from collections.abc import Sequence

import numpy as np

from diffmbrl.render import page
from diffmbrl.render.palette import PALETTE
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
    points_of,
    span,
    view_of,
)
from diffmbrl.render.shapes import Circle, Polygon, Rod, Shape

STRIP = 44  # pixels, the height of an action
MOST = 400  # frames at most: states are left out of longer trajectories
STYLE = """.film { max-width: 560px; font: 13px/1.4 -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
.film svg { display: block; width: 100%; height: auto; } .film svg * { vector-effect: non-scaling-stroke; }
.film text { fill: var(--muted, #5d666f); font-size: 12px; }
.film .bar { display: flex; gap: .7em; align-items: center; } .film input { flex: 1; min-width: 4em; }
.film button { font: inherit; width: 4.5em; }
.film output { width: 5.5em; text-align: right; font-variant-numeric: tabular-nums; }"""
# Each frame is a list of the moving coordinates in tenths of a pixel.
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
    frames: Frames,
    a: Numbers,
    *,
    dt: float,
    a_low: Numbers,
    a_high: Numbers,
    action_names: Sequence[str] | None = None,
    title: str = "",
) -> str:
    """Compose the animation of a trajectory as a fragment of HTML: SVG, a strip for each action, controls and a script.

    It plays in real time unless the reader's system asks for less motion; without scripts it shows the first frame.

    Args:
        frames: The shapes of each state, T+1 lists; all have the same kinds of shapes with as many points each.
        a: Actions, shape [T, m].
        dt: Seconds between two states.
        a_low, a_high: Limits of the actions, shape [m] each; infinite ones are not drawn.
        action_names: A name for each action; `action 1`, ... if None.
        title: A heading, empty for none.

    Returns: HTML; a page may contain several such fragments.

    Raises:
        ValueError: If frames and actions do not fit each other, or a coordinate is not finite.

    Cost: about 5 bytes for each moving coordinate of each frame.
    """
    a, low, high, names = checked(frames, a, a_low, a_high, action_names)
    stride = math.ceil(len(a) / MOST)
    steps = [*range(0, len(a), stride), len(a)]
    view = view_of(frames)
    first = behind(frames[0])  # the order of the elements in the page
    sorts = [tuple(first.index(i) for i in behind(frames[k])) for k in steps]
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
    """Compose a page around an animation.

    Args:
        title: The title of the page.
        fragment: HTML that `animate` returned.

    Returns: one HTML document that refers to nothing outside itself.
    """
    return page.document(title, fragment)


def _pixels(shape: Shape, view: tuple[float, float, float, float]) -> Array:
    x, y, scale, _ = view
    return ((points_of(shape) - [x, y]) * [scale, -scale]).reshape(-1)


def _element(shape: Shape, pixels: Array, view: tuple[float, float, float, float], still: bool) -> str:
    colour, width, opacity = ROLES[shape.role]
    moves = "" if still else f' data-moves="{pixels.size}"'
    if isinstance(shape, Circle):
        radius = max(shape.radius * view[2], 1.5)
        x, y = pixels / 10
        return f'<circle cx="{x:g}" cy="{y:g}" r="{radius:.4g}" style="fill:{colour};fill-opacity:{opacity:g}"{moves}/>'
    points = " ".join(f"{x / 10:g}" for x in pixels)
    if isinstance(shape, Rod):
        thick = 2 * view[2] * shape.radius
        strokes = [(EDGE, max(thick, 1.0)), (INSIDE[shape.role], max(thick - 2, 0.5))]
        lines = "".join(
            f'<polyline points="{points}" style="fill:none;stroke:{c};stroke-width:{w:.4g};stroke-linecap:round;'
            'vector-effect:none"/>'
            for c, w in strokes
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
    bottom, top = span(a, low, high)
    place = lambda x: 18 + (STRIP - 20) * (1 - (x - bottom) / (top - bottom))  # noqa: E731
    edges = np.linspace(0, WIDTH, len(a) + 1)
    corners = np.column_stack([np.repeat(edges, 2)[1:-1], np.repeat(place(a), 2)])
    points = " ".join(f"{x:.5g},{y:.4g}" for x, y in corners)
    lines = "".join(
        f'<path d="M0 {place(x):.4g}H{WIDTH}" stroke="#d55e00" stroke-dasharray="4 3"/>'
        for x in finite_limits(low, high)
    )
    limits = f" ({low:.3g} to {high:.3g})" if len(finite_limits(low, high)) == 2 else ""
    label = page.prose(name + limits)
    return (
        f'<svg viewBox="0 0 {WIDTH} {STRIP}" role="img" aria-label="{label}"><text x="0" y="11">{label}</text>'
        f'<text class="value" x="{WIDTH}" y="11" text-anchor="end"></text>{lines}'
        f'<polyline points="{points}" style="fill:none;stroke:{PALETTE[0]};stroke-width:1.3"/>'
        f'<path class="now" d="M0 15V{STRIP}" stroke="var(--ink, #1b1f24)"/></svg>'
    )
