r"""Does the bias of pathwise gradients matter in closed loop, through contacts that are made or missed?

Linear policies a = K s + b, from 0, with noise on the actions. Tennis: a ball that the racket misses falls on, a jump of
the return. Friction: a block that slips off its sled is left behind, likewise. Updates by Adam on the pathwise gradient,
the score function's (returns to go, leave-one-out baseline) and the alpha-order mixture of both, at each one's best
learning rate; the starts and the noise of every update are new.

Before training, and at the policy that the score function has found: the two gradients' means over many samples. z is the
norm of their difference over its standard error: about 1 if both are unbiased.

After Suh et al. 2022, Do Differentiable Simulators Give Better Policy Gradients, section 5; what it is silent about (court,
rewards, rates, gamma as a share of the first gradient) is chosen here.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from diffmbrl.core import Task
from diffmbrl.gradients import BPTT, LeaveOneOut, LikelihoodRatio
from diffmbrl.gradients.alpha_order import AlphaOrder
from diffmbrl.optimizers import OptaxSolver
from diffmbrl.policies import Linear
from diffmbrl.report.figures import name_ends, style_of
from diffmbrl.rollout import mean_return, rollouts
from diffmbrl.tasks import make
from experiments.decisions import with_noise
from experiments.record import array
from experiments.sheet import band, heading, log_limits, sheet, title

EXPECTED = (
    "Where a contact can be missed the pathwise gradient is biased and its policies stop short of the score function's; the "
    "mixture is no worse than the better of the two on either task."
)
PATHWISE, SCORE, MIXED = "pathwise", "score function", "alpha-order"
STYLES = {name: style_of(name, index=i) for i, name in enumerate((PATHWISE, SCORE, MIXED))}


class Size(NamedTuple):
    """How much is measured."""

    tasks: tuple[str, ...]
    std: tuple[tuple[float, ...], ...]  # of each task's actions, in their units
    samples: tuple[int, ...]  # starts in an update
    steps: tuple[int, ...]
    rates: tuple[tuple[float, ...], ...]
    seeds: int
    gamma: float  # as a share of the norm of the first gradient
    many: tuple[int, ...]  # samples of the test for bias


FULL = Size(
    ("tennis", "friction"),
    ((0.3, 0.5), (0.1,)),
    (64, 32),
    (200, 100),
    ((0.01, 0.05), (0.002, 0.01)),
    3,
    0.1,
    (10_000, 2000),
)
QUICK = Size(("tennis",), FULL.std[:1], (16,), (20,), ((0.03,),), 2, 0.1, (1000,))
LOOKS = 20


def measure(size: Size, parts: Any):
    """Training on each task, and the test for bias at both ends."""
    numbers: dict[str, Any] = {}
    for i, name in enumerate(size.tasks):
        choice = {key: x[i] for key, x in size._asdict().items() if isinstance(x, tuple)}
        choice |= {"seeds": size.seeds, "gamma": size.gamma}
        numbers[name] = parts(choice, lambda choice=choice: _measure(**choice))
        yield numbers


def _measure(*, tasks: str, std: Any, samples: int, steps: int, rates: Any, seeds: int, gamma: float, many: int) -> Any:
    task = make(tasks)
    deviation = jnp.asarray(std)
    noise = partial(with_noise, task=task, std=deviation)
    zero = Linear.zeros(task)
    score = LikelihoodRatio(baseline=LeaveOneOut())
    first = _test(noise(BPTT()), noise(score), zero, task, many)
    estimators = {
        PATHWISE: BPTT(),
        SCORE: score,
        MIXED: AlphaOrder(gamma=gamma * first["score norm"]),
    }
    found: dict[str, Any] = {"bias at the start": first, "gamma": gamma * first["score norm"]}
    ends = {}
    for name, estimator in estimators.items():
        returns, success, policies = _train(noise(estimator), task, samples, steps, jnp.asarray(rates), seeds)
        # [rates, seeds, looks]; what diverges is worst.
        final = np.median(np.nan_to_num(returns[:, :, -1], nan=-np.inf), axis=1)
        best = int(np.argmax(final))
        ends[name] = jax.tree.map(lambda x, best=best: x[best, 0], policies)
        found[name] = {"rate": rates[best], "by_rate": final, "return": returns[best].T, "success": success[best].T}
    found["step"] = np.linspace(0, steps, LOOKS + 1).round()
    found["bias at the end"] = _test(noise(BPTT()), noise(score), ends[SCORE], task, many)
    return found


@partial(jax.jit, static_argnames=("samples", "steps", "seeds"))
def _trained(noisy: Any, task: Task, samples: int, steps: int, rates: Any, seeds: int) -> Any:
    held_out, success = task.starts(jax.random.key(99), 256), cast(Callable, task.success)
    every = steps // LOOKS

    def look(policy):
        trajectories = rollouts(policy, task, held_out, remat=None)
        return mean_return(policy, task, held_out, remat=None), jnp.mean(jax.vmap(success)(trajectories.s_T))

    def run(rate, key):
        solver = OptaxSolver(optax.adam, gradient=noisy, learning_rate=rate)

        def update(carry, key):
            key_s, key_w = jax.random.split(key)
            policy, state = carry
            return solver.update(policy, state, task, task.starts(key_s, samples), key=key_w)[:2], None

        def stretch(carry, keys):
            carry, _ = jax.lax.scan(update, carry, keys)
            return carry, look(carry[0])

        policy = Linear.zeros(task)
        keys = jax.random.split(key, (LOOKS, every))
        (end, _), seen = jax.lax.scan(stretch, (policy, solver.init(policy, task)), keys)
        return jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), look(policy), seen), end

    keys = jax.random.split(jax.random.key(1), seeds)
    return jax.vmap(lambda rate: jax.vmap(lambda key: run(rate, key))(keys))(rates)


def _train(noisy: Any, task: Task, samples: int, steps: int, rates: Any, seeds: int) -> Any:
    """Returns and shares of successes without noise, [rates, seeds, looks], and the policies."""
    (returns, success), policies = _trained(noisy, task, samples, max(LOOKS, steps // LOOKS * LOOKS), rates, seeds)
    return np.asarray(returns), np.asarray(success), policies


def _test(pathwise: Any, score: Any, policy: Any, task: Task, many: int) -> dict[str, float]:
    """Means of both gradients over many samples, with the same starts and noise, and how far they differ."""
    keys = jax.random.split(jax.random.key(7), 10)
    found = [_means(pathwise, score, policy, task, many // 10, key) for key in keys]
    P, S, spread, own = (np.stack([np.asarray(row[i]) for row in found]) for i in range(4))
    P, S, error = P.mean(0), S.mean(0), np.sqrt(spread.mean() / many)
    return {
        "pathwise norm": float(np.linalg.norm(P)),
        "score norm": float(np.linalg.norm(S)),
        "cosine": float(P @ S / (np.linalg.norm(P) * np.linalg.norm(S))),
        "z": float(np.linalg.norm(P - S) / error),
        "pathwise variance": float(own.mean()),
        "variance of the difference": float(spread.mean()),
    }


@partial(jax.jit, static_argnames="count")
def _means(pathwise: Any, score: Any, policy: Any, task: Task, count: int, key: Any) -> tuple[Any, Any, Any, Any]:
    """Means of both, and the summed variances of their difference and of the pathwise one."""
    key_s, key_w = jax.random.split(key)
    s0 = task.starts(key_s, count)
    P, S = (
        jax.vmap(lambda g: ravel_pytree(g)[0])(estimator.samples(policy, task, s0, key_w)[1])
        for estimator in (pathwise, score)
    )
    return jnp.mean(P, axis=0), jnp.mean(S, axis=0), jnp.sum(jnp.var(P - S, axis=0)), jnp.sum(jnp.var(P, axis=0))


def conclude(numbers: Any) -> str:
    """Bias and final returns on each task."""
    said = []
    for name, found in numbers.items():
        ends = []
        for who in STYLES:
            final = array(found[who]["return"])[-1]
            wins = np.mean(array(found[who]["success"])[-1])
            ends.append(f"{who} {np.median(final):.3g} ({wins:.0%} of starts, rate {found[who]['rate']:g})")
        tests = []
        for when in ("start", "end"):
            test = found[f"bias at the {when}"]
            tests.append(
                f"at the {when} the pathwise gradient's mean has {test['pathwise norm'] / test['score norm']:.3g} of the "
                f"score function's norm, a cosine of {test['cosine']:.2f} with it and z = {test['z']:.3g}"
            )
        said.append(f"{name}: {'; '.join(tests)}. Median final returns (successes): {', '.join(ends)}.")
    return " ".join(said)


def paint(numbers: Any) -> Any:
    """A row for each task: cost and successes against updates."""
    figure, axes = sheet(len(numbers), (0.35, 1.2))
    heading(figure, "Linear policies through contact, by three gradients")
    for row, (name, found) in zip(axes, numbers.items(), strict=True):
        step, (cost, wins) = array(found["step"]), row
        costs = {who: -array(found[who]["return"]) for who in STYLES}
        log_limits(cost, "y", list(costs.values()))
        wins.set_ylim(-0.03, 1.03)
        for who, style in STYLES.items():
            band(cost, style, step, costs[who])
        lines = [band(wins, STYLES[who], step, array(found[who]["success"])) for who in STYLES]
        name_ends(wins, lines)
        title(cost, f"{name}: cost without noise")
        title(wins, f"{name}: share of successes")
        for axis in row:
            axis.set_xlabel("updates")
    return figure
