"""The scene of an animation in HTML and GIF: colours and order of the shapes, and the visible part of the world."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from diffmbrl.render.palette import MUTED
from diffmbrl.render.shapes import Shape

Array = np.ndarray
Numbers = ArrayLike | Sequence[Any]
Frames = Sequence[Sequence[Shape]]
WIDTH, TALLEST = 560, 400  # pixels
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
}  # colours of solids
EDGE = "#3a424b"  # outline of solids


def checked(
    frames: Frames, a: Numbers, a_low: Numbers, a_high: Numbers, names: Sequence[str] | None
) -> tuple[Array, Array, Array, list[str]]:
    """Convert actions, limits and names to arrays.

    Raises:
        ValueError: If frames and actions do not fit each other.
    """
    a = np.asarray(a, np.float64)
    if a.ndim != 2 or len(a) < 1 or len(frames) != len(a) + 1:
        raise ValueError(f"expected actions [T, m] and T+1 frames, got {list(a.shape)} and {len(frames)} frames")
    m = a.shape[1]
    low, high = (np.asarray(limit, np.float64) for limit in (a_low, a_high))
    names = [f"action {j + 1}" for j in range(m)] if names is None else list(names)
    for what, size in [("a_low", low.shape), ("a_high", high.shape), ("action_names", (len(names),))]:
        if size != (m,):
            raise ValueError(f"{what} must have shape [{m}], got {list(size)}")
    kinds = [[(type(shape), points_of(shape).size) for shape in frame] for frame in frames]
    if any(kind != kinds[0] for kind in kinds):
        raise ValueError("every frame must have the same shapes, each with as many points")
    for k, frame in enumerate(frames):
        if not all(np.all(np.isfinite(points_of(shape))) for shape in frame) or not np.all(np.isfinite(a[k : k + 1])):
            raise ValueError(f"a coordinate or action of step {k} is not finite: cut the trajectory there")
    return a, low, high, names


def points_of(shape: Shape) -> Array:
    """Return the points of a shape, or its centre, shape [k, 2]."""
    return np.asarray(shape[0], np.float64).reshape(-1, 2)


def view_of(frames: Frames) -> tuple[float, float, float, float]:
    """Return left and top in metres, pixels a metre and height in pixels of a view that contains all frames."""
    margins = [(points_of(shape), getattr(shape, "radius", 0.0)) for frame in frames for shape in frame]
    low = np.min([points.min(axis=0) - radius for points, radius in margins], axis=0)
    high = np.max([points.max(axis=0) + radius for points, radius in margins], axis=0)
    size = np.maximum(high - low, 1e-6 + 0.1 * np.max(high - low))
    scale = float(min((WIDTH - 24) / size[0], (TALLEST - 24) / size[1]))
    tall = float(size[1] * scale + 24)
    middle = (low + high) / 2
    return float(middle[0] - WIDTH / scale / 2), float(middle[1] + tall / scale / 2), scale, tall


def behind(shapes: Sequence[Shape]) -> list[int]:
    """Return the order in which shapes are drawn: those without a depth, then the others from the deepest on."""
    return sorted(range(len(shapes)), key=lambda i: -getattr(shapes[i], "depth", math.inf))


def span(a: Array, low: float, high: float) -> tuple[float, float]:
    """Return the range of a plot of actions and their finite limits."""
    seen = [a.min(), a.max(), *finite_limits(low, high)]
    bottom, top = float(min(seen)), float(max(seen))
    pad = 0.06 * (top - bottom) or 1.0
    return bottom - pad, top + pad


def finite_limits(*limits: float) -> list[float]:
    """Return the finite ones of some limits."""
    return [float(x) for x in limits if np.isfinite(x)]
