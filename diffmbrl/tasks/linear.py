"""Linear systems with quadratic costs, for which everything is known in closed form."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, ScalarLike

from diffmbrl.core import Box, Task, as_float
from diffmbrl.tasks.parameters import accept

STABILITY = {"stable": 0.9, "marginal": 1.0, "unstable": 1.1}


class LinearDynamics(eqx.Module):
    """s' = A s + B a."""

    A: Float[Array, "n n"] = eqx.field(converter=as_float)
    B: Float[Array, "n m"] = eqx.field(converter=as_float)

    def __call__(
        self, s: Float[Array, " n"], a: Float[Array, " m"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, " n"]:
        return self.A @ s + self.B @ a


class QuadraticReward(eqx.Module):
    """r(s, a) = -(s'Q s + a'R a) / 2."""

    Q: Float[Array, "n n"] = eqx.field(converter=as_float)
    R: Float[Array, "m m"] = eqx.field(converter=as_float)

    def __call__(self, s: Float[Array, " n"], a: Float[Array, " m"]) -> Float[Array, ""]:
        return -(s @ self.Q @ s + a @ self.R @ a) / 2


class QuadraticTerminal(eqx.Module):
    """phi(s) = -s'Q s / 2."""

    Q: Float[Array, "n n"] = eqx.field(converter=as_float)

    def __call__(self, s: Float[Array, " n"]) -> Float[Array, ""]:
        return -(s @ self.Q @ s) / 2


class NearOrigin(eqx.Module):
    """Success: the state ends within `radius` of the origin."""

    radius: float = eqx.field(static=True)

    def __call__(self, s: Float[Array, " n"]) -> Array:
        return jnp.linalg.norm(s) < self.radius


def linear_quadratic(A, B, Q, R, Q_T, *, horizon: int, dt: float, name: str = "lqr", spread: float = 1.0) -> Task:
    r"""Make a linear system with quadratic costs from its matrices.

    $$s' = A s + B a,\qquad r = -\tfrac12 (s^\top Q s + a^\top R a),\qquad \phi = -\tfrac12 s^\top Q_T s$$

    Args:
        A: Dynamics matrix of the state, shape [n, n].
        B: Dynamics matrix of the action, shape [n, m].
        Q: Cost matrix of the state, shape [n, n].
        R: Cost matrix of the action, shape [m, m].
        Q_T: Cost matrix of the last state, shape [n, n].
        horizon: Number of steps.
        dt: Duration of a step [s].
        name: Name of the task.
        spread: Half width of the box of start states.

    Returns:
        The task.

    Raises:
        ValueError: If a matrix has another shape.
    """
    A, B, Q, R, Q_T = (as_float(x) for x in (A, B, Q, R, Q_T))
    n, m = A.shape[0], B.shape[-1]
    for symbol, matrix, shape in [
        ("A", A, (n, n)),
        ("B", B, (n, m)),
        ("Q", Q, (n, n)),
        ("R", R, (m, m)),
        ("Q_T", Q_T, (n, n)),
    ]:
        if matrix.shape != shape:
            raise ValueError(f"{symbol} has shape {list(matrix.shape)}; expected {list(shape)}")
    return Task(
        name=name,
        dynamics=LinearDynamics(A, B),
        reward=QuadraticReward(Q, R),
        terminal=QuadraticTerminal(Q_T),
        initial=Box(-spread * jnp.ones(n, A.dtype), spread * jnp.ones(n, A.dtype)),
        success=NearOrigin(0.2),
        a_low=jnp.full(m, -jnp.inf, A.dtype),
        a_high=jnp.full(m, jnp.inf, A.dtype),
        horizon=horizon,
        dt=dt,
    )


def lqr(*, horizon: int = 50, dt: float = 0.1, mass: ScalarLike = 1.0) -> Task:
    r"""The double integrator: position p [m], velocity v [m/s], force a [N].

    $p' = p + dt\,v + dt^2/(2 mass)\,a$, $v' = v + dt/mass\,a$, exact for a force held constant over a step; reward
    $-dt\,(p^2 + v^2/10 + a^2/10) / 2$, terminal reward $-(p^2 + v^2)/2$. Starts in [-1, 1]^2.

    Source: Tedrake, Underactuated Robotics, chapter 8 (the linear quadratic regulator), example 1.

    Args:
        horizon: Number of steps of `dt`.
        dt: Duration of a step [s].
        mass: Mass [kg].

    Returns:
        The task.

    Raises:
        ValueError: If a parameter is not a finite positive number, or `horizon` is below 1.
    """
    (mass,) = accept("lqr", mass=mass)
    inverse = 1 / mass
    return linear_quadratic(
        [[1.0, dt], [0.0, 1.0]],
        jnp.stack([dt**2 / 2 * inverse, dt * inverse])[:, None],
        dt * jnp.diag(as_float([1.0, 0.1])),
        dt * 0.1 * jnp.eye(1, dtype=inverse.dtype),
        jnp.eye(2, dtype=inverse.dtype),
        horizon=horizon,
        dt=dt,
    )


def random_lqr(key: PRNGKeyArray, n: int, m: int, *, stability: str = "unstable", horizon: int = 50) -> Task:
    """Draw a random stabilisable linear system with random positive definite costs.

    The entries of B are independent normal numbers, which makes (A, B) controllable with probability one.

    Args:
        key: Key of the matrices.
        n: Dimension of the state.
        m: Dimension of the action.
        stability: Spectral radius of A: "stable" is .9, "marginal" 1, "unstable" 1.1.
        horizon: Number of steps.

    Returns:
        The task.

    Raises:
        ValueError: If `stability` is none of the three, or a dimension is below 1.

    >>> import jax
    >>> random_lqr(jax.random.key(0), 3, 2, stability="stable").n
    3
    """
    if stability not in STABILITY:
        raise ValueError(f"stability must be one of {', '.join(STABILITY)}, got {stability!r}")
    if min(n, m) < 1:
        raise ValueError(f"dimensions must be at least 1, got n = {n}, m = {m}")
    key_A, key_B, key_Q, key_R = jax.random.split(key, 4)
    A = jax.random.normal(key_A, (n, n), float)
    # Not jnp.linalg.eigvals, which exists on CPUs only: the singular values of a power bound the spectral radius of A.
    A = A / _spectral_radius(A) * STABILITY[stability]
    Q, R = (_random_definite(k, size) for k, size in [(key_Q, n), (key_R, m)])
    B = jax.random.normal(key_B, (n, m), float)
    return linear_quadratic(A, B, Q, R, Q, horizon=horizon, dt=1.0, name=f"lqr-{stability}-{n}x{m}")


def _random_definite(key: PRNGKeyArray, size: int) -> Array:
    X = jax.random.normal(key, (size, size), float)
    return X @ X.T / size + 0.1 * jnp.eye(size, dtype=X.dtype)


def _spectral_radius(A: Array) -> Array:
    """By Gelfand's formula, |A^k|^(1/k), with k = 2^20: squaring and rescaling, on any device."""
    log_scale = jnp.zeros((), A.dtype)
    power = A
    for i in range(20):
        norm = jnp.linalg.norm(power)
        log_scale = log_scale + jnp.log(norm) / 2**i
        power = jnp.matmul(power / norm, power / norm, precision="highest")
    return jnp.exp(log_scale + jnp.log(jnp.linalg.norm(power)) / 2**20)
