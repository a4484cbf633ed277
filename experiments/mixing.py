r"""How does the variance of a gradient grow with the horizon, and what do mixtures of pathwise and score function keep of both?

At untrained policies with Gaussian noise in the actions, on one and the same rollouts:
* pathwise (BPTT through the noise), and the score function (reward to go, leave-one-out baseline);
* both mixed by inverse variance, with a weight for each parameter and with a weight for each time step;
* total propagation, whose weights are per step as well and act within the reverse pass.

The variance is that of a call on a batch of rollouts, over repeated calls with new starts and new noise, summed over the
parameters of the policy; a mixture's weights are made of the batch that they mix. Horizons are masks over the rewards of the
longest one; terminal rewards are left out. The weights are the means over the calls, at the longest horizon.

Beside two systems, whose actions are fewer than their states, stands a map without dynamics of its own, s' = a = 1.5 sin(2 s) +
noise: chaos that comes through the policy alone, with noise on every state, the case that total propagation is made for.

The learned cart-pole is a network with a mean and a variance, fitted to 5000 steps of random actions; its noise is drawn by
reparameterisation in each state. That is the figure of Parmas et al. (2018), whose model is a Gaussian process of the swing-up.
"""

from functools import cache, partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from diffmbrl.core import Box, Task, reweighted
from diffmbrl.gradients import (
    BPTT,
    InverseVariance,
    InverseVariancePerStep,
    LeaveOneOut,
    LikelihoodRatio,
    Smoothed,
    TotalPropagation,
)
from diffmbrl.models import GaussianDynamics, Training, train
from diffmbrl.models.buffer import flat
from diffmbrl.policies import Neural
from diffmbrl.report.figures import log_axis, name_ends, style_of
from diffmbrl.tasks import make
from experiments.learned import annealed_adam, random_windows
from experiments.record import array
from experiments.sheet import band, heading, log_limits, sheet, title

EXPECTED = (
    "The pathwise variance grows exponentially with the horizon and the score function's polynomially, so that they cross; "
    "every mixture stays below both, per step further below than per parameter, and total propagation lowest."
)
PATHWISE, SCORE = "pathwise", "score function"
MIXED = ("per parameter", "per step", "total prop.")
MAP, LEARNED = "chaotic map", "learned cart-pole"
ESTIMATORS = {
    PATHWISE: BPTT(),
    SCORE: LikelihoodRatio(baseline=LeaveOneOut()),
    MIXED[0]: InverseVariance(),
    MIXED[1]: InverseVariancePerStep(),
    MIXED[2]: TotalPropagation(),
}
WEIGHED = MIXED[1:]  # those with a weight for each time step


class Size(NamedTuple):
    """How much is measured."""

    tasks: tuple[str, ...]
    horizons: tuple[int, ...]
    stds: tuple[float, ...]  # of the noise, as a share of half the actions' range, for each task
    seeds: int
    starts: int
    calls: int
    hidden: tuple[int, ...]


FULL = Size(
    ("cartpole-balance", LEARNED, "double-pendulum", MAP),
    (5, 10, 20, 40, 80),
    (0.1, 0.1, 0.3, 0.2),
    3,
    64,
    16,
    (16, 16),
)
QUICK = FULL._replace(tasks=(LEARNED,), stds=(0.1,), horizons=(5, 20, 60), seeds=1, starts=24, calls=8, hidden=(6,))


class Follows(eqx.Module):
    """s' = a."""

    def __call__(self, s, a, *, key=None):
        return a


class Bounded(eqx.Module):
    """cos s."""

    def __call__(self, s, a):
        return jnp.cos(s[0])


class Map(eqx.Module):
    """a = theta_0 sin(theta_1 s)."""

    theta: jax.Array

    def __call__(self, s, *, key=None):
        return self.theta[0] * jnp.sin(self.theta[1] * s)


@cache
def _learned() -> GaussianDynamics:
    """A model of the balanced cart-pole."""
    task = make("cartpole-balance")
    rows = flat(random_windows(task, jax.random.key(10), episodes=100, length=50))
    f = GaussianDynamics.init(task, hidden=(32, 32), key=jax.random.key(11))
    updates = {"rule": annealed_adam, "rate": 5e-3, "steps": 1800, "epochs": 100, "patience": 100}
    trained, _ = train(
        jax.tree.map(lambda x: x[None], f), rows, len(rows.r), jax.random.key(12), Training(**updates, bootstrap=False)
    )
    return jax.tree.map(lambda x: x[0], trained)


def _task(name: str, horizon: int) -> Task:
    if name == LEARNED:
        return eqx.tree_at(lambda t: t.dynamics, make("cartpole-balance", horizon=horizon), _learned())
    if name != MAP:
        return make(name, horizon=horizon)
    return Task(
        name=MAP,
        dynamics=Follows(),
        reward=Bounded(),
        initial=Box(-jnp.ones(1), jnp.ones(1)),
        a_low=[-jnp.inf],
        a_high=[jnp.inf],
        horizon=horizon,
        dt=1.0,
    )


def _policy(task: Task, hidden: tuple[int, ...], seed: int) -> Any:
    key = jax.random.key(seed)
    if task.name != MAP:
        return Neural.init(task, hidden=hidden, key=key)
    return Map(jnp.array([1.5, 2.0]) + 0.1 * jax.random.normal(key, (2,)))


def measure(size: Size, parts: Any):
    """Variances and weights for every task, seed and horizon."""
    numbers: dict[str, Any] = {}
    for name, std in zip(size.tasks, size.stds, strict=True):
        choices = {k: v for k, v in size._asdict().items() if k not in ("tasks", "stds")}
        numbers[name] = parts({"task": name, "std": std} | choices, partial(_of_task, name, std, size))
        yield numbers


def _of_task(name: str, std: float, size: Size) -> dict[str, Any]:
    longest = size.horizons[-1]
    task = _task(name, longest)
    runs = {what: jax.jit(partial(_calls, what=what, std=std, starts=size.starts)) for what in ESTIMATORS}
    found: dict[str, list] = {}
    for T in size.horizons:
        masked = reweighted(task, (jnp.arange(longest + 1) < min(T, longest)).astype(task.weights.dtype))
        for seed in range(size.seeds):
            policy = _policy(task, size.hidden, seed)
            keys = jax.random.split(jax.random.fold_in(jax.random.key(100 + seed), T), size.calls)
            for run in runs.values():
                for what, x in run(policy, masked, keys).items():
                    found.setdefault(what, []).append(np.asarray(x))
    shape = (len(size.horizons), size.seeds)
    out = {what: np.reshape(np.stack(x), (*shape, *x[0].shape)) for what, x in found.items()}
    # Weights of the longest horizon alone.
    out |= {what: x[-1] for what, x in out.items() if what.startswith("weight")}
    return {"horizons": size.horizons} | out


def _calls(policy: Any, task: Any, keys: Any, *, what: str, std: float, starts: int) -> dict[str, Any]:
    inner = ESTIMATORS[what]
    smoothed = Smoothed(inner, std=std)

    def call(key):
        key_s, key = jax.random.split(key)
        s0 = task.starts(key_s, starts)
        gradient = ravel_pytree(smoothed(policy, task, s0, key)[1])[0]
        weights = inner.weights(smoothed.around(policy, task), task, s0, key) if what in WEIGHED else None
        return gradient, weights

    gradients, weights = jax.vmap(call)(keys)
    out = {f"variance, {what}": jnp.sum(jnp.var(gradients, axis=0, ddof=1))}
    return out if weights is None else out | {f"weight, {what}": jnp.mean(weights, axis=0)}


def conclude(numbers: Any) -> str:
    """Growth, crossing, and how far the mixtures stay below the better of the two; medians over seeds."""
    return " ".join(_sentence(name, found) for name, found in numbers.items())


def _sentence(name: str, found: Any) -> str:
    T = found["horizons"]
    pathwise, score = (array(found[f"variance, {what}"]) for what in (PATHWISE, SCORE))
    best = np.minimum(pathwise, score)
    above = np.median(pathwise, axis=1) > np.median(score, axis=1)
    crossed = f"from T = {T[int(np.argmax(above))]} on" if above[-1] else f"not even at T = {T[-1]}"
    ratios = {what: np.median(array(found[f"variance, {what}"]) / best, axis=1) for what in MIXED}
    worst = {what: np.max(array(found[f"variance, {what}"]) / best) for what in MIXED}
    mixed = "; ".join(
        f"{what} {np.min(r):.2g} to {np.max(r):.2g} ({r[-1]:.2g} at T = {T[-1]}, in the worst case {worst[what]:.2g})"
        for what, r in ratios.items()
    )
    weights = {what: np.median(array(found[f"weight, {what}"]), axis=0) for what in WEIGHED}
    early = ", ".join(f"{what} {w[0]:.1g} at the first and {w[-1]:.2g} at the last" for what, w in weights.items())
    order = sorted(MIXED, key=lambda what: float(np.mean(np.log(ratios[what]))))
    return (
        f"{name}, medians over seeds, T = {T[0]} to {T[-1]}: the pathwise variance goes from {np.median(pathwise[0]):.1e} "
        f"to {np.median(pathwise[-1]):.1e}, the score function's from {np.median(score[0]):.1e} to {np.median(score[-1]):.1e}; "
        f"pathwise has the larger one {crossed}. As multiples of the smaller of the two: {mixed}; on average over the horizons "
        f"{order[0]} is lowest, {order[-1]} highest. Pathwise weights at T = {T[-1]}: {early} step."
    )


STYLES = {what: style_of(what, index=i) for i, what in enumerate(ESTIMATORS)}


def paint(numbers: Any) -> Any:
    """A row for each task: variance against T, mixtures against the better of the two, weights over time."""
    figure, axes = sheet(len(numbers), (1.2, 1.2, 1.2))
    heading(figure, "Variance of policy gradients against the horizon: pathwise, score function, and mixtures of both")
    for row, (name, found) in zip(axes, numbers.items(), strict=True):
        T = found["horizons"]
        _variances(row[0], T, found)
        title(row[0], f"{name}: variance of a call")
        _ratios(row[1], T, found)
        title(row[1], "mixtures against the better of both")
        _weights(row[2], found)
        title(row[2], f"pathwise weights, T = {T[-1]}")
    return figure


def _variances(axis: Any, T: Any, found: Any) -> None:
    values = {what: array(found[f"variance, {what}"]) for what in ESTIMATORS}
    _horizons(axis, T)
    log_limits(axis, "y", list(values.values()))
    axis.set_ylabel("variance, summed over parameters")
    name_ends(axis, [band(axis, STYLES[what], T, y) for what, y in values.items()])


def _ratios(axis: Any, T: Any, found: Any) -> None:
    best = np.minimum(*(array(found[f"variance, {what}"]) for what in (PATHWISE, SCORE)))
    values = {what: array(found[f"variance, {what}"]) / best for what in MIXED}
    _horizons(axis, T)
    log_limits(axis, "y", [*values.values(), np.ones(1)])
    axis.axhline(1.0, color="0.6", linewidth=0.8)
    axis.set_ylabel("variance / smaller of the two")
    name_ends(axis, [band(axis, STYLES[what], T, y) for what, y in values.items()])


def _weights(axis: Any, found: Any) -> None:
    axis.set_xlabel("time step t")
    axis.set_ylabel("pathwise weight (0: score function)")
    lines = []
    for what in WEIGHED:
        y = array(found[f"weight, {what}"]).T
        lines.append(band(axis, STYLES[what], np.arange(len(y)), y))
    axis.set_ylim(-0.03, 1.03)
    name_ends(axis, lines)


def _horizons(axis: Any, T: Any) -> None:
    log_axis(axis.xaxis, (float(T[0]), float(T[-1])))
    axis.set_xticks(T, [str(t) for t in T])
    axis.set_xlabel("horizon T [steps]")
