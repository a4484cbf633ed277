"""Problems with known answers: linear-quadratic ones, solved here by numpy, and a small nonlinear one.

Nothing of what is tested computes an answer: the Riccati recursion below is the textbook's, written apart from the library's.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from diffmbrl import Neural, Task, tasks
from diffmbrl.core import Box


class Riccati(NamedTuple):
    """The optimum of a linear-quadratic task: a_t = K_t s, J = -s_0' P s_0 / 2."""

    K: np.ndarray  # [T, m, n]
    P: np.ndarray  # [n, n], the cost to go at t = 0

    def J(self, s0: Any) -> np.ndarray:
        """The return from one start or from each of a batch."""
        s0 = np.asarray(s0)
        return -np.einsum("...i,ij,...j->...", s0, self.P, s0) / 2


def matrices(task: Task) -> tuple[np.ndarray, ...]:
    """A, B, Q, R, Q_T of a linear-quadratic task."""
    parts = (task.dynamics.A, task.dynamics.B, task.reward.Q, task.reward.R, task.terminal.Q)
    return tuple(np.asarray(x, np.float64) for x in parts)


def riccati(task: Task) -> Riccati:
    """Backwards in time from P = Q_T, with the task's weights."""
    A, B, Q, R, Q_T = matrices(task)
    w = np.asarray(task.weights, np.float64)
    P, gains = w[-1] * Q_T, []
    for t in reversed(range(task.horizon)):
        K = -np.linalg.solve(w[t] * R + B.T @ P @ B, B.T @ P @ A)
        closed = A + B @ K
        P = w[t] * (Q + K.T @ R @ K) + closed.T @ P @ closed
        gains.append(K)
    return Riccati(np.stack(gains[::-1]), P)


def stationary_gain(task: Task) -> np.ndarray:
    """K of the infinite horizon, by scipy's solver of the algebraic Riccati equation."""
    A, B, Q, R, _ = matrices(task)
    P = scipy.linalg.solve_discrete_are(A, B, Q, R)
    return -np.linalg.solve(R + B.T @ P @ B, B.T @ P @ A)


def optimal_actions(task: Task, s0: Any) -> np.ndarray:
    """[T, m]: what Riccati's gains do from one start."""
    A, B, *_ = matrices(task)
    s, actions = np.asarray(s0, np.float64), []
    for K in riccati(task).K:
        actions.append(K @ s)
        s = A @ s + B @ actions[-1]
    return np.stack(actions)


def gaussian_return(task: Task, K: Any, b: Any, std: Any, s0: Any) -> jax.Array:
    """E[J] from s0 of a linear-quadratic task under a_t = K_t s + b_t + std_t eps, by propagating mean and covariance.

    K [T, m, n], b and std [T, m], or without the axis of T. Nothing is sampled, so `jax.grad` of it is the exact gradient.
    """
    A, B, Q, R, Q_T = matrices(task)
    m, w = B.shape[1], task.weights
    K, b, std = (jnp.broadcast_to(x, (task.horizon, *shape)) for x, shape in [(K, B.T.shape), (b, (m,)), (std, (m,))])

    def quadratic(matrix, mean, covariance):
        return -(mean @ matrix @ mean + jnp.sum(matrix * covariance)) / 2

    mean, covariance, J = jnp.asarray(s0, K.dtype), jnp.zeros_like(A), 0.0
    for t in range(task.horizon):
        noise = jnp.diag(std[t] ** 2)
        action, spread = K[t] @ mean + b[t], K[t] @ covariance @ K[t].T + noise
        J = J + w[t] * (quadratic(Q, mean, covariance) + quadratic(R, action, spread))
        closed = A + B @ K[t]
        mean, covariance = A @ mean + B @ action, closed @ covariance @ closed.T + B @ noise @ B.T
    return J + w[-1] * quadratic(Q_T, mean, covariance)


def z_scores(samples: Any, expected: Any) -> np.ndarray:
    """How many standard errors the mean of independent samples [N, ...] is from what is expected of it, entry by entry."""
    x = np.asarray(samples, np.float64).reshape(len(samples), -1)
    return (x.mean(0) - np.ravel(expected)) / (x.std(0, ddof=1) / np.sqrt(len(x)))


def _random(n: int, m: int, stability: str, seed: int, horizon: int) -> Task:
    return tasks.random_lqr(jax.random.key(seed), n, m, stability=stability, horizon=horizon)


# Made when called, so that a test chooses their precision.
LINEAR: dict[str, Callable[..., Task]] = {
    "double integrator": lambda horizon=20: tasks.lqr(horizon=horizon),
    "stable 12x4": lambda horizon=20: _random(12, 4, "stable", 0, horizon),
    "marginal 5x2": lambda horizon=20: _random(5, 2, "marginal", 1, horizon),
    "unstable 3x1": lambda horizon=20: _random(3, 1, "unstable", 2, horizon),
    "unstable 12x4": lambda horizon=20: _random(12, 4, "unstable", 3, horizon),
}


# A small nonlinear problem: a pendulum whose force fades with its speed, whose reward is neither concave nor separable.


class Bent(eqx.Module):
    mass: Any = eqx.field(default_factory=lambda: jnp.asarray(0.8, float))
    noise: Any = eqx.field(default_factory=lambda: jnp.asarray(0.0, float))

    def __call__(self, s, a, *, key=None):
        drawn = jnp.zeros((), s.dtype) if key is None else jax.random.normal(key, (), s.dtype)
        rate = s[1] + 0.2 * jnp.sin(s[0]) + 0.3 * a[0] * jnp.cos(s[1]) / self.mass + self.noise * drawn * s[0]
        return jnp.stack([s[0] + 0.2 * rate, rate])


class BentReward(eqx.Module):
    scale: Any = eqx.field(default_factory=lambda: jnp.asarray(1.0, float))

    def __call__(self, s, a):
        return self.scale * (jnp.cos(s[0]) - 0.1 * s[1] ** 2 - 0.1 * a[0] ** 2 - 0.1 * a[0] * s[0])


class BentTerminal(eqx.Module):
    """With a kink of 100, the value is finite and its derivative is not: the square root's at 0, times 0."""

    kink: Any = eqx.field(default_factory=lambda: jnp.asarray(-100.0, float))

    def __call__(self, s):
        return 2 * jnp.cos(s[0]) - 0.3 * s[1] ** 2 + 0.01 * jnp.sqrt(jnp.maximum(s[1] - self.kink, 0))


class Beyond(eqx.Module):
    def __call__(self, s):
        return jnp.abs(s[0]) > 1.3


def bent(*, horizon: int = 8, ends: bool = False) -> Task:
    """Best upright, at (0, 0); `ends` past an angle of 1.3."""
    return Task(
        name="bent", dynamics=Bent(), reward=BentReward(), terminal=BentTerminal(), done=Beyond() if ends else None,
        initial=Box([-1.2, -0.5], [1.2, 0.5]), a_low=[-jnp.inf], a_high=[jnp.inf], horizon=horizon, dt=0.2,
    )  # fmt: skip


def small(key: Any, starts: int) -> tuple[Neural, Task, Any]:
    """A policy of few parameters, the bent task, and start states."""
    task = bent(horizon=6)
    return Neural.init(task, hidden=[4], key=key), task, task.starts(key, starts)


@jax.jit
def update(solver, policy, carry, task, s0):
    """One update without noise."""
    return solver.update(policy, carry, task, s0, key=None)


def some_slow(rows: Any, *slow: Any) -> list[Any]:
    """The rows of a parametrisation, of which some are slow: another row or file would show the same fault."""
    unknown = set(slow) - set(rows)
    assert not unknown, unknown
    return [pytest.param(row, marks=pytest.mark.slow) if row in slow else row for row in rows]


def changed(task: Task, **leaves: Any) -> Task:
    """The bent task with other numbers: `mass`, `noise`, `scale`, `kink`, `weights`."""
    where: dict[str, Callable[[Task], Any]] = {
        "mass": lambda t: t.dynamics.mass,
        "noise": lambda t: t.dynamics.noise,
        "scale": lambda t: t.reward.scale,
        "kink": lambda t: t.terminal.kink,
        "weights": lambda t: t.weights,
    }
    for name, value in leaves.items():
        task = eqx.tree_at(where[name], task, jnp.asarray(value, task.weights.dtype))
    return task


def replaced(task: Task, **parts: Any) -> Task:
    """Any task with other parts: `dynamics`, `reward`, `done` ..."""
    return eqx.tree_at(
        lambda t: [getattr(t, name) for name in parts], task, list(parts.values()), is_leaf=lambda x: x is None
    )


def lagrangian_acceleration(L, q, v, force):
    """q'' from Lagrange's equations, d/dt dL/dv - dL/dq = force, by automatic differentiation."""
    mass = jax.hessian(L, 1)(q, v)
    coriolis = jax.jacobian(jax.grad(L, 1), 0)(q, v) @ v
    return jnp.linalg.solve(mass, force + jax.grad(L, 0)(q, v) - coriolis)


same = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)


def same_tree(one: Any, other: Any, **tolerances: float) -> None:
    """Equal structures, and leaves that agree."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(lambda x, y: same(x, y, **tolerances), one, other)


def of(records, kind, **fields):
    """The records of a run of one kind, with these fields."""
    return [r for r in records if r["kind"] == kind and all(r[name] == x for name, x in fields.items())]
