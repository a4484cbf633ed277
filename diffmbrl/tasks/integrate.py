"""One step of an ordinary differential equation ds/dt = h(s, a), the action held constant."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float


def rk4(derivative: Callable, s: Float[Array, " n"], a: Float[Array, " m"], dt: float) -> Float[Array, " n"]:
    """The classical Runge-Kutta step, of order dt^4."""
    k1 = derivative(s, a)
    k2 = derivative(s + dt / 2 * k1, a)
    k3 = derivative(s + dt / 2 * k2, a)
    k4 = derivative(s + dt * k3, a)
    return s + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def semi_implicit(derivative: Callable, s: Float[Array, " n"], a: Float[Array, " m"], dt: float) -> Float[Array, " n"]:
    """Euler's step of order dt for s = (q, v), dq/dt = v: first the velocities, then the positions with the new ones.

    At a quarter of the cost of `rk4` it is less exact, but where forces depend on q alone it is symplectic: the energy swings
    about its true value and does not drift.
    """
    half = s.shape[0] // 2
    v = s[half:] + dt * derivative(s, a)[half:]
    return jnp.concatenate([s[:half] + dt * v, v])
