r"""How does the variance of gradient estimators grow with the stiffness of a contact, and how much of that is the integrator's?

A plan of 200 forces, u = .1 N, pushes one body into another through a spring of stiffness k; noise of .1 N on each force.
The variance is that of one sample of dJ/du, summed over the plan. A pair in touch oscillates with $\omega = \sqrt{2k/m}$.
The semi-implicit step h = 5 ms with a share c = .99 of the speed kept is stable for it up to $h^2\omega^2 = 2(1 + c)$, $k =
(1 + c) m / h^2$, and from half of that k on an impact of one step can throw the bodies apart faster than they met. The same
plan is followed with 4 and with 16 smaller steps for each force (keeping the same speed in all): what the three share is
the contact's, what they do not share the integrator's.

Set-up of Suh et al. 2022, Do Differentiable Simulators Give Better Policy Gradients, section 5. Its code keeps c = .1 of
the speed each step, which hardly lets the bodies bounce: that is the fourth case. And it plots the square root of the
variance times that of the number of parameters (a sum of squares is added to every entry of a matrix, whose norm is then
taken).
"""

from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from diffmbrl.core import Task
from diffmbrl.gradients import BPTT, LeaveOneOut, LikelihoodRatio, TotalReturn
from diffmbrl.policies import OpenLoop
from diffmbrl.report.figures import name_ends, style_of
from diffmbrl.tasks import pushing
from diffmbrl.tasks.pushing import Pushing
from experiments.decisions import with_noise
from experiments.record import array
from experiments.sheet import band, heading, log_limits, note, sheet, title

EXPECTED = (
    "The variance of the pathwise gradient grows as a power of the stiffness while that of the score function hardly changes, "
    "so the score function is better beyond some stiffness; past the integrator's limit the pathwise variance blows up, which "
    "smaller steps undo."
)
ESTIMATORS = {
    "pathwise": BPTT(),
    "score function": LikelihoodRatio(TotalReturn(), LeaveOneOut()),
    "reward to go": LikelihoodRatio(baseline=LeaveOneOut()),
}
STYLES = {name: style_of(name, index=i) for i, name in enumerate(ESTIMATORS)}
STEPS = {"h": 1, "h/4": 4, "h/16": 16, "h, c = .1": 1}
KEPT = {"h, c = .1": 0.1}  # of the speed in each step of h; .99 in the others


class Size(NamedTuple):
    """How much is measured."""

    stiffness: tuple[float, ...]
    std: float
    force: float
    samples: int
    seeds: int


K = tuple(float(f"{k:.4g}") for k in np.logspace(1, 4.5, 15))
FULL = Size(K, 0.1, 0.1, 300, 3)
QUICK = FULL._replace(stiffness=K[::4], samples=30, seeds=2)


class Substeps(eqx.Module):
    """Several small steps with the same force."""

    inner: Pushing
    count: int = eqx.field(static=True)

    def __call__(self, s: Any, a: Any, *, key: Any = None) -> Any:
        return jax.lax.scan(lambda s, _: (self.inner(s, a), None), s, None, length=self.count)[0]


def measure(size: Size, parts: Any):
    """Variances for every stiffness, step, estimator and seed."""
    numbers: dict[str, Any] = {"stiffness": size.stiffness, "stable": float(Pushing().stable())}
    for step in STEPS:
        numbers[step] = parts({"step": step} | size._asdict(), lambda step=step: _measure(step, size))
        yield numbers


def _measure(step: str, size: Size) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0), size.seeds)
    found: dict[str, Any] = {}
    for name, estimator in ESTIMATORS.items():
        rows = []
        for k in size.stiffness:
            task = _task(step, k)
            rows.append(_spread(with_noise(estimator, task, std=size.std), task, size.force, keys, size.samples))
        variance, norm = (np.stack([np.asarray(row[i]) for row in rows]) for i in (0, 1))
        found[name] = {"variance": variance, "norm": norm}
    return found


def _task(step: str, k: float) -> Task:
    task, count = pushing(k=k, keep=KEPT.get(step, 0.99)), STEPS[step]
    whole: Any = task.dynamics
    small = Pushing(whole.k, whole.mass, whole.keep ** (1 / count), whole.dt / count)
    return eqx.tree_at(lambda t: t.dynamics, task, Substeps(small, count))


@partial(jax.jit, static_argnames="samples")
def _spread(noisy: Any, task: Task, force: Any, keys: Any, samples: int) -> tuple[Any, Any]:
    """Summed variance of one sample, and norm of the mean gradient, for each key."""
    plan = OpenLoop(jnp.full((task.horizon, 1), force))
    s0 = jnp.tile(jnp.asarray([0.0, 1.0, 0.0, 0.0]), (samples, 1))

    def one(key):
        g = noisy.samples(plan, task, s0, key)[1].a[..., 0]
        return jnp.sum(jnp.var(g, axis=0, ddof=1)), jnp.linalg.norm(jnp.mean(g, axis=0))

    return jax.lax.map(one, keys)


def conclude(numbers: Any) -> str:
    """Growth with the stiffness, crossings, and what smaller steps change."""
    k, stable = array(numbers["stiffness"]), float(numbers["stable"])
    steps = [step for step in STEPS if step in numbers]
    curves = {
        step: {name: np.median(array(numbers[step][name]["variance"]), axis=1) for name in ESTIMATORS} for step in steps
    }
    law = (k >= 50) & (k <= 3200)
    said = []
    for step in steps:
        pathwise, score = curves[step]["pathwise"], curves[step]["score function"]
        over = np.flatnonzero(pathwise > score)
        power = np.polyfit(np.log(k[law]), np.log(pathwise[law]), 1)[0]
        higher = f"from k = {k[over[0]]:.4g} on" if over.size else "nowhere"
        said.append(
            f"Step {step}: from k = {k[law][0]:.3g} to {k[law][-1]:.4g} the pathwise variance goes from "
            f"{pathwise[law][0]:.3g} to {pathwise[law][-1]:.3g} (power {power:.2f}), the score function's from "
            f"{score[law][0]:.3g} to {score[law][-1]:.3g}; the pathwise one is the higher {higher}."
        )
    bouncing = [step for step in steps if step not in KEPT]
    first, last = (curves[step]["pathwise"] for step in (bouncing[0], bouncing[-1]))
    apart = np.flatnonzero(first > 2 * last)
    where = f"from k = {k[apart[0]]:.4g} on" if apart.size else "nowhere"
    fits = {name: _fit(x[law], np.log(last[law])) for name, x in (("log k", np.log(k)), ("sqrt(k)", np.sqrt(k)))}
    return " ".join(said) + (
        f" Whole steps have more than twice the pathwise variance of the smallest {where}, against a limit of stability of "
        f"{stable:.4g} and of tame impacts of {stable / 2:.4g}. With the smallest steps log variance is linear in log k, a "
        f"power law, with R^2 = {fits['log k']:.2f}, and in sqrt(k), the number of bounces in the time, with "
        f"{fits['sqrt(k)']:.2f}."
    )


def _fit(x: np.ndarray, y: np.ndarray) -> float:
    """R^2 of a straight line."""
    return float(np.corrcoef(x, y)[0, 1] ** 2)


def paint(numbers: Any) -> Any:
    """Variance against stiffness for every step."""
    steps = [step for step in STEPS if step in numbers]
    figure, axes = sheet(1, (0.35,) * (len(steps) - 1) + (1.2,))
    heading(figure, "Pushing: variance against the stiffness of the contact")
    k, stable = array(numbers["stiffness"]), float(numbers["stable"])
    every = [array(numbers[step][name]["variance"]) for step in steps for name in ESTIMATORS]
    for axis, step in zip(axes[0], steps, strict=True):
        limit = stable * STEPS[step] ** 2 * (1 + KEPT.get(step, 0.99)) / 1.99
        log_limits(axis, "x", [k])
        log_limits(axis, "y", every)
        for place, style in ((limit / 2, ":"), (limit, "--")):
            if place < k[-1]:
                axis.axvline(place, color="#6a737d", linewidth=1, linestyle=style)
        lines = [band(axis, STYLES[name], k, array(numbers[step][name]["variance"])) for name in ESTIMATORS]
        axis.set_xlabel("stiffness k [N/m]")
        title(axis, f"variance of dJ/du, step {step}")
        if step == steps[0]:
            note(axis, "dotted: impacts gain speed; dashed: unstable", 0.03, 0.93)
        if step == steps[-1]:
            name_ends(axis, lines)
    return figure
