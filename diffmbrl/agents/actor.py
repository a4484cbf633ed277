r"""The stochastic policy that SAC and PPO learn, within the action limits: $a = c + h \tanh(\mu(x) + \sigma(x)\,\epsilon)$."""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from diffmbrl.core import State, Task
from diffmbrl.nets import MLP
from diffmbrl.policies import centre_and_half

LOWEST_STD = 1e-3  # Brax's


class SquashedGaussian(eqx.Module):
    r"""Normal policy of a network's mean and deviation, squashed into the action limits.

    $$u = \tanh(\mu(x) + \sigma(x)\,\epsilon),\qquad a = c + h u,\qquad \sigma = \mathrm{softplus}(\cdot) + 10^{-3}$$

    x are the task's features, c and h the centre and half width of the limits. An action without limits is not squashed: c = 0
    and h = 1. Densities are those of u, so that an entropy does not depend on the units of the action. Without a key it returns
    the action of the mean. Only `net` is learned: learners make the policy from it and the task (`around`).

    Args:
        net: From features [k] to means and raw deviations, shape [2 m].
        features: The task's features, s -> [k].
        a_low, a_high: The action limits, shape [m].

    Reference: Haarnoja et al. 2018, Soft actor-critic algorithms and applications, appendix C.

    >>> from diffmbrl import tasks
    >>> task = tasks.cartpole_balance()
    >>> pi = SquashedGaussian.around(network(task, hidden=(16,), activation=jax.nn.relu, key=jax.random.key(0)), task)
    >>> s = task.initial(jax.random.key(1))
    >>> bool(abs(pi(s, key=jax.random.key(2))[0]) < 10)
    True
    """

    net: MLP
    features: Callable
    a_low: Float[Array, " m"]
    a_high: Float[Array, " m"]

    @classmethod
    def around(cls, net: MLP, task: Task) -> "SquashedGaussian":
        """Make the policy of a network on a task.

        Args:
            net: From features [k] to means and raw deviations, shape [2 m].
            task: The task, whose features and limits the policy holds.

        Returns:
            The policy.
        """
        return cls(net, task.features, task.a_low, task.a_high)

    def __call__(self, s: State, *, key: PRNGKeyArray | None = None) -> Float[Array, " m"]:
        z, std = squashed_moments(self.net(self.features(s)))
        if key is not None:
            z = z + std * jax.random.normal(key, z.shape, z.dtype)
        centre, half = centre_and_half(self.a_low, self.a_high)
        return centre + half * jnp.where(self.limited, jnp.tanh(z), z)

    def log_prob(self, s: State, a: Float[Array, " m"]) -> Float[Array, ""]:
        """Log density of u at an action of the task.

        Args:
            s: The state.
            a: The action, shape [m].

        Returns:
            The logarithm, shape [].
        """
        return log_density(
            *squashed_moments(self.net(self.features(s))), logit(a, self.a_low, self.a_high), self.limited
        )

    @property
    def limited(self) -> Bool[Array, " m"]:
        """Which actions have limits on both sides, shape [m]."""
        return limited(self.a_low, self.a_high)


def network(
    task: Task, *, hidden: Sequence[int], activation: Callable, key: PRNGKeyArray, output_scale: float = 0.01
) -> MLP:
    """Draw a network from the task's features to the 2 m numbers of a `SquashedGaussian`.

    Its outputs are small, so that the first policy acts near the centre of the limits.

    Args:
        task: The task.
        hidden: The widths of the hidden layers.
        activation: The activation function of the hidden layers.
        key: The random key of the weights.
        output_scale: Scale of the last layer's weights.

    Returns:
        The network.

    Raises:
        ValueError: If the features do not have one axis.
    """
    shape = jax.eval_shape(task.features, task.state_shape).shape
    if len(shape) != 1:
        raise ValueError(f"the features of task '{task.name}' have shape {list(shape)}; expected one axis")
    return MLP.init(shape[0], hidden, 2 * task.m, key=key, activation=activation, output_scale=output_scale)


def squashed_moments(outputs: Float[Array, "*N k"]) -> tuple[Float[Array, "*N m"], Float[Array, "*N m"]]:
    r"""Split the network's outputs into $\mu$ and $\sigma$ of z."""
    mean, raw = jnp.split(outputs, 2, axis=-1)
    return mean, jax.nn.softplus(raw) + LOWEST_STD


def sample_squashed(
    mean: Float[Array, "*N m"], std: Float[Array, "*N m"], noise: Float[Array, "*N m"], limited: Bool[Array, " m"]
) -> tuple[Float[Array, "*N m"], Float[Array, "*N"]]:
    """Draw u by reparameterising standard normal noise; returns u and its log density."""
    z = mean + std * noise
    return jnp.where(limited, jnp.tanh(z), z), log_density(mean, std, z, limited)


def log_density(
    mean: Float[Array, "*N m"], std: Float[Array, "*N m"], z: Float[Array, "*N m"], limited: Bool[Array, " m"]
) -> Float[Array, "*N"]:
    r"""$\log p(u) = \sum_j \log N(z_j; \mu_j, \sigma_j) - \log(1 - \tanh^2 z_j)$, the last where an action has limits."""
    normal = -0.5 * ((z - mean) / std) ** 2 - jnp.log(std) - 0.5 * np.log(2 * np.pi)
    return jnp.sum(normal - jnp.where(limited, log_slope(z), jnp.zeros_like(z)), axis=-1)


def log_slope(z: Float[Array, "*N m"]) -> Float[Array, "*N m"]:
    r"""$\log(1 - \tanh^2 z) = 2(\log 2 - z - \mathrm{softplus}(-2z))$, which does not cancel for large z."""
    return 2 * (np.log(2) - z - jax.nn.softplus(-2 * z))


def unit(a: Float[Array, "*N m"], low: Float[Array, " m"], high: Float[Array, " m"]) -> Float[Array, "*N m"]:
    """u of an action: in [-1, 1] between its limits, the action itself if it has none."""
    centre, half = centre_and_half(low, high)
    return (a - centre) / half


def logit(a: Float[Array, "*N m"], low: Float[Array, " m"], high: Float[Array, " m"]) -> Float[Array, "*N m"]:
    """z of an action; at a limit, the z of the last number before it."""
    u = unit(a, low, high)
    inside = 1 - 4 * jnp.finfo(u.dtype).eps
    return jnp.where(limited(low, high), jnp.arctanh(jnp.clip(u, -inside, inside)), u)


def limited(low: Float[Array, " m"], high: Float[Array, " m"]) -> Bool[Array, " m"]:
    """Which actions have limits on both sides."""
    return jnp.isfinite(low) & jnp.isfinite(high)


def entropy(
    mean: Float[Array, "*N m"], std: Float[Array, "*N m"], noise: Float[Array, "*N m"], limited: Bool[Array, " m"]
) -> Float[Array, "*N"]:
    r"""Entropy of u: $\sum_j \tfrac12 \log(2 \pi e \sigma_j^2) + E \log(1 - \tanh^2 z_j)$, from one draw of noise."""
    z = mean + std * noise
    squashing = jnp.where(limited, log_slope(z), jnp.zeros_like(z))
    return jnp.sum(0.5 + 0.5 * np.log(2 * np.pi) + jnp.log(std) + squashing, axis=-1)
