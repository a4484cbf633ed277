"""A step that makes the closed loop wilder is refused, whatever it earns."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from diffmbrl.core import State, Task, as_float, is_concrete
from diffmbrl.second_order.curvature import CurvatureModel, Curved
from diffmbrl.second_order.sensitivity import sensitivity, sensitivity_along


class SensitivityGate(eqx.Module):
    r"""Accept a step only if the sensitivity of the closed loop grows at most `bound` times.

    $$\sigma(\theta) = \exp \frac1B \sum_i \log \max_t m_{i,t}(\theta),\qquad \sigma(\theta + d) \le \kappa\,\sigma(\theta)$$

    with $m_{i,t}$ of `sensitivity.py`: how far noise in the actions spreads along the rollout from start i. By the return
    alone, steps over a full horizon walk into regions where the gradient is of no use, and stay there.
    `Continuation.trusted` takes the starts that go wrong out of the objective; the gate keeps the policy from going there. Its
    mean of logarithms asks for what most starts do: one that blows up adds little to it. A refused step counts as one that did
    not improve the return.

    Raises: `ValueError` if the bound is below 1.

    >>> float(SensitivityGate().bound)
    10.0
    """

    bound: Float[Array, ""]

    def __init__(self, bound: float | Array = 10.0):
        self.bound = as_float(bound)
        if is_concrete(self.bound) and not bool(self.bound >= 1):
            raise ValueError(f"bound must be at least 1, got {bound}")

    def around(
        self, policy: Any, model: Curved | CurvatureModel, task: Task, s0: State, key: PRNGKeyArray | None
    ) -> Callable[[Any], Bool[Array, ""]]:
        """Whether a policy may follow this one, of which `model` is. Cost: one rollout and its linearisation each."""
        known = isinstance(model, CurvatureModel)
        before = _size(
            sensitivity_along(model.linearization, model.K, task) if known else sensitivity(policy, task, s0, key)
        )

        def allows(policy: Any) -> Bool[Array, ""]:
            return _size(sensitivity(policy, task, s0, key)) <= before + jnp.log(self.bound.astype(before.dtype))

        return allows


def _size(m: Float[Array, "T B"]) -> Float[Array, ""]:
    """The mean logarithm of the starts' peaks; infinite where one is not finite."""
    peak = jnp.max(jnp.where(jnp.isfinite(m), m, jnp.inf), axis=0)
    return jnp.mean(jnp.log(jnp.maximum(peak, jnp.finfo(m.dtype).tiny)))
