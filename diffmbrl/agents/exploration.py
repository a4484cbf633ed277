"""Exploration by normal noise on the actions of a policy or of an MPC."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from diffmbrl.core import Policy, State, Task
from diffmbrl.planners.mpc import MPC
from diffmbrl.policies import centre_and_half


class GaussianExploration(eqx.Module):
    """A policy with normal noise on its actions, clipped to the limits.

    Args:
        inner: The policy.
        std: Standard deviation of the noise, in half widths of the limits; absolute for an action without limits.
        low, high: The action limits, shape [m].
    """

    inner: Policy
    std: Float[Array, ""]
    low: Float[Array, " m"]
    high: Float[Array, " m"]

    def __call__(self, s: State, *, key: PRNGKeyArray | None = None) -> Float[Array, " m"]:
        if key is None:
            return self.inner(s)
        key_inner, key_noise = jax.random.split(key)
        return _noisy(self.inner(s, key=key_inner), self.std, self.low, self.high, key_noise)


class ExploredMPC(eqx.Module):
    """An MPC with the same noise as `GaussianExploration`.

    Args:
        inner: The MPC, whose limits the actions are clipped to.
        std: Standard deviation of the noise, in half widths of the limits.
    """

    inner: MPC
    std: Float[Array, ""]
    is_stateful: ClassVar[bool] = True

    def start(self, task: Task) -> PyTree:
        """The MPC's memory before the first step of an episode."""
        return self.inner.start(task)

    def step(self, memory: PyTree, s: State, *, key: PRNGKeyArray | None = None) -> tuple[Array, PyTree]:
        """The MPC's action with noise, without if `key` is None, and its memory for the next step."""
        a, memory = self.inner.step(memory, s, key=key)
        if key is None:
            return a, memory
        noise = jax.random.fold_in(key, 1)  # the planner folds its own into `key`
        return _noisy(a, self.std, self.inner.a_low, self.inner.a_high, noise), memory


def _noisy(a: Array, std: Array, low: Array, high: Array, key: PRNGKeyArray) -> Array:
    _, half = centre_and_half(low, high)
    return jnp.clip(a + std.astype(a.dtype) * half * jax.random.normal(key, a.shape, a.dtype), low, high)
