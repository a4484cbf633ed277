"""Estimates of the gradient of a decision: a plan of one step, with noise on its action."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffmbrl.core import Task
from diffmbrl.gradients import BPTT, LeaveOneOut, LikelihoodRatio, Smoothed
from diffmbrl.policies import OpenLoop, centre_and_half
from diffmbrl.report.figures import style_of

PATHWISE, SCORE, BASELINE = "pathwise", "score function", "with baseline"
ESTIMATORS = {
    PATHWISE: BPTT(),
    SCORE: LikelihoodRatio(),
    BASELINE: LikelihoodRatio(baseline=LeaveOneOut()),
}
STYLES = {name: style_of(name, index=i) for i, name in enumerate(ESTIMATORS)}
EXACT = style_of("exact", index=6)._replace(colour="#6a737d")


def estimates(
    estimator: Any, task: Task, thetas: Any, *, std: float, s0: Any, samples: int, repeats: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Mean return, mean gradient and variance of one sample of it, each [len(thetas), repeats], from batches of `samples`.

    `s0` is the one start.
    """
    roots = jax.random.split(jax.random.key(seed), len(thetas))
    noisy, start = with_noise(estimator, task, std=std), jnp.asarray(s0, task.a_low.dtype)
    # One theta after another: all samples of all of them would fill the memory.
    found = [
        jax.tree.map(
            np.asarray, _batches(noisy, task, jnp.asarray(theta), start, jax.random.split(root, repeats), samples)
        )
        for theta, root in zip(thetas, roots, strict=True)
    ]
    return {name: np.stack([x[i] for x in found]) for i, name in enumerate(("J", "mean", "variance"))}


@partial(jax.jit, static_argnames="samples")
def _batches(noisy: Smoothed, task: Task, theta: Any, s0: Any, keys: Any, samples: int) -> tuple[Any, Any, Any]:
    plan, starts = OpenLoop(jnp.reshape(theta, (1, 1))), jnp.broadcast_to(s0, (samples, task.n))

    def batch(key):
        J, gradient = noisy.samples(plan, task, starts, key)
        g = gradient.a[:, 0, 0]
        return jnp.mean(J), jnp.mean(g), jnp.var(g, ddof=min(1, samples - 1))

    return jax.lax.map(batch, keys)


def with_noise(estimator: Any, task: Task, *, std: Any) -> Smoothed:
    """The estimator of a plan's gradient under noise of this standard deviation (of each action), in the action's units."""
    half = centre_and_half(task.a_low, task.a_high)[1]
    return Smoothed(estimator, std=std / half)
