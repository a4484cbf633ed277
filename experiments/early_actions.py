r"""How much of the gradient comes from which time step?

$$\frac{dJ}{d\theta} = \sum_t G_t^\top \frac{dJ}{da_t}$$

Along rollouts of untrained policies, for several horizons T and in float64: the norm of $dJ/da_t$ (root mean square over
starts) through the closed loop, the same for the plan of the same actions (no feedback: $K_t = 0$), and the norm of each step's
part of the gradient of the mean return, $\frac1B |\sum_i G_{i,t}^\top dJ_i/da_{i,t}|$. A seed is a policy and its starts.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffmbrl.diagnostics import contributions
from diffmbrl.policies import Neural
from diffmbrl.report.figures import Series, key, name_ends, style_of
from diffmbrl.second_order.curvature import linearize_rollouts
from diffmbrl.second_order.riccati import adjoint
from diffmbrl.tasks import make
from experiments.record import array
from experiments.sheet import heading, log_limits, sheet, title

EXPECTED = (
    "The gradient with respect to early actions is larger than to late ones, by orders of magnitude at long horizons, and "
    "early steps give most of dJ/dtheta."
)
SERIES = {
    "closed loop": "|dJ/da_t|, closed loop",
    "plan": "|dJ/da_t|, the same actions as a plan",
    "part": "|part of dJ/dtheta|",
}


class Size(NamedTuple):
    """How much is measured."""

    tasks: tuple[str, ...]
    horizons: tuple[int, ...]
    seeds: int
    starts: int
    hidden: tuple[int, ...]
    scale: float  # of the last layer's weights


FULL = Size(("pendulum-swingup", "cartpole-balance", "double-pendulum"), (25, 100, 400), 10, 8, (32, 32), 0.1)
QUICK = FULL._replace(tasks=FULL.tasks[1:2], horizons=(10, 50), seeds=3, starts=2)


def measure(size: Size, parts: Any):
    """Every task, each horizon in turn."""
    numbers: dict[str, Any] = {}
    for name in size.tasks:
        numbers[name] = {}
        for T in size.horizons:
            part = {"task": name, "T": T} | {k: v for k, v in size._asdict().items() if k not in ("tasks", "horizons")}
            numbers[name][str(T)] = parts(part, partial(_profiles, name, T, size))
    yield numbers


def _profiles(name: str, T: int, size: Size) -> dict[str, Any]:
    """Norms [times, seeds] at up to 50 times, and sums over all."""
    task = make(name, horizon=T)
    keys = jax.random.split(jax.random.key(0), (size.seeds, 2))

    def one(k):
        policy, s0 = (
            Neural.init(task, hidden=size.hidden, key=k[0], output_scale=size.scale),
            task.starts(k[1], size.starts),
        )
        _, _, lin, K = linearize_rollouts(policy, task, s0, None)
        closed, plan = (adjoint(lin.A, lin.B, gains, lin.c_s, lin.c_a, lin.c_T) for gains in (K, jnp.zeros_like(K)))
        rms = [jnp.sqrt(jnp.mean(jnp.sum(g**2, axis=1), axis=-1)) for g in (closed, plan)]
        parts = contributions(policy, task, s0)
        return *rms, jnp.linalg.norm(parts, axis=1), jnp.linalg.norm(jnp.sum(parts, axis=0))

    # One seed after another: the contributions of all at once would fill the memory.
    *profiles, gradient = (np.asarray(x) for x in jax.jit(lambda k: jax.lax.map(one, k))(keys))
    shown = np.unique(np.linspace(0, T - 1, min(T, 50)).round().astype(int))
    fifth = max(1, T // 5)
    out: dict[str, Any] = {"t": shown}
    for series, x in zip(SERIES, profiles, strict=True):
        out[series] = x[:, shown].T
        out[f"{series}, first to last fifth"] = x[:, :fifth].mean(1) / x[:, -fifth:].mean(1)
    part = profiles[2]
    out["half"] = np.argmax(np.cumsum(part, axis=1) >= part.sum(1, keepdims=True) / 2, axis=1) / T
    out["gradient over parts"] = gradient / part.sum(1)
    return out


def conclude(numbers: Any) -> str:
    """From the numbers, medians over seeds."""
    said = []
    for name, horizons in numbers.items():
        T = list(horizons)

        def across(what: str, horizons: Any = horizons, T: list[str] = T) -> str:
            return " / ".join(f"{np.median(array(horizons[t][what])):.2g}" for t in T)

        said.append(
            f"{name}, T = {' / '.join(T)}, mean of the first fifth of the steps over that of the last: "
            f"|dJ/da_t| {across('closed loop, first to last fifth')} in the closed loop and "
            f"{across('plan, first to last fifth')} for the plan, parts of dJ/dtheta {across('part, first to last fifth')}; "
            f"half of the parts' sum comes before t/T = {across('half')}; |dJ/dtheta| is {across('gradient over parts')} of "
            "that sum"
        )
    return "; ".join(said) + "."


def paint(numbers: Any) -> Any:
    """A row for each task, a panel for each series, a line for each horizon: medians over seeds, and their range."""
    figure, axes = sheet(len(numbers), (0.75, 0.75, 0.75))
    heading(figure, "Where in time the gradient comes from")
    for row, (name, horizons) in zip(axes, numbers.items(), strict=True):
        for axis, (series, text) in zip(row, SERIES.items(), strict=True):
            values = [array(x[series]) for x in horizons.values()]
            log_limits(axis, "y", values)
            lines = []
            for i, (T, x) in enumerate(horizons.items()):
                style, y = style_of(f"T = {T}", index=i), array(x[series])
                t = array(x["t"]) + 1
                axis.fill_between(t, y.min(1), y.max(1), color=style.colour, alpha=0.1, linewidth=0)
                axis.plot(t, np.median(y, axis=1), color=style.colour, linewidth=1.5)
                lines.append(Series(style, t, np.median(y, axis=1)))
            log_limits(axis, "x", [np.array([1, max(int(T) for T in horizons)])])
            axis.set_xlabel("step t + 1")
            axis.set_ylabel(text.split(",")[0])
            title(axis, f"{name}: {text}")
            key(axis, [("median and range of seeds", {"linewidth": 1.5})])
            name_ends(axis, lines)
    return figure
