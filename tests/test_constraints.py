"""What a task forbids, and by how much a trajectory breaks it."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from diffmbrl import Constraints, OpenLoop, rollout, tasks
from diffmbrl.constraints import violation


class Speed(eqx.Module):
    """The second state at most .5."""

    def __call__(self, s, a):
        return s[1:] - 0.5


class Origin(eqx.Module):
    """Ends at the origin."""

    def __call__(self, s):
        return s


def test_the_worst_of_all_constraints_counts():
    task = tasks.lqr(horizon=5)
    trajectory = rollout(OpenLoop(jnp.full((5, 1), 0.3)), task, jnp.array([1.0, 0.9]), jax.random.key(0))
    speeds, end = trajectory.s[:, 1] - 0.5, trajectory.s_T
    assert violation(Constraints(), trajectory) == 0
    np.testing.assert_allclose(violation(Constraints(inequality=Speed()), trajectory), max(0, speeds.max()))
    np.testing.assert_allclose(violation(Constraints(equality=Speed()), trajectory), np.abs(speeds).max())
    np.testing.assert_allclose(violation(Constraints(final_equality=Origin()), trajectory), np.abs(end).max())
    np.testing.assert_allclose(violation(Constraints(final_inequality=Origin()), trajectory), max(0, end.max()))
    both = Constraints(inequality=Speed(), final_equality=Origin())
    np.testing.assert_allclose(violation(both, trajectory), max(speeds.max(), np.abs(end).max()))


def test_what_is_not_finite_breaks_a_constraint_without_end():
    task = tasks.lqr(horizon=5)
    trajectory = rollout(OpenLoop.zeros(task), task, jnp.array([jnp.nan, 0.0]))
    assert violation(Constraints(inequality=Speed()), trajectory) == np.inf
