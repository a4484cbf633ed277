"""The natural gradient: the length of its steps, its descent, and the policies that it takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from diffmbrl import Gaussian, Neural, mean_return, rollouts, solve, tasks
from diffmbrl.contrib import KLGrid, NaturalGradient
from diffmbrl.second_order.curvature import fisher
from tests.problems import bent, same_tree
from tests.test_curvature import BATCH, KEY, divergence


def test_the_natural_gradient_moves_by_its_radius(x64):
    task = bent(horizon=6)
    s0 = task.starts(KEY, BATCH)
    policy = Gaussian.around(Neural.init(task, hidden=[4], key=KEY), task, std=0.3)
    radius = 1e-4
    solver = NaturalGradient(radii=KLGrid(jnp.asarray([radius]), damping=jnp.asarray(1e-3)), rank=40)
    moved, _, info = jax.jit(lambda p: solver.update(p, solver.init(p, task), task, s0, key=None))(policy)
    assert info.accepted
    states = rollouts(policy, task, s0).s
    d = ravel_pytree(moved)[0] - ravel_pytree(policy)[0]
    quadratic = float(d @ fisher(policy, task, s0).product(d)) / 2
    assert float(divergence(policy, moved, states)) == pytest.approx(quadratic, rel=0.05)
    assert 0.3 * radius < quadratic < radius  # all but what the damping takes


def test_the_natural_gradient_never_falls_and_rejects_what_is_not_finite():
    task = bent(horizon=6)
    s0 = task.starts(KEY, BATCH)
    policy = Gaussian.around(Neural.init(task, hidden=[4], key=KEY), task, std=0.3)
    better, kept = solve(NaturalGradient(), policy, task, s0, None, 8)
    assert np.all(np.diff(kept.info.J) >= 0) and kept.info.J[-1] > kept.info.J[0]
    assert float(mean_return(better, task, s0)) > float(mean_return(policy, task, s0))
    solver = NaturalGradient()
    broken = s0.at[0, 0].set(jnp.nan)
    update = jax.jit(lambda s: solver.update(policy, solver.init(policy, task), task, s, key=None))
    same_policy, carry, info = update(broken)
    same_tree(same_policy, policy)
    assert not info.accepted and info.nonfinite > 0 and float(carry) == 1.0


def test_the_natural_gradient_says_what_it_needs():
    task = tasks.lqr(horizon=4)
    with pytest.raises(TypeError, match="needs a Gaussian policy"):
        NaturalGradient().update(
            Neural.init(task, hidden=[4], key=KEY), jnp.ones(()), task, task.starts(KEY, BATCH), key=None
        )
