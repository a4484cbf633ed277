r"""How does the variance of pathwise and score-function gradients grow with time in chaos?

A double pendulum without torques: equal point masses m of .1 kg on massless rods l of 1 m, in steps $v \leftarrow v + h\dot v$,
$q \leftarrow q + h v$, with Lagrange's equations as in `tasks/twolink.py`. Angles count from hanging, the second from the first
rod's direction; the cost at time t is $c_t = \sum_i (1 - \cos(q_i - \bar q_i))$, between 0 and 4. The parameter is the first
angle at the start, $\theta \sim N(\bar\theta, \sigma^2)$, and of its gradient

$$\mathrm{FoBG}: \frac{dc_t}{d\theta},\qquad
\mathrm{ZoBG}: \frac{\epsilon}{\sigma}\,(c_t(\bar\theta + \sigma\epsilon) - c_t(\bar\theta))$$

the variance of one sample is taken over N, at every time. The tangent is carried along with the state. The Lyapunov spectrum
of each start is by QR over a longer time, with RK4. The energy of all samples is followed: its error says how far to trust
them.

Suh, Simchowitz, Zhang and Tedrake 2022, section 4 (the set-up; times and goal are chosen here).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from diffmbrl.diagnostics import crossover_horizon, lyapunov_exponents
from diffmbrl.render.palette import MUTED
from diffmbrl.report.figures import Series, key, name_ends, style_of
from diffmbrl.tasks.double_pendulum import DoublePendulum
from diffmbrl.tasks.integrate import rk4, semi_implicit
from experiments.record import array
from experiments.sheet import heading, log_limits, sheet, title

EXPECTED = (
    "The pathwise gradient's variance grows exponentially with time from the chaotic starts, at twice the largest Lyapunov "
    "exponent, while the score function's stays bounded by the cost's range over sigma, so that they cross; at the small-angle "
    "start they do not cross. Before the crossing both have the same mean."
)
STARTS = {
    "fast": (np.pi / 2, 0.0, 5.0, -5.0),
    "released": (np.pi / 2, np.pi / 2, 0.0, 0.0),
    "small": (0.2, 0.1, 0.0, 0.0),
}
MASS, LENGTH, GRAVITY = 0.1, 1.0, 9.81


class Size(NamedTuple):
    """How much is measured."""

    goal: tuple[float, float]  # rad from hanging
    sigmas: tuple[float, ...]  # rad
    samples: int
    h: float  # s
    duration: float  # s
    every: int  # steps between looks
    lyapunov_dt: float  # s, of RK4
    lyapunov_steps: int


FULL = Size((np.pi, 0.0), (0.5, 0.1, 0.05), 1000, 1e-3, 10.0, 100, 0.01, 50_000)
QUICK = FULL._replace(samples=100, duration=4.0, every=200, lyapunov_steps=3000)


def measure(size: Size, parts: Any):
    """Every start in turn."""
    numbers: dict[str, Any] = {}
    for name in STARTS:
        numbers[name] = parts({"start": name} | size._asdict(), partial(_from, name, size))
        yield numbers


def _pendulum(step: Any, dt: float) -> DoublePendulum:
    mass, length, gravity = (jnp.asarray(x) for x in (MASS, LENGTH, GRAVITY))
    return DoublePendulum(mass, mass, length, length, gravity, dt=dt, step=step)


def _state(name: str) -> Array:
    """Of the task, whose first angle is counted from upright."""
    return jnp.asarray(STARTS[name]) + jnp.array([jnp.pi, 0.0, 0.0, 0.0])


def energy(s: Array) -> Array:
    """Joule, 0 at rest with both rods level; of states [..., 4]."""
    first, second, v_1, v_2 = s[..., 0], s[..., 0] + s[..., 1], s[..., 2], s[..., 2] + s[..., 3]
    # Positions of the masses are l (sin, cos) of the angles from upright, summed along the rods.
    speeds = v_1**2 + v_1**2 + v_2**2 + 2 * v_1 * v_2 * jnp.cos(first - second)
    heights = 2 * jnp.cos(first) + jnp.cos(second)
    return MASS * LENGTH**2 * speeds / 2 + MASS * GRAVITY * LENGTH * heights


def _from(name: str, size: Size) -> dict[str, Any]:
    """Under the set-up's integrator, and the variances once more under RK4 with steps of ten times the length."""
    start, goal = _state(name), jnp.asarray(size.goal)
    looks = round(size.duration / size.h) // size.every
    run = jax.jit(_simulate, static_argnames=("every", "looks"))
    out: dict[str, Any] = {"t": size.h * size.every * np.arange(1, looks + 1), "Lyapunov": _lyapunov(start, size)}
    # The same draws for every sigma; the last sample is the mean start.
    eps = jnp.append(jax.random.normal(jax.random.key(0), (size.samples,)), 0.0)
    for sigma in size.sigmas:
        rough = run(_pendulum(semi_implicit, size.h), start, goal, sigma * eps, every=size.every, looks=looks)
        exact = run(_pendulum(rk4, 10 * size.h), start, goal, sigma * eps, every=size.every // 10, looks=looks)
        found, again = (_statistics(x[0], x[1], x[2], eps[:-1], sigma) for x in (rough, exact))
        kept = ("pathwise variance", "score variance", "energy error")
        out[str(sigma)] = found | {f"{k}, RK4": again[k] for k in kept}
    return out


def _statistics(cost: Array, slope: Array, error: Array, eps: Array, sigma: float) -> dict[str, np.ndarray]:
    first, zeroth = np.asarray(slope[:, :-1]), np.asarray((cost[:, :-1] - cost[:, -1:]) * eps / sigma)
    root = np.sqrt(eps.size)
    return {
        "pathwise variance": first.var(1, ddof=1),
        "score variance": zeroth.var(1, ddof=1),
        "pathwise mean": first.mean(1),
        "score mean": zeroth.mean(1),
        "pathwise error": first.std(1, ddof=1) / root,
        "score error": zeroth.std(1, ddof=1) / root,
        "top percent": _tail(first),
        "energy error": np.asarray(error).max(1),
    }


def _simulate(f: DoublePendulum, start: Array, goal: Array, offsets: Array, *, every: int, looks: int):
    """Costs, their derivatives by the start's first angle, and relative energy errors, [looks, samples]."""
    rest = jnp.zeros(2)
    direction = jnp.array([1.0, 0.0, 0.0, 0.0])
    s = start + offsets[:, None] * direction
    scale = 3 * MASS * GRAVITY * LENGTH  # of the potential energy, from level to upright
    step = jax.vmap(lambda s, ds: jax.jvp(lambda s: f(s, rest), (s,), (ds,)))

    def cost(s):
        # Angles from hanging; the task's first is from upright.
        return jnp.sum(1 - jnp.cos(s[:2] - jnp.array([jnp.pi, 0.0]) - goal))

    def look(carry, _):
        carry = jax.lax.fori_loop(0, every, lambda _, x: step(*x), carry)
        s, ds = carry
        c, slope = jax.vmap(lambda s, ds: jax.jvp(cost, (s,), (ds,)))(s, ds)
        return carry, (c, slope, jnp.abs(energy(s) - before) / scale)

    before = energy(s)
    return jax.lax.scan(look, (s, jnp.broadcast_to(direction, s.shape)), None, length=looks)[1]


def _tail(samples: np.ndarray) -> np.ndarray:
    """Share of the largest 1% of samples in the sum of squared deviations, at each time."""
    squares = np.sort((samples - samples.mean(1, keepdims=True)) ** 2, axis=1)
    return squares[:, -max(1, samples.shape[1] // 100) :].sum(1) / squares.sum(1)


def _lyapunov(start: Array, size: Size) -> dict[str, Any]:
    """Per second, of the mean start; the running average at a few times."""
    f, rest = _pendulum(rk4, size.lyapunov_dt), jnp.zeros(2)

    @jax.jit
    def run(s):
        states = jax.lax.scan(lambda s, _: (f(s, rest), s), s, None, length=size.lyapunov_steps)[1]
        return states, lyapunov_exponents(jax.vmap(jax.jacfwd(lambda s: f(s, rest)))(states), size.lyapunov_dt)

    states, found = run(start)
    shown = np.unique(np.geomspace(10, size.lyapunov_steps, 40).round().astype(int))
    scale = 3 * MASS * GRAVITY * LENGTH
    return {
        "values": found.values,
        "error": found.error,
        "t": shown * size.lyapunov_dt,
        "running": found.running[shown - 1, 0],
        "drift": float(jnp.abs(energy(states) - energy(start)).max()) / scale,
    }


def _crossing(found: Any, sigma: str, by: str = "") -> float:
    first, zeroth = (array(found[sigma][f"{which} variance{by}"]) for which in ("pathwise", "score"))
    return crossover_horizon(array(found["t"]), np.where(np.isfinite(first), first, np.inf), zeroth)


def _sigmas(found: Any) -> list[str]:
    return [k for k, x in found.items() if isinstance(x, dict) and "score mean" in x]


def conclude(numbers: Any) -> str:
    """From the numbers."""
    return " ".join(_sentence(name, found) for name, found in numbers.items())


def _sentence(name: str, found: Any) -> str:
    t = array(found["t"])
    values, doubt = array(found["Lyapunov"]["values"]), array(found["Lyapunov"]["error"])
    spectrum = ", ".join(f"{v:+.3f}" for v in values)
    said = []
    for sigma in _sigmas(found):
        x = found[sigma]
        at = _crossing(found, sigma)
        first, zeroth = array(x["pathwise variance"]), array(x["score variance"])
        late = t > t[-1] / 3
        slope = np.polyfit(t[late], np.log(np.maximum(first[late], 1e-300)), 1)[0]
        z = (array(x["pathwise mean"]) - array(x["score mean"])) / np.hypot(
            array(x["pathwise error"]), array(x["score error"])
        )
        before = t < at
        apart = f"{np.abs(z[before]).max():.1f}" if before.any() else "no time"
        by_rk4 = _crossing(found, sigma, ", RK4")
        crossing, again = (f"cross at {x:.2f} s" if np.isfinite(x) else "do not cross" for x in (at, by_rk4))
        said.append(
            f"sigma {sigma}: the variances {crossing} (RK4: {again}), the pathwise one grows as e^({slope:.2f} t) in the last "
            f"two thirds, where twice the exponent is {2 * values[0]:.2f}, and ends at {first[-1]:.1e} against "
            f"{zeroth[-1]:.1e}, the means differ by at most {apart} standard errors before and {np.abs(z).max():.1f} at all, "
            f"the top 1% of samples hold {array(x['top percent'])[-1]:.0%} of it"
        )
    error, by_rk4 = (
        max(float(array(found[s][f"energy error{by}"]).max()) for s in _sigmas(found)) for by in ("", ", RK4")
    )
    return (
        f"{name}: Lyapunov exponents {spectrum} per second (first +-{doubt[0]:.3f}; sums of pairs "
        f"{values[0] + values[3]:+.1e}, {values[1] + values[2]:+.1e}); "
        + "; ".join(said)
        + f"; the energy errs by at most {error:.1e} of 3 m g l ({by_rk4:.1e} by RK4 with steps of 10 h)."
    )


def paint(numbers: Any) -> Any:
    """A row for each start: variances, means at the middle sigma, exponents, energy."""
    figure, axes = sheet(len(numbers), (1.15, 0.9, 0.3, 0.9))
    heading(figure, "Double pendulum: gradients with respect to the first angle at the start")
    for row, (name, found) in zip(axes, numbers.items(), strict=True):
        _variances(row[0], found)
        title(row[0], f"{name}: variance of one sample")
        _means(row[1], found)
        title(row[1], f"{name}: mean gradient, sigma {_sigmas(found)[-2]}")
        _running(row[2], found)
        title(row[2], f"{name}: largest Lyapunov exponent")
        _energy(row[3], found)
        title(row[3], f"{name}: energy error")
    return figure


def _variances(axis: Any, found: Any) -> None:
    t, lines = array(found["t"]), []
    shown = [array(found[s][which]) for s in _sigmas(found) for which in ("pathwise variance", "score variance")]
    log_limits(axis, "y", shown)
    for i, sigma in enumerate(_sigmas(found)):
        style = style_of(f"sigma {sigma}", index=i)
        first, zeroth = (array(found[sigma][which]) for which in ("pathwise variance", "score variance"))
        axis.plot(t, first, color=style.colour, linewidth=1.7)
        axis.plot(t, zeroth, color=style.colour, linewidth=1.2, linestyle="--")
        lines.append(Series(style, t, first))
        at = _crossing(found, sigma)
        if t[0] < at < t[-1]:
            axis.plot([at], [np.interp(at, t, zeroth)], "o", color=style.colour, markersize=5, markerfacecolor="none")
    axis.set_xlabel("time [s]")
    axis.set_ylabel("variance [1/rad^2]")
    key(axis, [("pathwise", {"linewidth": 1.7}), ("score function", {"linewidth": 1.2, "linestyle": "--"})])
    name_ends(axis, lines)


def _means(axis: Any, found: Any) -> None:
    """Both means and two standard errors; the axis shows what the score function's needs."""
    t, x, lines = array(found["t"]), found[_sigmas(found)[-2]], []
    for i, which in enumerate(("pathwise", "score")):
        style = style_of(which, index=i)
        mean, error = array(x[f"{which} mean"]), array(x[f"{which} error"])
        axis.fill_between(t, mean - 2 * error, mean + 2 * error, color=style.colour, alpha=0.2, linewidth=0)
        axis.plot(t, mean, color=style.colour, linewidth=1.4)
        lines.append(Series(style, t, mean))
    reach = 1.5 * float(np.abs(array(x["score mean"])).max() + 2 * array(x["score error"]).max())
    axis.set_ylim(-reach, reach)
    axis.axhline(0, color=MUTED, linewidth=0.7)
    axis.set_xlabel("time [s]")
    axis.set_ylabel("gradient [1/rad]")
    name_ends(axis, [line._replace(y=np.clip(line.y, -reach, reach)) for line in lines])


def _running(axis: Any, found: Any) -> None:
    x = found["Lyapunov"]
    style = style_of("exponent", index=2)
    axis.set_xscale("log")
    axis.plot(array(x["t"]), array(x["running"]), color=style.colour, linewidth=1.7)
    value, error = array(x["values"])[0], array(x["error"])[0]
    axis.axhspan(value - error, value + error, color=style.colour, alpha=0.2, linewidth=0)
    axis.axhline(value, color=style.colour, linewidth=0.9, linestyle="--")
    axis.set_xlabel("averaged over [s]")
    axis.set_ylabel("1/s")
    key(axis, [("running", {"linewidth": 1.7}), ("weighted average", {"linewidth": 0.9, "linestyle": "--"})])


def _energy(axis: Any, found: Any) -> None:
    t, lines = array(found["t"]), []
    for i, sigma in enumerate(_sigmas(found)):
        style, both = (
            style_of(f"sigma {sigma}", index=i),
            [array(found[sigma][f"energy error{by}"]) for by in ("", ", RK4")],
        )
        axis.plot(t, np.maximum(both[0], 1e-16), color=style.colour, linewidth=1.5)
        axis.plot(t, np.maximum(both[1], 1e-16), color=style.colour, linewidth=1.1, linestyle="--")
        lines += [Series(style, t, both[0]), Series(style._replace(label=f"RK4, {sigma}"), t, both[1])]
    log_limits(axis, "y", [line.y for line in lines])
    axis.set_xlabel("time [s]")
    axis.set_ylabel("largest |E - E_0| / (3 m g l)")
    name_ends(axis, lines)
