r"""What becomes of a policy's gradient, and of the policy, when the model is one whose Jacobians are tame by construction?

A recurrent network's Jacobians can be tamed, since one may choose its dynamics; those of a model must be the system's. The same
transitions, of random actions from the task's starts, are fitted by networks of about the same size:
* `plain`: the network says the next state; `plain, bounded`: the same, its weight matrices held to a norm of 1;
* `residual`: it says the change; `residual, bounded`; `residual, simplex`: its last hidden layer on simplices of 8 units;
* `GRU` and `LSTM`: they say the change, from a memory that starts empty.

Of each, in float64 and against the true system: the error of one step (a share of typical changes) and of many of its own (a
share of the states' deviation), on held-out windows; the error of its Jacobians [A, B] along true rollouts (a share of the true
ones' distance from those of a state that stays) and the largest singular value of A, in the states' deviations; the cosine of
the policy gradient through it with the true one at random policies, and the ratio of their lengths; and the true return (the
median over starts) of the policy that L-BFGS, its discounts raised to 1, makes by backpropagation through it, beside the policy
that it makes by backpropagation through the true system.
"""

from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from diffmbrl.core import Task
from diffmbrl.gradients import BPTT
from diffmbrl.methods import METHODS, solver
from diffmbrl.models import remembering
from diffmbrl.models.buffer import Transition
from diffmbrl.models.evaluate import jacobian_error, model_jacobians, step_errors
from diffmbrl.policies import Neural
from diffmbrl.render.palette import INK, MUTED
from diffmbrl.report.figures import Style, style_of
from diffmbrl.rollout import episode_returns
from diffmbrl.solve.loop import solve
from diffmbrl.tasks import make
from experiments.learned import random_windows
from experiments.model_forms import ARMS, fitted
from experiments.record import array
from experiments.sheet import heading, log_limits, sheet, title

EXPECTED = (
    "A model with bounded weights has the tamest Jacobians and wrong ones, predicts worse and yields worse policies; to say "
    "the change instead of the next state gives a better model rather than a tamer one; gates and simplices change little. The "
    "error of the Jacobians says more about the policy than the error of the prediction does."
)
TRUE = "true system"


class Size(NamedTuple):
    """How much is measured."""

    tasks: tuple[str, ...]
    arms: tuple[str, ...]
    horizon: int
    seeds: int
    episodes: int  # of `window` random actions each, that are fitted
    window: int
    units: int
    epochs: int
    policies: int  # at which gradients are compared
    starts: int
    hidden: tuple[int, ...]
    updates: int


FULL = Size(("pendulum-swingup", "cartpole-balance"), tuple(ARMS), 50, 3, 100, 50, 32, 150, 8, 128, (8, 8), 150)
QUICK = FULL._replace(
    tasks=FULL.tasks[:1],
    arms=("plain, bounded", "residual"),
    horizon=25,
    seeds=2,
    episodes=40,
    window=25,
    units=16,
    epochs=40,
    policies=4,
    starts=8,
    updates=60,
)


def measure(size: Size, parts: Any):
    """Each form of model on each task and seed, and what Adam reaches on the true system."""
    numbers: dict[str, Any] = {}
    choices = {k: v for k, v in size._asdict().items() if k not in ("tasks", "arms", "seeds")}
    for name in size.tasks:
        found: dict[str, Any] = {}
        for arm in (TRUE, *size.arms):
            rows = [
                parts({"task": name, "arm": arm, "seed": seed} | choices, partial(_arm, name, arm, seed, size))
                for seed in range(size.seeds)
            ]
            found[arm] = {k: [row[k] for row in rows] for k in rows[0]}
        numbers[name] = found
        yield numbers


def _arm(name: str, arm: str, seed: int, size: Size) -> dict[str, Any]:
    task = make(name, horizon=size.horizon)
    keys = jax.random.split(jax.random.key(seed), 6)
    policies = [Neural.init(task, hidden=size.hidden, key=k) for k in jax.random.split(keys[0], size.policies)]
    s0, test_starts = task.starts(keys[1], size.starts), task.starts(keys[2], 256)
    if arm == TRUE:
        policy = _improved(policies[0], task, task, s0, size.updates)
        before = _typical(policies[0], task, test_starts)
        return {"return": _typical(policy, task, test_starts), "return before": before}
    seen, test = (random_windows(task, k, episodes=size.episodes, length=size.window) for k in keys[3:5])
    f = fitted(ARMS[arm], task, seen, keys[5], units=size.units, epochs=size.epochs)
    model = remembering(task, f) if ARMS[arm].remembers else eqx.tree_at(lambda t: t.dynamics, task, f)
    start = jax.vmap(f.start)(s0) if ARMS[arm].remembers else s0
    found = _judged(f, task.dynamics, test, size.window // 2)
    true = _gradients(policies, task, s0)
    mine = _gradients([_seeing(pi, model) for pi in policies], model, start)
    lengths = [np.linalg.norm(x, axis=1) for x in (mine, true)]
    policy = _improved(_seeing(policies[0], model), task, model, start, size.updates)
    return found | {
        "cosine": np.sum(mine * true, axis=1) / (lengths[0] * lengths[1]),
        "ratio": lengths[0] / lengths[1],
        "return": _typical(policy, task, test_starts),
        "return in the model": _typical(_seeing(policy, model), model, start),
    }


@partial(jax.jit, static_argnames="steps")
def _judged(f: Any, true: Any, test: Transition, steps: int) -> dict[str, Any]:
    """Errors on windows that were not fitted."""
    s, a = test.s, test.a
    flat_s, flat_a = s.reshape(-1, s.shape[2]), a.reshape(-1, a.shape[2])
    deviation = jnp.std(flat_s, axis=0)
    change = jnp.sqrt(jnp.mean((test.s_next - s).reshape(flat_s.shape) ** 2, axis=0))
    every = jnp.arange(0, len(flat_s), max(1, len(flat_s) // 500))
    F = jax.vmap(lambda s, a: model_jacobians(f, s, a)[:, : s.shape[0]])(flat_s[every], flat_a[every])
    A = jax.vmap(lambda s, a: model_jacobians(true, s, a)[:, : s.shape[0]])(flat_s[every], flat_a[every])

    def largest(F):
        return jnp.mean(jnp.linalg.norm(F * deviation / deviation[:, None], 2, axis=(1, 2)))

    scale = jnp.concatenate([deviation, jnp.std(flat_a, axis=0)])
    return {
        "one step": step_errors(f, s[:, :2], a[:, :1], change)[0],
        "many steps": step_errors(f, s[:, : steps + 1], a[:, :steps], deviation)[-1],
        "Jacobian": jacobian_error(f, true, flat_s[every], flat_a[every], scale),
        "largest": largest(F),
        "largest, true": largest(A),
    }


def _seeing(policy: Neural, task: Task) -> Neural:
    """The policy with the features of the task's states."""
    return eqx.tree_at(lambda p: p.features, policy, task.features)


@jax.jit
def _gradient(policy: Any, task: Task, s0: Any) -> jax.Array:
    return ravel_pytree(BPTT()(policy, task, s0, None)[1].net)[0]


def _gradients(policies: list[Any], task: Task, s0: Any) -> np.ndarray:
    return np.stack([_gradient(pi, task, s0) for pi in policies])


def _improved(policy: Neural, task: Task, model: Task, s0: Any, updates: int) -> Neural:
    """L-BFGS with discounts through the model; for the true system."""
    lbfgs = solver(METHODS["lbfgs"], model, rate=None, steps=updates, continuation="discounts")
    return _seeing(solve(lbfgs, policy, model, s0, None, updates)[0], task)


@jax.jit
def _typical(policy: Any, task: Task, s0: Any) -> jax.Array:
    """The median return over starts: of those that leave the track, a few would be all there is to a mean."""
    return jnp.median(episode_returns(policy, task, s0, None, remat=None))


def conclude(numbers: Any) -> str:
    """Medians over seeds for each form, and which error goes with the policy's cost."""
    return " ".join(_sentence(name, found) for name, found in numbers.items())


def _sentence(name: str, found: Any) -> str:
    arms = [arm for arm in found if arm != TRUE]
    if not arms:
        return f"{name}: nothing yet."

    def middle(arm: str, what: str) -> float:
        return float(np.median(array(found[arm][what])))

    truth, before = -middle(TRUE, "return"), -middle(TRUE, "return before")
    said = [
        f"{arm} {middle(arm, 'one step'):.2g}, {middle(arm, 'many steps'):.2g}, {middle(arm, 'Jacobian'):.2g}, "
        f"{middle(arm, 'largest'):.2f}, {middle(arm, 'cosine'):.3f}, {-middle(arm, 'return'):.3g} "
        f"({-middle(arm, 'return in the model'):.2g})"
        for arm in arms
    ]
    cost = np.concatenate([-array(found[arm]["return"]) for arm in arms])
    ranks = {
        what: _rank_correlation(np.concatenate([array(found[arm][what]) for arm in arms]), cost)
        for what in ("one step", "many steps", "Jacobian")
    }
    tamest = min(arms, key=lambda arm: middle(arm, "largest"))
    best = min(arms, key=lambda arm: -middle(arm, "return"))
    return (
        f"{name}, medians over seeds; cost is minus the typical true return, {truth:.3g} by the true system and {before:.3g} "
        f"before. Error of one step, of many, of the Jacobians, largest singular value of A (true: "
        f"{middle(arms[0], 'largest, true'):.2f}), cosine with the true gradient, cost (and in the model's eyes): "
        f"{'; '.join(said)}. The tamest Jacobians are those of {tamest}, the best policy that of {best}. Rank correlation with "
        "the cost, over all: " + ", ".join(f"{what} {value:.2f}" for what, value in ranks.items()) + "."
    )


def _rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's."""
    ranks = np.stack([np.argsort(np.argsort(z)).astype(float) for z in (x, y)])
    return float(np.corrcoef(ranks)[0, 1])


PANELS = (
    ("one step", "error of a step / typical change"),
    ("many steps", "error of many steps / states' deviation"),
    ("Jacobian", "error of the Jacobians"),
    ("largest", "largest singular value of A"),
    ("cosine", "cosine with the true policy gradient"),
    ("cost", "true cost of the policy it yields"),
)


def paint(numbers: Any) -> Any:
    """A row for each task, a panel for each measure, a line of points for each form of model."""
    figure, axes = sheet(len(numbers), (0.05, 0.05, 0.05, 0.05, 0.05, 1.25))
    heading(
        figure, "Models of the same data, tamed and not: what they predict, their Jacobians, gradients and policies"
    )
    for row, (name, found) in zip(axes, numbers.items(), strict=True):
        arms = [arm for arm in found if arm != TRUE]
        if not arms:
            continue
        styles = [style_of(arm, index=i) for i, arm in enumerate(arms)]
        cost = {arm: {"cost": -array(found[arm]["return"])} for arm in found}
        for axis, (what, label) in zip(row, PANELS, strict=True):
            values = [array((found[arm] | cost[arm])[what]).reshape(-1) for arm in arms]
            _points(axis, styles, values)
            axis.set_xlabel(label)
            lines = {
                "largest": [("true", array(found[arms[0]]["largest, true"]))],
                "cost": [(TRUE, cost[TRUE]["cost"]), ("before", -array(found[TRUE]["return before"]))],
                "cosine": [("", np.ones(1))],
            }.get(what, [])
            if what == "cosine":
                axis.set_xlim(-1.05, 1.08)
            else:
                log_limits(axis, "x", [*values, *(x for _, x in lines)])
            for text, x in lines:
                axis.axvline(np.median(x), color=MUTED, linewidth=0.9, linestyle="--")
                axis.text(np.median(x), -0.62, text, fontsize=7.5, color=MUTED, ha="center", va="center")
        title(row[0], name)
        for i, style in enumerate(styles):
            row[-1].text(
                1.04,
                i,
                style.label,
                transform=row[-1].get_yaxis_transform(),
                color=style.colour,
                fontsize=8.5,
                va="center",
            )
    return figure


def _points(axis: Any, styles: list[Style], values: list[np.ndarray]) -> None:
    """All values of each form on a line of its own, and their median."""
    for i, (style, x) in enumerate(zip(styles, values, strict=True)):
        kept = x[np.isfinite(x)]
        axis.plot(
            kept, np.full(len(kept), i), style.marker, color=style.colour, markersize=4, alpha=0.5, markeredgewidth=0
        )
        if len(kept):
            axis.plot([np.median(kept)] * 2, [i - 0.3, i + 0.3], color=INK, linewidth=1.6)
    axis.set_ylim(len(styles) - 0.4, -0.9)
    axis.set_yticks([])
