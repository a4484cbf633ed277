r"""Do the Jacobians of single steps say whether gradients explode, or only their products?

Closed loops of random policies, weights of the last layer drawn at `scale` times the default, on a stable, an unstable and a
chaotic system, with their own dynamics and with a network fitted to them. Along each rollout, in float64:
* the largest and smallest singular value of the product $\Phi_t$ of the closed-loop Jacobians $A_t + B_t K_t$, and its spectral
  radius, none of them formed (`diagnostics/products.py`);
* the one-step spectral radii, multiplied up;
* the Lyapunov exponents by QR, with their standard error.

A seed is a policy and a start. The network is fitted to steps along noisy rollouts of the same policies, by Adam on the
scaled change of the state, where no number of it exceeds 6; its closed loop runs in the network alone.
"""

from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffmbrl.core import Task
from diffmbrl.diagnostics import (
    jacobians,
    log_singular_values,
    log_spectral_radius,
    mean_exponents,
    products,
    spectral_radius,
)
from diffmbrl.models import NetworkDynamics, Training, train
from diffmbrl.models.buffer import Transition
from diffmbrl.models.fit import holdout_split
from diffmbrl.policies import Gaussian, Neural
from diffmbrl.render.palette import INK, MUTED
from diffmbrl.report.figures import key, name_ends, style_of
from diffmbrl.rollout import rollouts
from diffmbrl.tasks import make, random_lqr
from experiments.record import array
from experiments.sheet import band, heading, sheet, title

EXPECTED = (
    "The one-step spectral radius does not predict explosion: it is above 1 where products stay bounded and says little where "
    "they explode; the products' singular values do, and grow at the rate of the largest Lyapunov exponent. Learned dynamics "
    "with small prediction errors have the same exponents."
)
SYSTEMS = {"stable": "lqr-stable-4x1", "unstable": "cartpole-balance", "chaotic": "double-pendulum"}
DYNAMICS = ("analytic", "learned")
FASTEST = 6.0  # of the numbers of a state that the network is fitted to
BATCH = 256  # steps in a gradient of the fit


class Size(NamedTuple):
    """How much is measured."""

    systems: tuple[str, ...]
    horizon: int
    scales: tuple[float, ...]
    seeds: int
    hidden: tuple[int, ...]  # of policies
    starts: int  # of the rollouts that give data, for each policy
    noise: float  # standard deviation of their actions around the policy's
    network: tuple[int, ...]
    steps: int
    rate: float


FULL = Size(tuple(SYSTEMS), 200, (1.0, 0.01), 8, (32, 32), 8, 0.3, (64, 64), 8000, 3e-3)
QUICK = FULL._replace(systems=("stable", "chaotic"), horizon=60, seeds=3, starts=2, network=(32,), steps=300)


def measure(size: Size, parts: Any):
    """Every system in turn."""
    numbers: dict[str, Any] = {}
    for kind in size.systems:
        part = {"system": kind} | {k: v for k, v in size._asdict().items() if k != "systems"}
        numbers[kind] = parts(part, partial(_system, kind, size))
        yield numbers


def _task(kind: str, horizon: int) -> Task:
    if kind == "stable":
        return random_lqr(jax.random.key(0), 4, 1, stability="stable", horizon=horizon)
    return make(SYSTEMS[kind], horizon=horizon)


def _system(kind: str, size: Size) -> dict[str, Any]:
    task = _task(kind, size.horizon)
    policies = {s: _policies(task, s, size) for s in size.scales}
    s0 = task.starts(jax.random.key(1), size.seeds)
    learned, errors = _fit(task, policies, size)
    run = jax.jit(jax.vmap(_along, in_axes=(0, None, 0)))
    out: dict[str, Any] = {"fit": errors}
    for who, f in zip(DYNAMICS, (task.dynamics, learned), strict=True):
        model = eqx.tree_at(lambda t: t.dynamics, task, f)
        out[who] = {str(scale): _summary(*run(pi, model, s0)) for scale, pi in policies.items()}
    return out


def _policies(task: Task, scale: float, size: Size) -> Any:
    draw = partial(Neural.init, task, hidden=size.hidden, output_scale=scale)
    return jax.vmap(lambda k: draw(key=k))(jax.random.split(jax.random.key(0), size.seeds))


def _along(policy: Any, task: Task, s0: Any):
    found = jacobians(policy, task, jax.tree.map(lambda x: x[None], s0)).loop[0]
    factors = products(found)
    return found, factors, log_singular_values(factors), mean_exponents(factors.growth, 1.0)


def _summary(loop: Any, factors: Any, sigma: Any, lyapunov: Any) -> dict[str, Any]:
    """Natural logarithms [times, seeds] at about 50 times, and exponents per step [seeds, n]."""
    T = loop.shape[1]
    t = np.unique(np.linspace(1, T, min(T, 50)).round().astype(int))
    one = np.log(spectral_radius(loop))
    return {
        "t": t,
        "largest": np.asarray(sigma)[:, t - 1, 0].T,
        "smallest": np.asarray(sigma)[:, t - 1, -1].T,
        "radius": log_spectral_radius(factors)[:, t - 1].T,
        "one step, summed": np.cumsum(one, axis=1)[:, t - 1].T,
        "one step above 1": np.mean(one > 1e-9, axis=1),
        "exponents": lyapunov.values,
        "error": lyapunov.error,
    }


def _fit(task: Task, policies: dict[float, Any], size: Size) -> tuple[NetworkDynamics, dict[str, float]]:
    """A network fitted by Adam, and its errors on steps held out, relative to the change of the state and of A - I."""
    starts = task.starts(jax.random.key(2), size.starts)
    gather = jax.jit(
        jax.vmap(lambda pi, k: rollouts(Gaussian.around(pi, task, std=size.noise), task, starts, k), in_axes=(0, 0))
    )
    rows = [gather(pi, jax.random.split(jax.random.key(3), size.seeds)) for pi in policies.values()]
    s, a = (np.concatenate([np.asarray(getattr(x, name)).reshape(-1, d) for x in rows]) for name, d in
            (("s", task.n), ("a", task.m)))  # fmt: skip
    # Rates that turn a rod by a radian a step are the integrator's doing; they would set the network's scales.
    kept = np.isfinite(s).all(1) & (np.abs(s) < FASTEST).all(1)
    s, a = jnp.asarray(s[kept]), jnp.asarray(a[kept])
    step = jax.vmap(lambda f, s, a: f(s, a), in_axes=(None, 0, 0))
    s_next, no = step(task.dynamics, s, a), jnp.zeros(len(s), bool)
    rows = Transition(s, a, jnp.zeros(len(s), s.dtype), s_next, no, no)
    f = NetworkDynamics.init(task, key=jax.random.key(4), hidden=size.network, activation=jnp.tanh, output_scale=1.0)
    epochs = -(-size.steps * BATCH // len(s))
    training = Training(
        _annealed, rate=size.rate, steps=size.steps, epochs=epochs, patience=epochs, batch=BATCH, bootstrap=False
    )
    one, _ = train(jax.tree.map(lambda x: x[None], f), rows, len(s), jax.random.key(5), training)
    f = jax.tree.map(lambda x: x[0], one)
    order, count = holdout_split(len(s), jnp.asarray(len(s), jnp.int32), training.holdout)
    held = order[: int(count)][:1000]
    A = jax.jit(jax.vmap(lambda f, s, a: jax.jacfwd(f)(s, a), in_axes=(None, 0, 0)))
    true, mine = (np.asarray(A(g, s[held], a[held])) for g in (task.dynamics, f))
    return f, {
        "steps of data": len(s) - int(count),
        "change": float(jnp.sqrt(jnp.mean(jax.vmap(f.loss)(s[held], a[held], s_next[held])))),
        "Jacobian": float(np.linalg.norm(mine - true) / np.linalg.norm(true - np.eye(task.n))),
    }


def _annealed(rate: Any, steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(rate, steps))


def _end(found: Any, what: str) -> np.ndarray:
    """Per step, at the last time, of the seeds that are finite throughout."""
    last = array(found[what])[-1] / found["t"][-1]
    return last[np.isfinite(last)]


def conclude(numbers: Any) -> str:
    """Rates per step for every system, from the numbers."""
    return " ".join(_sentence(kind, found) for kind, found in numbers.items())


def _sentence(kind: str, found: Any) -> str:
    said = []
    for who in DYNAMICS:
        for scale, x in found[who].items():
            product, one = _end(x, "largest"), _end(x, "one step, summed")
            first = array(x["exponents"])[:, 0]
            lost = len(first) - len(product)
            said.append(
                f"{who}, scale {scale}: log of the one-step radius {np.median(one):+.3f} a step, of the product's largest "
                f"singular value {np.median(product):+.3f} (T = {x['t'][-1]}), largest exponent "
                f"{np.nanmedian(np.where(np.isfinite(first), first, np.nan)):+.3f}"
                + (f", {lost} seeds lost" if lost else "")
            )
    fit = found["fit"]
    return (
        f"{kind} ({SYSTEMS[kind]}; the network errs by {fit['change']:.1%} in the change of the state and "
        f"{fit['Jacobian']:.1%} in its Jacobian): " + "; ".join(said) + "."
    )


def paint(numbers: Any) -> Any:
    """A row for each system: singular values of the products, radii, and what one step says against what happens."""
    figure, axes = sheet(len(numbers), (1.15, 1.15, 1.15, 0.3))
    heading(figure, "Products of closed-loop Jacobians: what explodes, and what single steps say of it")
    for row, (kind, found) in zip(axes, numbers.items(), strict=True):
        for axis, who in zip(row, DYNAMICS, strict=False):
            _over_time(axis, found[who], {"largest": "largest", "smallest": "smallest"}, "log10 of the singular value")
            title(axis, f"{kind}, {who}: product's singular values")
        _over_time(
            row[2],
            found["analytic"],
            {"radius": "of product", "one step, summed": "of steps"},
            "log10 of the spectral radius",
        )
        title(row[2], f"{kind}: radius of the product, product of radii")
        _predicted(row[3], found)
        title(row[3], f"{kind}: growth a step")
    return figure


def _over_time(axis: Any, found: Any, series: dict[str, str], ylabel: str) -> None:
    lines = []
    for i, (scale, x) in enumerate(found.items()):
        for j, (what, label) in enumerate(series.items()):
            style = style_of(f"{label}, {scale}", index=2 * i + j)
            lines.append(band(axis, style, x["t"], array(x[what]) / np.log(10), dashed=bool(i)))
    axis.axhline(0, color=MUTED, linewidth=0.8)
    axis.set_xlabel("step t")
    axis.set_ylabel(ylabel)
    name_ends(axis, lines)


def _predicted(axis: Any, found: Any) -> None:
    """Each seed: mean log of the one-step radius against the largest Lyapunov exponent."""
    entries = []
    for i, who in enumerate(DYNAMICS):
        for j, (scale, x) in enumerate(found[who].items()):
            style = style_of(f"{who}, scale {scale}", index=2 * i + j)
            one, first = array(x["one step, summed"])[-1] / x["t"][-1], array(x["exponents"])[:, 0]
            looks = {"linestyle": "none", "marker": style.marker, "markersize": 4}
            axis.errorbar(one, first, yerr=array(x["error"])[:, 0], elinewidth=0.6, color=style.colour, **looks)
            entries.append((style.label, looks))
    low, high = min(axis.get_xlim()[0], axis.get_ylim()[0]), max(axis.get_xlim()[1], axis.get_ylim()[1])
    axis.plot([low, high], [low, high], color=INK, linewidth=0.7, linestyle=":")
    axis.set_xlabel("mean log of the one-step radius")
    axis.set_ylabel("largest exponent by QR, per step")
    key(axis, entries)
