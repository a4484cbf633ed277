"""Figures of plans from arrays: states, actions with their limits, and the norm of the feedback gains, over time."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.typing import ArrayLike

from diffmbrl.render.palette import INK, MUTED, PALETTE, blank, dress
from diffmbrl.report.figures import log_axis

if TYPE_CHECKING:
    import matplotlib.axes

Array = np.ndarray
PANEL = (2.9, 1.55)  # inches


def plan_figure(
    s: ArrayLike,
    a: ArrayLike,
    K: ArrayLike | None = None,
    *,
    a_low: ArrayLike | Sequence[float],
    a_high: ArrayLike | Sequence[float],
    dt: float,
    state_names: Sequence[str] | None = None,
    action_names: Sequence[str] | None = None,
) -> Any:
    """Plot n states, m actions and, with gains, |K_t|, one panel each; several plans are overlaid.

    Shapes: `s` [*batch, T+1, n], `a` [*batch, T, m], `K` [*batch, T, m, n], limits [m], names of length n and m. Infinite
    limits are not drawn. Values that are not finite leave a gap, and their panel says how many there were.

    Raises: `ValueError` if shapes or names do not fit each other.

    >>> figure = plan_figure(np.zeros((6, 2)), np.ones((5, 1)), a_low=[-1.0], a_high=[1.0], dt=0.1)
    >>> [axis.get_title(loc="left") for axis in figure.axes]
    ['state 1', 'state 2', 'action 1']
    """
    s, a = np.asarray(s, np.float64), np.asarray(a, np.float64)
    low, high = np.asarray(a_low, np.float64), np.asarray(a_high, np.float64)
    state_names, action_names = _named(s, a, K, low, high, state_names, action_names)
    T, n, m = a.shape[-2], s.shape[-1], a.shape[-1]
    s, a = s.reshape(-1, T + 1, n), a.reshape(-1, T, m)
    time = dt * np.arange(T + 1)
    figure, axes = panels(n + m + (K is not None))
    line = {"alpha": max(0.25, 1 / math.sqrt(len(s))), "linewidth": 1.5 if len(s) < 4 else 1.0}
    for axis, name, values in zip(axes, state_names, np.moveaxis(s, -1, 0), strict=False):
        _title(axis, name, values)
        axis.plot(time, _shown(values).T, color=PALETTE[0], **line)
    for j, name in enumerate(action_names):
        axis, values = axes[n + j], a[..., j]
        _title(axis, name, values)
        for action in _shown(values):
            axis.stairs(action, time, baseline=None, color=PALETTE[2], **line)
        for limit in (low[j], high[j]):
            if np.isfinite(limit):
                axis.axhline(limit, color=PALETTE[1], linewidth=1.0, linestyle=(0, (4, 3)))
    if K is not None:
        norms = np.linalg.norm(np.asarray(K, np.float64).reshape(-1, T, m * n), axis=-1)
        _title(axes[-1], "gain |K|", norms)
        shown = np.where(_shown(norms) > 0, norms, np.nan)
        if np.any(np.isfinite(shown)):
            log_axis(axes[-1].yaxis, (float(np.nanmin(shown)), float(np.nanmax(shown))))
        axes[-1].plot(time[:-1], shown.T, color=PALETTE[3], **line)
    for axis in axes:
        axis.set_xlim(0, time[-1])
    return figure


def panels(count: int, *, xlabel: str = "time [s]") -> tuple[Any, list[Any]]:
    """Return a figure of small panels in rows, with a label below the lowest ones."""
    columns = 3 if count > 4 else 2
    rows = math.ceil(count / columns)
    figure = blank((columns * PANEL[0], rows * PANEL[1] + 0.35))
    lowest = [xlabel if i + columns >= count else None for i in range(count)]
    return figure, [_panel(figure, i, rows, columns, name) for i, name in enumerate(lowest)]


def _panel(figure: Any, i: int, rows: int, columns: int, xlabel: str | None) -> Any:
    width, height = figure.get_size_inches()
    row, column = divmod(i, columns)
    left, bottom = column * PANEL[0] + 0.55, height - (row + 1) * PANEL[1] + 0.05
    axis = figure.add_axes((left / width, bottom / height, (PANEL[0] - 0.75) / width, (PANEL[1] - 0.4) / height))
    dress(axis)
    axis.tick_params(labelsize=8, labelbottom=xlabel is not None)
    if xlabel is not None:
        axis.set_xlabel(xlabel, fontsize=8.5)
    return axis


def _title(axis: "matplotlib.axes.Axes", name: str, values: Array) -> None:
    bad = int(np.sum(~np.isfinite(values)))
    axis.set_title(name, loc="left", fontsize=8.5, color=INK, pad=4, parse_math=False)
    if bad:
        axis.set_title(f"{bad} not finite", loc="right", fontsize=8, color=MUTED, pad=4)


def _shown(values: Array) -> Array:
    return np.where(np.isfinite(values), values, np.nan)


def _named(
    s: Array,
    a: Array,
    K: ArrayLike | None,
    low: Array,
    high: Array,
    state_names: Sequence[str] | None,
    action_names: Sequence[str] | None,
) -> tuple[Sequence[str], Sequence[str]]:
    if s.ndim < 2 or a.ndim != s.ndim or s.shape[:-2] != a.shape[:-2] or s.shape[-2] != a.shape[-2] + 1:
        raise ValueError(
            f"expected states [*batch, T+1, n] and actions [*batch, T, m], got {list(s.shape)} and {list(a.shape)}"
        )
    n, m = s.shape[-1], a.shape[-1]
    state_names = [f"state {i + 1}" for i in range(n)] if state_names is None else state_names
    action_names = [f"action {j + 1}" for j in range(m)] if action_names is None else action_names
    wanted: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = [
        ("a_low", low.shape, (m,)),
        ("a_high", high.shape, (m,)),
        ("state_names", (len(state_names),), (n,)),
        ("action_names", (len(action_names),), (m,)),
    ]
    if K is not None:
        wanted.append(("K", np.shape(K), (*a.shape, n)))
    for what, shape, size in wanted:
        if shape != size:
            raise ValueError(f"{what} must have shape {list(size)}, got {list(shape)}")
    return state_names, action_names
