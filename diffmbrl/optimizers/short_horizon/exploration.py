r"""Noise around a policy, learned together with it, and the price of its entropy.

$a = \pi(s) + \sigma(s)\,\epsilon$, $\epsilon \sim N(0, I)$, reparameterised, so that the gradient passes through it. The policy
itself is the mean, without noise. As in `Gaussian`, the noise is added after the squashing.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray

from diffmbrl.core import Policy, State, Task, is_concrete, parameter
from diffmbrl.nets import MLP
from diffmbrl.policies import centre_and_half

LOW, HIGH = -6.0, 0.5  # of log sigma, in half widths of the action limits
UNIT = 0.5 * math.log(2 * math.pi * math.e)  # entropy of a standard normal variable


class StateNoise(eqx.Module):
    r"""Noise of deviation $\sigma(s) = h\,e^{\mathrm{net}(\mathrm{features}(s))}$, h half the width of the action limits.

    The exponent is squashed into [-6, .5]: noise neither vanishes nor grows beyond the limits while its price is learned.
    Without limits h is 1.

    Args:
        net: Network, with one output for each action.
    """

    net: MLP

    @classmethod
    def init(cls, task: Task, *, std: ArrayLike, key: PRNGKeyArray) -> "StateNoise":
        """Draw noise of nearly the same deviation in all states.

        Args:
            task: Task.
            std: Deviation, in half widths of the action limits.
            key: Key of the weights.

        Returns:
            The noise.
        """
        size = jax.eval_shape(lambda s: ravel_pytree(task.features(s))[0], task.state_shape).shape[0]
        net = MLP.init(size, (16,), task.m, key=key, output_scale=0.01)
        share = (jnp.log(std) - LOW) / (HIGH - LOW)
        net = eqx.tree_at(lambda net: net.biases[-1], net, net.biases[-1] + jnp.log(share / (1 - share)))
        return cls(jax.tree.map(lambda x: x.astype(task.weights.dtype), net))

    def log_std(self, task: Task, s: State) -> Float[Array, " m"]:
        """Compute log sigma(s), in half widths."""
        return LOW + (HIGH - LOW) * jax.nn.sigmoid(self.net(ravel_pytree(task.features(s))[0]))


class Noise(eqx.Module):
    """Exploration by noise that the policy's rule learns together with the policy.

    Args:
        std: First deviation, in half widths of the action limits; it stays within (.0025, 1.6).
        entropy: Price of the noise's entropy; without one the noise fades.

    Raises:
        ValueError: If `std` is outside (.0025, 1.6).

    >>> Noise(0.1, entropy=Entropy()).entropy.target.shape
    ()
    """

    std: Float[Array, ""] = parameter(0.2)
    entropy: "Entropy | None" = None

    def __check_init__(self):
        if is_concrete(self.std) and not bool(jnp.all((self.std > math.exp(LOW)) & (self.std < math.exp(HIGH)))):
            raise ValueError(f"std must lie between .0025 and 1.6 half widths of the action limits, got {self.std}")


class Entropy(eqx.Module):
    r"""Maximum entropy with a learned temperature: policy and critic see the reward $r + \alpha\,(H(s) - \bar H)$.

    This is the Lagrangian of maximising the return under $E\,H \ge \bar H$, whose multiplier follows the constraint,
    $\log\alpha \leftarrow \log\alpha + \eta\,(\bar H - E H)$. Because $\bar H$ is subtracted, values keep the task's scale and
    neither a longer nor a shorter episode is rewarded. H is in nats, summed over the actions, in half widths of their limits.

    Args:
        temperature: First temperature $\alpha$.
        target: $\bar H$ for each action (-.3 is a deviation of .18).
        rate: $\eta$; with 0 the temperature stays.

    Raises:
        ValueError: If the temperature is not positive or the rate negative.

    Reference: Haarnoja et al. 2018, section 5 (temperature); Xing et al. 2025 (SAPO).

    >>> float(Entropy(temperature=0.1).rate) > 0
    True
    """

    temperature: Float[Array, ""] = parameter(0.01)
    target: Float[Array, ""] = parameter(-0.3)
    rate: Float[Array, ""] = parameter(0.05)

    def __check_init__(self):
        if is_concrete(self.temperature) and not bool(jnp.all(self.temperature > 0)):
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if is_concrete(self.rate) and not bool(jnp.all(self.rate >= 0)):
            raise ValueError(f"rate must not be negative, got {self.rate}")

    def bonus(self, log_std: Float[Array, " m"], log_temperature: Float[Array, ""]) -> Float[Array, ""]:
        """alpha (H - target) of one state."""
        return jnp.exp(log_temperature) * self.excess(log_std)

    def excess(self, log_std: Float[Array, " m"]) -> Float[Array, ""]:
        """The entropy above its target."""
        return jnp.sum(log_std + UNIT - self.target.astype(log_std.dtype))

    def follow(self, log_temperature: Float[Array, ""], excess: Float[Array, ""]) -> Float[Array, ""]:
        """The next log alpha, for the mean excess of the last window."""
        return log_temperature - self.rate.astype(excess.dtype) * excess


def acted(
    policy: Policy,
    spread: StateNoise | None,
    task: Task,
    s: State,
    epsilon: Float[Array, " m"] | None,
    key: PRNGKeyArray | None,
) -> tuple[Float[Array, " m"], Float[Array, " m"] | None]:
    """Evaluate a policy with exploration noise.

    Args:
        policy: Policy, the mean.
        spread: Noise, or None.
        task: Task.
        s: State.
        epsilon: Standard normal draws, or None.
        key: Key of the policy's own noise.

    Returns:
        The action, and log sigma in half widths (None without noise).
    """
    a = policy(s, key=key)
    if spread is None or epsilon is None:
        return a, None
    log_std = spread.log_std(task, s)
    return a + centre_and_half(task.a_low, task.a_high)[1] * jnp.exp(log_std) * epsilon, log_std
