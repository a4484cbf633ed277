"""Reject steps that make the closed loop much more sensitive, even if they raise the return."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from diffmbrl.core import Policy, State, Task, as_float, is_concrete
from diffmbrl.second_order.curvature import CurvatureModel, Curved
from diffmbrl.second_order.sensitivity import sensitivity, sensitivity_along


class SensitivityGate(eqx.Module):
    r"""Accept a step only if the sensitivity of the closed loop grows at most `bound` times.

    $$\sigma(\theta) = \exp \frac1B \sum_i \log \max_t m_{i,t}(\theta),\qquad \sigma(\theta + d) \le \kappa\,\sigma(\theta)$$

    with $m_{i,t}$ of `sensitivity.py`, the spread of noise in the actions along the rollout from start i. Judged by the return
    alone, steps over a full horizon lead into regions where the gradient is useless. `Continuation.trusted` takes diverging
    starts out of the objective; the gate keeps the policy away from such regions. One diverging start adds little to the mean
    of logarithms. A rejected step counts as one that did not improve the return.

    Args:
        bound: $\kappa$, at least 1.

    Raises:
        ValueError: If the bound is below 1.

    >>> float(SensitivityGate().bound)
    10.0
    """

    bound: Float[Array, ""]

    def __init__(self, bound: ArrayLike = 10.0):
        self.bound = as_float(bound)
        if is_concrete(self.bound) and not bool(self.bound >= 1):
            raise ValueError(f"bound must be at least 1, got {bound}")

    def around(
        self, policy: Policy, model: Curved | CurvatureModel, task: Task, s0: State, key: PRNGKeyArray | None
    ) -> Callable[[Policy], Bool[Array, ""]]:
        """Build the condition on the policies that may follow `policy`.

        Args:
            policy: Current policy.
            model: Its model.
            task: Task.
            s0: Start states, leaves of shape [B, ...].
            key: Key of the noise in policy and dynamics.

        Returns:
            The condition, a function of the next policy.

        Cost: One rollout and its linearisation for each policy.
        """
        known = isinstance(model, CurvatureModel)
        before = _size(
            sensitivity_along(model.linearization, model.K, task) if known else sensitivity(policy, task, s0, key)
        )

        def allows(policy: Policy) -> Bool[Array, ""]:
            return _size(sensitivity(policy, task, s0, key)) <= before + jnp.log(self.bound.astype(before.dtype))

        return allows


def _size(m: Float[Array, "T B"]) -> Float[Array, ""]:
    """The mean logarithm of the starts' peaks; infinite if one is not finite."""
    peak = jnp.max(jnp.where(jnp.isfinite(m), m, jnp.inf), axis=0)
    return jnp.mean(jnp.log(jnp.maximum(peak, jnp.finfo(m.dtype).tiny)))
