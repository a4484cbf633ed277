r"""Lyapunov exponents along a trajectory, and the horizon at which the pathwise gradient becomes the noisier one.

$$\lambda_i = \lim_{T\to\infty} \frac{1}{T\,dt} \sum_{t<T} \log |(r_t)_{ii}|,\qquad A_t Q_t = Q_{t+1} r_t$$

An orthonormal frame is carried along and re-orthonormalised at every step; the logarithms of how much it was stretched are
averaged. A plain average has an error of order 1/T, from the frame's alignment at the start and from the last turn it did not
complete. A weight that vanishes smoothly at both ends of time takes both out,

$$\hat\lambda_i = \frac{\sum_t w(u_t) \log |(r_t)_{ii}|}{dt \sum_t w(u_t)},\qquad w(u) = e^{-1/(u(1-u))},\; u \in (0, 1)$$

and converges faster than any power of 1/T for linear and quasi-periodic motion; for chaotic motion it is as good as a plain
average over somewhat less than the whole time.

Reference: Benettin et al. 1980 (QR along the trajectory); Eckmann and Ruelle 1985; Das and Yorke 2018 (the weight).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, ScalarLike

from diffmbrl.core import State, Task
from diffmbrl.diagnostics.jacobians import jacobians
from diffmbrl.diagnostics.products import products

BLOCKS = 10  # of time, for the error estimate


class Exponents(NamedTuple):
    """Lyapunov exponents per unit of time, decreasing in general (by the frame's order, which aligns with them)."""

    values: Float[Array, "*batch n"]  # weighted averages, over all but the first tenth of the time
    error: Float[Array, "*batch n"]  # standard error, from the spread between the nine remaining tenths
    running: Float[Array, "*batch T n"]  # plain averages up to each step: how they converge


def exponents(A: Float[Array, "T n n"], dt: ScalarLike, alive: Bool[Array, " T"] | None = None) -> Exponents:
    """Of a sequence of Jacobians, `dt` seconds apart (1 for exponents per step).

    With `alive`, of the steps where it is True, which come first; NaN if none is. Below 10 steps the error is NaN. A singular
    Jacobian, after the first tenth of the time, makes exponents of -inf. Cost: one QR factorisation a step.

    >>> import jax.numpy as jnp
    >>> found = exponents(jnp.tile(jnp.array([[1.0, 1.0], [0.0, 0.5]]), (1000, 1, 1)), dt=0.1)
    >>> [round(float(x), 3) for x in found.values]
    [0.0, -6.931]
    """
    return mean_exponents(products(A).growth, dt, alive)


def mean_exponents(growth: Float[Array, "T n"], dt: ScalarLike, alive: Bool[Array, " T"] | None = None) -> Exponents:
    """`exponents` of products that were factored already, from their `growth`."""
    growth = growth / dt
    steps = jnp.arange(1, growth.shape[0] + 1, dtype=growth.dtype)
    mask = jnp.ones(growth.shape[0], bool) if alive is None else alive
    count = jnp.sum(mask.astype(growth.dtype))
    growth = jnp.where(mask[:, None], growth, 0.0)
    running = jnp.cumsum(growth, axis=0) / jnp.minimum(steps, count)[:, None]
    # Time from 0 to 1 over the living steps, and of each block of it.
    u = (steps - 0.5) / count
    edges = jnp.linspace(0.0, 1.0, BLOCKS + 1, dtype=growth.dtype)
    blocks = jax.vmap(lambda low, high: _average(growth, (u - low) / (high - low)))(edges[1:-1], edges[2:])
    values = _average(growth, (u - edges[1]) / (1 - edges[1]))
    return Exponents(values, jnp.std(blocks, axis=0, ddof=1) / jnp.sqrt(blocks.shape[0]), running)


def closed_loop_exponents(policy: Any, task: Task, s0: State, key: PRNGKeyArray | None = None) -> Exponents:
    """Of the closed loop along the rollouts from `s0` [B, ...], per second; episodes count until their end.

    >>> import jax
    >>> from diffmbrl import Linear, tasks
    >>> task = tasks.pendulum(horizon=100)
    >>> closed_loop_exponents(Linear.zeros(task), task, task.starts(jax.random.key(0), 4)).values.shape
    (4, 2)
    """
    found = jacobians(policy, task, s0, key)
    return jax.vmap(lambda A, alive: exponents(A, task.dt, alive))(found.loop, found.alive[:, :-1])


def crossover(horizons: Any, pathwise: Any, score: Any) -> float:
    """The horizon beyond which the pathwise gradient's variance is the larger one, at every horizon measured from there on.

    Between the last horizon where it is not and the next, log variance is taken to be linear in log horizon; where a variance
    there is zero or infinite, it is the next. The first horizon if it is larger throughout, infinity if not at the last.
    Raises: `ValueError` if the lengths differ, horizons do not increase from above 0, or a variance is negative or NaN. An
    estimator that overflowed has infinite variance: say so with `inf`.

    >>> crossover([10, 100, 1000], [1e-4, 1.0, 1e4], [1.0, 10.0, 100.0])
    215.443469...
    """
    T, first, zeroth = (np.asarray(x, float) for x in (horizons, pathwise, score))
    if not (T.ndim == 1 and T.size and T.shape == first.shape == zeroth.shape):
        shapes = ", ".join(str(list(x.shape)) for x in (T, first, zeroth))
        raise ValueError(f"horizons and both variances must have one axis of the same length, got {shapes}")
    if not (T[0] > 0 and np.all(np.diff(T) > 0)):
        raise ValueError(f"horizons must be positive and increase, got {T.tolist()}")
    for name, variance in (("pathwise", first), ("score-function", zeroth)):
        if not np.all(variance >= 0):
            bad = int(np.argmin(variance >= 0))
            raise ValueError(f"the {name} variance must be at least 0, got {variance[bad]} at horizon {T[bad]:g}")
    below = np.flatnonzero(~(first > zeroth))
    if below.size == 0:
        return float(T[0])
    i = int(below[-1])
    if i == T.size - 1:
        return float("inf")
    ends = np.array([first[i], first[i + 1], zeroth[i], zeroth[i + 1]])
    if not (np.isfinite(ends).all() and (ends > 0).all()):
        return float(T[i + 1])
    start, end = np.log(first[i : i + 2] / zeroth[i : i + 2])
    share = -start / (end - start)
    return float(np.exp(np.log(T[i]) + share * (np.log(T[i + 1]) - np.log(T[i]))))


def _average(growth: Float[Array, "T n"], u: Float[Array, " T"]) -> Float[Array, " n"]:
    inside = (u > 0) & (u < 1)
    u = jnp.where(inside, u, 0.5)
    # exp(4) makes the largest weight 1, so that short blocks in float32 do not underflow.
    w = jnp.where(inside, jnp.exp(4 - 1 / (u * (1 - u))), 0.0)
    # Singular steps have a growth of -inf, and 0 * inf is NaN.
    return w @ jnp.where(inside[:, None], growth, 0.0) / jnp.sum(w)
