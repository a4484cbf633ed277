r"""Lyapunov exponents along a trajectory, and the horizon at which the pathwise gradient becomes the noisier one.

$$\lambda_i = \lim_{T\to\infty} \frac{1}{T\,dt} \sum_{t<T} \log |(r_t)_{ii}|,\qquad A_t Q_t = Q_{t+1} r_t$$

An orthonormal frame is propagated and re-orthonormalised at every step; the logarithms of its stretching are averaged. A plain
average has an error of order 1/T, from the frame's alignment at the start and from an incomplete last turn. A weight that
vanishes smoothly at both ends of the time removes both,

$$\hat\lambda_i = \frac{\sum_t w(u_t) \log |(r_t)_{ii}|}{dt \sum_t w(u_t)},\qquad w(u) = e^{-1/(u(1-u))},\; u \in (0, 1)$$

and converges faster than any power of 1/T for linear and quasi-periodic motion. For chaotic motion it is as accurate as a plain
average over somewhat less than the whole time.

Reference: Benettin et al. 1980 (QR along the trajectory); Eckmann and Ruelle 1985; Das and Yorke 2018 (the weight).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, PRNGKeyArray, ScalarLike

from diffmbrl.core import Policy, State, Task
from diffmbrl.diagnostics.jacobians import jacobians
from diffmbrl.diagnostics.products import products

BLOCKS = 10  # blocks of time for the error estimate
Numbers = ArrayLike | Sequence[int | float]


class LyapunovExponents(NamedTuple):
    """Lyapunov exponents per unit of time, in general decreasing (the frame aligns with them in this order).

    Args:
        values: Weighted averages over all but the first tenth of the time, shape [*batch, n].
        error: Standard error, from the spread between the nine remaining tenths.
        running: Plain averages up to each step, shape [*batch, T, n], which show the convergence.
    """

    values: Float[Array, "*batch n"]
    error: Float[Array, "*batch n"]
    running: Float[Array, "*batch T n"]


def lyapunov_exponents(
    A: Float[Array, "T n n"], dt: ScalarLike, alive: Bool[Array, " T"] | None = None
) -> LyapunovExponents:
    """Lyapunov exponents of a sequence of Jacobians.

    A singular Jacobian after the first tenth of the time makes exponents of -inf.

    Args:
        A: The Jacobians, shape [T, n, n].
        dt: Time between two of them, in seconds; 1 for exponents per step.
        alive: Whether each step counts, shape [T]; True for the first steps and then False. All steps by default.

    Returns:
        The exponents; NaN if no step counts. The error is NaN below 10 steps.

    Cost: one QR factorisation for each step.

    >>> import jax.numpy as jnp
    >>> found = lyapunov_exponents(jnp.tile(jnp.array([[1.0, 1.0], [0.0, 0.5]]), (1000, 1, 1)), dt=0.1)
    >>> [round(float(x), 3) for x in found.values]
    [0.0, -6.931]
    """
    return mean_exponents(products(A).growth, dt, alive)


def mean_exponents(
    growth: Float[Array, "T n"], dt: ScalarLike, alive: Bool[Array, " T"] | None = None
) -> LyapunovExponents:
    """Lyapunov exponents of matrix products that have already been factored.

    Args:
        growth: `Products.growth`, shape [T, n].
        dt: As in `lyapunov_exponents`.
        alive: As in `lyapunov_exponents`.

    Returns:
        As `lyapunov_exponents`.
    """
    growth = growth / dt
    steps = jnp.arange(1, growth.shape[0] + 1, dtype=growth.dtype)
    mask = jnp.ones(growth.shape[0], bool) if alive is None else alive
    count = jnp.sum(mask.astype(growth.dtype))
    growth = jnp.where(mask[:, None], growth, 0.0)
    running = jnp.cumsum(growth, axis=0) / jnp.minimum(steps, count)[:, None]
    # The time from 0 to 1 over the steps that count, and within each block.
    u = (steps - 0.5) / count
    edges = jnp.linspace(0.0, 1.0, BLOCKS + 1, dtype=growth.dtype)
    blocks = jax.vmap(lambda low, high: _average(growth, (u - low) / (high - low)))(edges[1:-1], edges[2:])
    values = _average(growth, (u - edges[1]) / (1 - edges[1]))
    return LyapunovExponents(values, jnp.std(blocks, axis=0, ddof=1) / jnp.sqrt(blocks.shape[0]), running)


def closed_loop_exponents(policy: Policy, task: Task, s0: State, key: PRNGKeyArray | None = None) -> LyapunovExponents:
    """Lyapunov exponents of the closed loop along rollouts, per second.

    Args:
        policy: A policy without a memory, or a plan.
        task: The task.
        s0: Start states, shape [B, ...].
        key: Key of the rollouts' noise; None for no noise.

    Returns:
        The exponents of each rollout, with a leading axis of B; an episode counts until its end.

    >>> import jax
    >>> from diffmbrl import Linear, tasks
    >>> task = tasks.pendulum(horizon=100)
    >>> closed_loop_exponents(Linear.zeros(task), task, task.starts(jax.random.key(0), 4)).values.shape
    (4, 2)
    """
    found = jacobians(policy, task, s0, key)
    return jax.vmap(lambda A, alive: lyapunov_exponents(A, task.dt, alive))(found.loop, found.alive[:, :-1])


def crossover_horizon(horizons: Numbers, pathwise: Numbers, score: Numbers) -> float:
    """The horizon beyond which the pathwise gradient has a larger variance than the score function, at all horizons measured.

    Between the last horizon at which it is not larger and the next one, log variance is interpolated linearly in log horizon.
    If one of these variances is zero or infinite, the result is the next horizon.

    Args:
        horizons: The horizons, positive and increasing.
        pathwise: Variance of the pathwise gradient at each; `inf` for one that overflowed.
        score: Variance of the score-function gradient at each.

    Returns:
        The crossover in steps: the first horizon if the pathwise variance is always larger, infinity if it is not at the last.

    Raises:
        ValueError: If the lengths differ, the horizons do not increase from above 0, or a variance is negative or NaN.

    >>> crossover_horizon([10, 100, 1000], [1e-4, 1.0, 1e4], [1.0, 10.0, 100.0])
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
    # exp(4) makes the largest weight 1, so that short blocks do not underflow in float32.
    w = jnp.where(inside, jnp.exp(4 - 1 / (u * (1 - u))), 0.0)
    # Singular steps have a growth of -inf, and 0 * inf is NaN.
    return w @ jnp.where(inside[:, None], growth, 0.0) / jnp.sum(w)
