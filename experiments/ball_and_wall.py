r"""Which gradient takes a throw over the wall?

The distance of a throw at an angle theta, under noise on the angle, jumps where the ball clears the wall. Against theta:
value, gradients and their variance, the bias of the pathwise gradient, and the weight alpha that the alpha-order mixture
gives to it; the exact curves are by quadrature. Then ascents from theta = .1, on the plain slope before the wall, by each
of the three.

The reward is the squared distance, less that of the longest flight, a constant that neither gradient sees, but the variance
of the score function without a baseline does: all score functions here have a leave-one-out baseline.

Set-up of Suh et al. 2022, Do Differentiable Simulators Give Better Policy Gradients, section 3, with the gamma of the
authors' code. Two bounds on the mixture: `bias_bound`, and the paper's, `accuracy`, both in the right direction
(`gradients/alpha_order.py`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.optimize import root_scalar

from diffmbrl.gradients.alpha_order import AlphaOrder, accuracy, bernstein, bias_bound
from diffmbrl.optimizers import OptaxSolver
from diffmbrl.policies import OpenLoop
from diffmbrl.report.figures import Series, name_ends, style_of
from diffmbrl.tasks import ball_and_wall
from experiments import exact
from experiments.decisions import BASELINE, ESTIMATORS, EXACT, PATHWISE, estimates, with_noise
from experiments.record import array
from experiments.sheet import band, heading, log_limits, note, sheet, title

EXPECTED = (
    "The pathwise gradient has the lower variance away from the wall and does not see the jump: its ascent stops where the "
    "smoothed objective still rises, while the score function and the mixture clear the wall; the mixture's alpha falls where "
    "the bias is, and its variance lies between the two."
)
WALL, HEIGHT = 0.06, 0.02
MIXED, PAPER = "mixed, bias", "mixed, accuracy"
WHO = (PATHWISE, BASELINE, MIXED, PAPER)
STYLES = {name: style_of(name, index=(0, 2, 1, 3)[i]) for i, name in enumerate(WHO)}
PUBLISHED = {"pathwise": 0.4952, "score function": 0.8331, "mixed": 0.8346}  # angles in the authors' plotting code


class Size(NamedTuple):
    """How much is measured."""

    who: tuple[str, ...]
    std: float
    thetas: int
    samples: int
    repeats: int
    gamma: float  # of the sweep
    descent_gamma: float
    rate: float
    descent_samples: int
    steps: int
    trials: int
    start: float


FULL = Size(WHO, 0.1, 80, 1000, 100, 0.005, 0.01, 0.1, 50, 1000, 20, 0.1)
QUICK = FULL._replace(who=WHO[:3], thetas=20, repeats=10, trials=3)


def measure(size: Size, parts: Any):
    """The sweep over angles, then the ascents."""
    numbers = {"sweep": parts({"part": "sweep"} | size._asdict(), lambda: _sweep(size))}
    yield numbers
    yield numbers | {"ascents": parts({"part": "ascents"} | size._asdict(), lambda: _ascents(size))}


def smoothed(theta: np.ndarray, std: float) -> exact.Exact:
    """The exact curves of the reward, which jumps at the two angles at which the ball just clears the wall."""
    g, reach = 9.81, 1 / 9.81

    def clearance(a):
        return WALL * np.sin(a) * np.cos(a) - g * WALL**2 / 2 - HEIGHT * np.cos(a) ** 2

    low, high = (root_scalar(clearance, bracket=ends).root for ends in ((0.3, 0.9), (0.9, np.pi / 2)))
    wall = np.arcsin(WALL / reach) / 2  # from where on the flight ends beyond the wall
    period = np.pi  # of the whole landing, so the edges come back

    def landing(a):
        flight = reach * np.sin(2 * a)
        blocked = (flight > WALL) & (clearance(a) <= 0)
        return np.where(blocked, WALL, flight), np.where(blocked, 0.0, 2 * reach * np.cos(2 * a))

    def f(a):
        return landing(a)[0] ** 2 - reach**2

    def slope(a):
        x, dx = landing(a)
        return 2 * x * dx

    edges = [edge + k * period for k in (-1, 0, 1) for edge in (wall, low, high, np.pi / 2 - wall)]
    return exact.quadrature(f, slope, theta, std, edges=edges)


def _estimators(who: Sequence[str], gamma: float) -> dict[str, Any]:
    bounds = {MIXED: bias_bound, PAPER: accuracy}
    return {
        name: AlphaOrder(gamma=gamma, radius=bernstein, bound=bounds[name]) if name in bounds else ESTIMATORS[name]
        for name in who
    }


def _measured(found: Any) -> list[str]:
    return [name for name in WHO if name in found]


def _mixtures(found: Any) -> list[str]:
    return [name for name in (MIXED, PAPER) if name in found]


def _sweep(size: Size) -> dict[str, Any]:
    task, theta = ball_and_wall(), np.linspace(0, np.pi / 2, size.thetas)
    found: dict[str, Any] = {"theta": theta, "exact": smoothed(theta, size.std)._asdict()}
    for name, estimator in _estimators(size.who, size.gamma).items():
        x = estimates(estimator, task, theta, std=size.std, s0=[WALL, 0.0], samples=size.samples, repeats=size.repeats)
        # Between batches: that of a mixture's sample does not know that alpha varies.
        mean, spread = x["mean"].mean(1), size.samples * x["mean"].var(1, ddof=1)
        found[name] = {"mean": mean, "variance": spread}
        if isinstance(estimator, AlphaOrder):
            found[name]["alpha"] = _alphas(estimator, task, theta, size)
    return found


def _alphas(estimator: AlphaOrder, task: Any, theta: np.ndarray, size: Size) -> np.ndarray:
    """The mean of alpha over batches."""
    s0 = jnp.broadcast_to(jnp.asarray([WALL, 0.0]), (size.samples, 2))

    @jax.jit
    def at(a, keys):
        noisy = with_noise(estimator, task, std=size.std).around(OpenLoop(a.reshape(1, 1)), task)
        return jnp.mean(jax.lax.map(lambda key: estimator.alpha(noisy, task, s0, key), keys))

    keys = jax.random.split(jax.random.key(0), size.repeats)
    return np.array([at(jnp.asarray(a), keys) for a in theta])


def _ascents(size: Size) -> dict[str, Any]:
    """Angles along the ascents, and the smoothed return there."""
    every = max(1, size.steps // 100)
    grid = np.linspace(-0.5, 2.0, 501)
    value = smoothed(grid, size.std).value
    found: dict[str, Any] = {"step": np.arange(0, size.steps + 1, every)}
    for name, estimator in _estimators(size.who, size.descent_gamma).items():
        angles = np.asarray(_ascend(estimator, size))[:, ::every]
        found[name] = {"angle": angles.T, "return": np.interp(angles, grid, value).T}
    fine = np.linspace(0.0, np.pi / 2, 20_001)
    curves = smoothed(fine, size.std)
    found["stationary"] = {
        "of the smoothed objective": _falls_through_zero(fine, curves.gradient),
        "of the mean pathwise gradient": _falls_through_zero(fine, curves.pathwise),
    }
    found["without noise"] = {
        name: _followed(fine, getattr(curves, key), size, every)
        for name, key in ((PATHWISE, "pathwise"), (BASELINE, "gradient"))
    }
    return found


def _followed(theta: np.ndarray, gradient: np.ndarray, size: Size, every: int) -> np.ndarray:
    """The angle every so many updates of an ascent along this gradient, for six times as long."""
    angles = [size.start]
    for _ in range(6 * size.steps):
        angles.append(angles[-1] + size.rate * float(np.interp(angles[-1], theta, gradient)))
    return np.array(angles[::every])


def _falls_through_zero(theta: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """Where an ascent along this gradient comes to rest."""
    return theta[1:][(gradient[:-1] > 0) & (gradient[1:] <= 0)]


def _ascend(estimator: Any, size: Size) -> Any:
    """Angles [trials, steps + 1]."""
    task = ball_and_wall()
    gradient: Any = with_noise(estimator, task, std=size.std)
    solver = OptaxSolver(optax.sgd, gradient=gradient, learning_rate=size.rate)
    s0 = jnp.broadcast_to(jnp.asarray([WALL, 0.0]), (size.descent_samples, 2))
    start = OpenLoop(jnp.full((1, 1), size.start))

    def step(carry, key):
        plan, state = carry
        plan, state, _ = solver.update(plan, state, task, s0, key=key)
        return (plan, state), plan.a[0, 0]

    @jax.jit
    @jax.vmap
    def run(key):
        _, angles = jax.lax.scan(step, (start, solver.init(start, task)), jax.random.split(key, size.steps))
        return jnp.concatenate([start.a[0], angles])

    return run(jax.random.split(jax.random.key(1), size.trials))


def conclude(numbers: Any) -> str:
    """Bias and variance along the sweep, and where the ascents end."""
    sweep = numbers["sweep"]
    theta, known = array(sweep["theta"]), {key: array(x) for key, x in sweep["exact"].items()}
    bias_of = np.abs(known["pathwise"] - known["gradient"])
    worst = int(np.argmax(bias_of))
    lower = np.mean(known["pathwise_variance"] < known["baseline_variance"])
    said = [
        f"The pathwise gradient's bias is largest at theta = {theta[worst]:.2f}, {bias_of[worst]:.2g} of a gradient of "
        f"{known['gradient'][worst]:.2g}; its variance is below the score function's at {lower:.0%} of the angles (at the "
        f"jump {known['pathwise_variance'][worst]:.2g} against {known['baseline_variance'][worst]:.2g}). "
    ]
    for name in _mixtures(sweep):
        alpha = array(sweep[name]["alpha"])
        said.append(
            f"Mixture ({name.split(', ')[1]}): alpha {alpha.min():.2f} to {alpha.max():.2f}, {alpha[worst]:.2f} there. "
        )
    return "".join(said) + (_ascent_sentence(numbers["ascents"]) if "ascents" in numbers else "")


def _ascent_sentence(ascents: Any) -> str:
    who = _measured(ascents)
    ends, returns = ({name: array(ascents[name][key])[-1] for name in who} for key in ("angle", "return"))
    parts = [f"{name} {np.median(ends[name]):.3f} (smoothed return {np.median(returns[name]):.3g})" for name in who]
    right, wrong = (array(x) for x in ascents["stationary"].values())
    steps, followed = array(ascents["step"]), array(ascents["without noise"][PATHWISE])
    return (
        f"After {steps[-1]:.0f} updates the ascents are at the angles {', '.join(parts)}; the smoothed objective is "
        f"stationary at {_listed(right)}, the mean "
        f"pathwise gradient at {_listed(wrong)}. Followed without noise, the pathwise one is at "
        f"{followed[steps.size - 1]:.3f} after as many updates and at {followed[-1]:.3f} after six times as many: it has not "
        f"stopped, it creeps. The authors' code plots {', '.join(f'{name} {angle}' for name, angle in PUBLISHED.items())}. Its "
        "mixture weighs by standard deviations where variances belong and its confidence bound has the wrong direction: "
        "alpha is larger there than gamma allows."
    )


def _listed(x: np.ndarray) -> str:
    return " and ".join(f"{value:.3f}" for value in x)


def paint(numbers: Any) -> Any:
    """Value, gradient, variance and alpha against the angle; the ascents."""
    figure, axes = sheet(2, (0.35, 0.35, 1.55))
    heading(figure, "A ball and a wall: what estimators see of a jump")
    sweep = numbers["sweep"]
    theta, known = array(sweep["theta"]), sweep["exact"]
    value, gradient, variance = axes[0]
    fine = np.linspace(0, np.pi / 2, 1000)
    value.plot(fine, smoothed(fine, 1e-4).value, color="#c8ccd1", linewidth=1.2)
    value.plot(theta, array(known["value"]), color=EXACT.colour)
    title(value, "return, and its mean under noise")
    lines = []
    for name in _measured(sweep):
        looks = {"markersize": 2.4, "color": STYLES[name].colour}
        gradient.plot(theta, array(sweep[name]["mean"]), STYLES[name].marker, **looks)
        spread = array(sweep[name]["variance"])
        variance.plot(theta, spread, STYLES[name].marker, **looks)
        lines.append(Series(STYLES[name], theta, spread))
    for key in ("gradient", "pathwise"):
        gradient.plot(theta, array(known[key]), color=EXACT.colour, linewidth=1, zorder=0)
    for key in ("pathwise_variance", "baseline_variance"):
        variance.plot(theta, array(known[key]), color=EXACT.colour, linewidth=1, zorder=0)
    log_limits(variance, "y", [line.y for line in lines])
    title(gradient, "gradient; lines: exact means")
    title(variance, "variance of one sample; lines: exact")
    name_ends(variance, lines)
    alpha, angle, reached = axes[1]
    for name in _mixtures(sweep):
        alpha.plot(theta, array(sweep[name]["alpha"]), color=STYLES[name].colour)
    free = array(known["baseline_variance"]) / (array(known["baseline_variance"]) + array(known["pathwise_variance"]))
    alpha.plot(theta, free, color=EXACT.colour, linewidth=1, zorder=0)
    alpha.set_ylim(-0.03, 1.03)
    title(alpha, "alpha; line: of least variance")
    for axis in (value, gradient, variance, alpha):
        axis.set_xlabel("angle [rad]")
    if "ascents" in numbers:
        _paint_ascents(angle, reached, numbers["ascents"])
    return figure


def _paint_ascents(angle: Any, reached: Any, ascents: Any) -> None:
    step = array(ascents["step"])
    for place in array(ascents["stationary"]["of the smoothed objective"]):
        angle.axhline(place, color="#c8ccd1", linewidth=1)
    for axis, key in ((angle, "angle"), (reached, "return")):
        lines = [band(axis, STYLES[name], step, array(ascents[name][key])) for name in _measured(ascents)]
        axis.set_xlabel("updates")
        if axis is reached:
            name_ends(axis, lines)
    note(angle, "line: best angle under noise", 0.3, 0.05)
    title(angle, "angle along the ascent [rad]")
    title(reached, "smoothed return")
