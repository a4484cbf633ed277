r"""What do the loss and the gradient's variance look like as the unroll grows?

A first policy on the double pendulum, its last layer drawn at `scale` times the default. The loss of an unroll of T steps is
$-\frac1T \sum_{t<T} r_t$. In float64:
* the loss at $\theta + \alpha d$ along one random direction with the policy's own filter norms, from one start, and its mean
  over many, for several unrolls, each to its own scale;
* its roughness: how much of the variation along the slice is between neighbouring points;
* the variance over starts of the gradient of T times the loss, summed over parameters, against the unroll, and the squared norm
  of its mean.

Metz, Freeman, Schoenholz and Kachman 2021, section 3 (figures of Brax's ant); Li et al. 2018 (the directions).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from diffmbrl.core import Task, reweighted
from diffmbrl.diagnostics import filter_normalised, landscape_line
from diffmbrl.policies import Neural
from diffmbrl.report.figures import Series, key, name_ends, style_of
from diffmbrl.rollout import episode_return
from diffmbrl.tasks import make
from experiments.record import array
from experiments.sheet import heading, log_limits, sheet, title

EXPECTED = (
    "Short unrolls have smooth losses; from some unroll on the loss along a line becomes rough, that of one start more than "
    "the mean of many, and the gradient's variance grows by orders of magnitude, past the squared norm of its mean."
)


class Size(NamedTuple):
    """How much is measured."""

    task: str
    horizon: int
    scale: float
    hidden: tuple[int, ...]
    starts: int
    slices: tuple[int, ...]  # unrolls
    reach: float  # of alpha, relative to the weights
    points: int
    unrolls: int  # at which variances are measured


FULL = Size("double-pendulum", 400, 0.1, (32, 32), 64, (10, 100, 200, 300, 400), 0.1, 161, 14)
QUICK = FULL._replace(horizon=100, starts=16, slices=(10, 100), points=41, unrolls=6)


def measure(size: Size, parts: Any):
    """Slices, then variances."""
    key = size._asdict()
    slices = parts({"part": "slices"} | key, partial(_slices, size))
    yield {
        "task": size.task,
        "slices": slices,
        "gradient": parts({"part": "gradient"} | key, partial(_gradients, size)),
    }


def _setting(size: Size) -> tuple[Task, Neural, Any]:
    task = make(size.task, horizon=size.horizon)
    policy = Neural.init(task, hidden=size.hidden, key=jax.random.key(0), output_scale=size.scale)
    return task, policy, task.starts(jax.random.key(1), size.starts)


def _unrolled(task: Task, T: Any) -> Task:
    """Rewards of the first T steps, and no terminal one: a mask, so that all unrolls share one program."""
    return reweighted(task, (jnp.arange(task.horizon + 1) < T).astype(task.weights.dtype))


def _slices(size: Size) -> dict[str, Any]:
    task, policy, s0 = _setting(size)
    direction = filter_normalised(policy, jax.random.key(2))
    alphas = jnp.linspace(-size.reach, size.reach, size.points)
    run = jax.jit(lambda T: -landscape_line(policy, _unrolled(task, T), s0, direction, alphas) / T)
    losses = {T: np.asarray(run(jnp.asarray(T))) for T in size.slices}
    fine = np.all([np.isfinite(x).all(0) for x in losses.values()], axis=0)
    losses = {T: x[:, fine] for T, x in losses.items()}
    rough = {T: np.array([_roughness(y) for y in x.T]) for T, x in losses.items()}
    # The start shown is the one in the middle by its roughness at the longest unroll.
    shown = int(np.argsort(rough[size.slices[-1]])[fine.sum() // 2])
    out: dict[str, Any] = {"alpha": alphas, "lost": int((~fine).sum())}
    for T, x in losses.items():
        both = {"one": x[:, shown], "mean": x.mean(1)}
        out[str(T)] = {who: _standardised(y) for who, y in both.items()} | {
            "deviation": {who: float(y.std()) for who, y in both.items()},
            "roughness of starts": np.percentile(rough[T], [10, 50, 90]),
            "roughness of mean": _roughness(both["mean"]),
        }
    return out


def _standardised(y: np.ndarray) -> np.ndarray:
    """Without its mean and scale, so that few digits hold its shape."""
    return (y - y.mean()) / max(y.std(), np.finfo(float).tiny)


def _roughness(y: np.ndarray) -> float:
    """Standard deviation of second differences over that of white noise with the deviation of y: 0 smooth, 1 noise."""
    deviation = y.std()
    return float(np.std(np.diff(y, 2)) / (np.sqrt(6) * deviation)) if deviation > 0 else 0.0


def _gradients(size: Size) -> dict[str, Any]:
    task, policy, s0 = _setting(size)
    unrolls = np.unique(np.geomspace(1, size.horizon, size.unrolls).round().astype(int))

    @jax.jit
    def run(T):
        def one(s):
            return ravel_pytree(jax.grad(lambda pi: -episode_return(pi, _unrolled(task, T), s))(policy))[0]

        return jax.vmap(one)(s0)

    found: dict[str, list[Any]] = {"unroll": [], "variance": [], "mean squared": [], "top percent": [], "lost": []}
    for T in unrolls:
        g = np.asarray(run(jnp.asarray(T)))
        fine = np.isfinite(g).all(1)
        g = g[fine]
        squares = np.sort(((g - g.mean(0)) ** 2).sum(1))
        variance = squares.sum() / (len(g) - 1)
        found["unroll"].append(T)
        found["variance"].append(variance)
        # The mean of n samples has a squared norm that is too large by variance / n.
        found["mean squared"].append(max((g.mean(0) ** 2).sum() - variance / len(g), 0.0))
        found["top percent"].append(squares[-max(1, len(g) // 100) :].sum() / squares.sum())
        found["lost"].append(int((~fine).sum()))
    return found


def conclude(numbers: Any) -> str:
    """From the numbers."""
    slices, g = numbers["slices"], numbers["gradient"]
    rough = "; ".join(
        f"T = {T}: {array(x['roughness of starts'])[1]:.2g} of the middle start, {x['roughness of mean']:.2g} of the mean"
        for T, x in _unrolls(slices).items()
    )
    T, variance, mean = (array(g[k]) for k in ("unroll", "variance", "mean squared"))
    ten = int(np.argmin(np.abs(T - 10)))
    above = np.flatnonzero(variance > mean)
    first = (
        f"from T = {T[above[0]]:.0f} on" if above.size and (variance > mean)[above[0] :].all() else "at some unrolls"
    )
    lost = max(slices["lost"], *g["lost"])
    return (
        f"{numbers['task']}: roughness along the line (0 smooth, 1 noise), {rough}. The gradient's variance goes from "
        f"{variance[ten]:.1e} at T = {T[ten]:.0f} to {variance[-1]:.1e} at T = {T[-1]:.0f} and exceeds the squared norm of the "
        f"mean {first if above.size else 'nowhere'}; the largest 1% of samples hold {array(g['top percent'])[-1]:.0%} of it "
        f"in the end" + (f"; {lost} starts at most are left out, whose rollouts are not finite." if lost else ".")
    )


def _unrolls(slices: Any) -> dict[str, Any]:
    return {T: x for T, x in slices.items() if T.isdecimal()}


def paint(numbers: Any) -> Any:
    """Slices from one start, their means, and the variance against the unroll."""
    figure, axes = sheet(1, (0.75, 0.75, 1.2))
    heading(figure, f"The loss along a line and the gradient's variance, {numbers['task']}")
    row, slices = axes[0], numbers["slices"]
    alpha = array(slices["alpha"])
    for axis, which, text in (
        (row[0], "one", "loss from the middle start"),
        (row[1], "mean", "mean loss of all starts"),
    ):
        lines = []
        for i, (T, x) in enumerate(_unrolls(slices).items()):
            style, y = style_of(f"T = {T}", index=i), array(x[which])
            axis.plot(alpha, y - 5 * i, color=style.colour, linewidth=1.1)
            lines.append(Series(style, alpha, y - 5 * i))
        axis.set_ylim(-5 * len(lines) + 1, 4)  # before the names, which stand where the lines end in it
        axis.set_yticks([])
        axis.set_xlabel("alpha, relative to the weights")
        axis.set_ylabel("loss, each to its own scale")
        title(axis, text)
        name_ends(axis, lines)
    g, axis, lines = numbers["gradient"], row[2], []
    T = array(g["unroll"])
    log_limits(axis, "x", [T])
    log_limits(axis, "y", [array(g["variance"]), array(g["mean squared"])])
    for i, (what, label) in enumerate((("variance", "variance"), ("mean squared", "|mean|^2"))):
        style, y = style_of(label, index=i), array(g[what])
        y = np.where(y > 0, y, np.nan)
        axis.plot(T, y, color=style.colour, marker=style.marker, markersize=3.5, linewidth=1.6)
        lines.append(Series(style, T, y))
    axis.set_xlabel("unroll T [steps]")
    axis.set_ylabel("of the gradient, over starts")
    title(axis, "gradient of T times the loss")
    key(axis, [("one policy, all starts", {"linewidth": 1.6})])
    name_ends(axis, lines)
    return figure
