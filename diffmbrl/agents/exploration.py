"""Exploration by noise in the actions: around a policy, and around one that plans."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from diffmbrl.core import Policy, State
from diffmbrl.planners.mpc import MPC
from diffmbrl.policies import centre_and_half


class GaussianExploration(eqx.Module):
    """A policy with normal noise of `std` half widths of the limits (or of 1 where there are none), clipped to them."""

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
    """An MPC with the same noise."""

    inner: MPC
    std: Float[Array, ""]
    is_stateful: ClassVar[bool] = True

    def start(self, task: Any) -> Any:
        return self.inner.start(task)

    def step(self, memory: Any, s: State, *, key: PRNGKeyArray | None = None) -> tuple[Array, Any]:
        a, memory = self.inner.step(memory, s, key=key)
        if key is None:
            return a, memory
        noise = jax.random.fold_in(key, 1)  # the planner folds its own into `key`
        return _noisy(a, self.std, self.inner.a_low, self.inner.a_high, noise), memory


def _noisy(a: Array, std: Array, low: Array, high: Array, key: PRNGKeyArray) -> Array:
    _, half = centre_and_half(low, high)
    return jnp.clip(a + std.astype(a.dtype) * half * jax.random.normal(key, a.shape, a.dtype), low, high)
