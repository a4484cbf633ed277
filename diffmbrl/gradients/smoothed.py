"""Noise on the actions of a policy that has none: the objective that sampled estimators differentiate."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from diffmbrl.core import GradientEstimator, Policy, State, Task, as_float
from diffmbrl.info import EvaluationCounts
from diffmbrl.policies import Gaussian, centre_and_half


class Smoothed(eqx.Module):
    r"""Any estimator on the smoothed objective $F(\theta) = E_{w}[J(\pi_\theta + w)]$, $w_t \sim N(0, (\sigma h)^2)$.

    The inner estimator sees `Gaussian(policy, log(std h))`, with h the half width of the action limits (1 if there are none);
    the policy's own part of its gradient is returned. Every estimator estimates the gradient of the same F for the same keys,
    so their estimates can be compared; F differs from J, which is the price of smoothing.

    Args:
        inner: The estimator, of any kind.
        std: Standard deviation of the noise, in half widths of the action limits.

    Raises:
        ValueError: Without a key, or if `std` is not positive.

    Reference: Suh et al. 2022, Do differentiable simulators give better policy gradients?, section 2.

    >>> import jax
    >>> from diffmbrl import Neural, tasks
    >>> from diffmbrl.gradients import BPTT
    >>> task = tasks.pendulum(horizon=10)
    >>> key = jax.random.key(0)
    >>> J, gradient = Smoothed(BPTT(), std=0.1)(Neural.init(task, key=key), task, task.starts(key, 8), key)
    >>> J.shape
    ()
    """

    inner: GradientEstimator
    std: Float[Array, ""]

    def __init__(self, inner: GradientEstimator, *, std: float | Float[Array, ""]):
        if isinstance(std, float | int) and not std > 0:
            raise ValueError(f"std must be positive, got {std}")
        self.inner, self.std = inner, as_float(std)

    @property
    def remat(self) -> int | None:
        """The inner estimator's."""
        return self.inner.remat

    def __call__(
        self, policy: Policy, task: Task, s0: State, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, ""], PyTree]:
        J, gradient = self.inner(self.around(policy, task), task, s0, require_key(key))
        return J, gradient.mean

    def samples(
        self, policy: Policy, task: Task, s0: State, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, " B"], PyTree]:
        """Return and gradient of each start, with its own noise."""
        J, gradient = self.inner.samples(self.around(policy, task), task, s0, require_key(key))
        return J, gradient.mean

    def around(self, policy: Policy, task: Task) -> Gaussian:
        """The policy with the noise that the estimator sees."""
        _, h = centre_and_half(task.a_low, task.a_high)
        unit = Gaussian.around(policy, task, std=1.0)
        return Gaussian(policy, unit.log_std + jnp.log(self.std.astype(h.dtype) * h))

    def work(self, task: Task, batch: int) -> EvaluationCounts:
        """The inner estimator's."""
        return self.inner.work(task, batch)


def require_key(key: PRNGKeyArray | None) -> PRNGKeyArray:
    """Return the key, or raise `ValueError` if there is none."""
    if key is None:
        raise ValueError("noise needs a key: this estimator draws its actions")
    return key
