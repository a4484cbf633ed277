r"""A value function of state and time: its network and scale, TD($\lambda$) targets, and the fit to them."""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from diffmbrl.core import State, Task
from diffmbrl.nets import MLP

LIMIT = 6.0  # standard deviations within which symlog of the targets lies


class Critic(eqx.Module):
    r"""A value function $V(x) = \mathrm{symexp}(\mu + \varsigma\,\mathrm{net}(x))$ of the task's features and the time passed.

    The network learns symlog of the targets, $\mathrm{sign}(G)\log(1 + |G|)$, with mean 0 and deviation 1: a few environments
    outside the region of interest cost a thousand times more than the others, and must not hide the differences between those.
    Least squares in symlog are biased where targets are noisy.

    Args:
        net: Network, with one output.
        mean: $\mu$.
        std: $\varsigma$.

    Reference: van Hasselt et al. 2016, section 2 (PopArt); Hafner et al. 2023 (symlog).

    >>> import jax
    >>> from diffmbrl import tasks
    >>> task = tasks.pendulum()
    >>> critic = Critic.init(task, hidden=(16,), key=jax.random.key(0))
    >>> critic(inputs(task, task.initial(jax.random.key(1)), jax.numpy.array(50))).shape
    ()
    """

    net: MLP
    mean: Float[Array, ""]
    std: Float[Array, ""]

    @classmethod
    def init(
        cls, task: Task, *, hidden: Sequence[int], key: PRNGKeyArray, activation: Callable = jax.nn.elu
    ) -> "Critic":
        """Draw the weights, with a last layer of 0, so that the first windows see no slope.

        Args:
            task: Task.
            hidden: Sizes of the hidden layers.
            key: Key of the weights.
            activation: Activation function.

        Returns:
            The critic.
        """
        size = jax.eval_shape(lambda s: inputs(task, s, jnp.zeros((), jnp.int32)), task.state_shape).shape[0]
        net = MLP.init(size, hidden, 1, key=key, activation=activation, output_scale=0.0)
        dtype = task.weights.dtype
        return cls(jax.tree.map(lambda x: x.astype(dtype), net), jnp.zeros((), dtype), jnp.ones((), dtype))

    def __call__(self, x: Float[Array, " k"]) -> Float[Array, ""]:
        return symexp(self.mean + self.std * self.net(x)[0])

    def held(self, x: Float[Array, " k"]) -> Float[Array, ""]:
        """V with the network's output clipped to `LIMIT` deviations, beyond which it has no slope.

        For a critic whose moments follow its targets: in a state of an unstable system that has diverged, the exponential of
        the network's output would be infinite.

        Args:
            x: Inputs of the critic.

        Returns:
            The value.
        """
        return symexp(self.mean + self.std * jnp.clip(self.net(x)[0], -LIMIT, LIMIT))

    def rescaled(self, mean: Float[Array, ""], std: Float[Array, ""]) -> "Critic":
        """Change mean and scale without changing any value.

        Args:
            mean: New mean.
            std: New scale.

        Returns:
            The critic.
        """
        W, b = self.net.weights[-1] * (self.std / std), (self.std * self.net.biases[-1] + self.mean - mean) / std
        net = eqx.tree_at(lambda net: (net.weights[-1], net.biases[-1]), self.net, (W, b))
        return Critic(net, mean, std)


def symlog(x: Array) -> Array:
    """Compute sign(x) log(1 + |x|)."""
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))


def symexp(x: Array) -> Array:
    """Compute sign(x) (exp |x| - 1), the inverse of `symlog`."""
    return jnp.sign(x) * jnp.expm1(jnp.abs(x))


def inputs(task: Task, s: State, t: Int[Array, ""]) -> Float[Array, " k"]:
    """Inputs of the critic: the features, which tasks scale themselves, and t / T.

    Args:
        task: Task.
        s: State.
        t: Time step.

    Returns:
        The inputs.
    """
    x = ravel_pytree(task.features(s))[0]
    return jnp.append(x, t.astype(x.dtype) / task.horizon)


def td_lambda(
    r: Float[Array, " h"],
    value_next: Float[Array, " h"],
    ended: Bool[Array, " h"],
    *,
    discount: Float[Array, ""],
    trace: Float[Array, ""],
) -> Float[Array, " h"]:
    r"""TD($\lambda$) targets of one stream of steps.

    $$G_l = r_l + \gamma\,[(1 - \lambda) V(s_{l+1}) + \lambda G_{l+1}],\quad G_h = V(s_h);\qquad
    G_l = r_l \text{ where an episode ends}$$

    Args:
        r: Rewards; the last of an episode contains its terminal reward.
        value_next: Values of the next states.
        ended: Whether the step ends its episode.
        discount: $\gamma$.
        trace: $\lambda$.

    Returns:
        The targets.

    Reference: Sutton and Barto 2018, section 12.1; Xu et al. 2022, equation 7.

    >>> one = jnp.ones(3)
    >>> td_lambda(one, 10 * one, jnp.array([False, True, False]), discount=jnp.array(1.0), trace=jnp.array(1.0)).tolist()
    [2.0, 1.0, 11.0]
    """

    def step(G, x):
        r, v, ended = x
        G = r + discount * jnp.where(ended, 0, (1 - trace) * v + trace * G)
        return G, G

    return jax.lax.scan(step, value_next[-1], (r, value_next, ended), reverse=True)[1]


def running_moments(critic: Critic, G: Float[Array, "..."], rate: Float[Array, ""]) -> tuple[Array, Array]:
    """Move the running mean and deviation of symlog G towards those of new targets.

    Args:
        critic: Critic with the running moments.
        G: Targets.
        rate: Share of the way.

    Returns:
        Mean and deviation; the deviation is positive.
    """
    G = symlog(G)
    mean = critic.mean + rate * (jnp.mean(G) - critic.mean)
    old = critic.std**2 + critic.mean**2
    second = old + rate * (jnp.mean(G**2) - old)
    floor = jnp.maximum((1e-3 * mean) ** 2, jnp.finfo(G.dtype).eps)
    return mean, jnp.sqrt(jnp.maximum(second - mean**2, floor))


def fit(
    critic: Critic,
    rule: optax.GradientTransformation,
    state: optax.OptState,
    x: Float[Array, "M k"],
    G: Float[Array, " M"],
    key: PRNGKeyArray,
    *,
    epochs: int,
    batches: int,
    factor: Float[Array, ""],
) -> tuple[Critic, optax.OptState, Float[Array, ""]]:
    """Fit a critic to targets by least squares in symlog.

    Args:
        critic: Critic.
        rule: Optax's rule.
        state: Its state.
        x: Inputs.
        G: Targets.
        key: Key that shuffles the data.
        epochs: Number of passes through the data.
        batches: Number of mini-batches in a pass.
        factor: Factor on all steps.

    Returns:
        The critic, the rule's state, and the mean loss of the last epoch relative to the variance of symlog G.
    """
    M = G.shape[0] // batches * batches
    y = (symlog(G) - critic.mean) / critic.std

    def loss(net, x, y):
        return jnp.mean(jnp.square(jax.vmap(net)(x)[:, 0] - y)) / 2

    def step(carry, chosen):
        net, state = carry
        value, gradient = jax.value_and_grad(loss)(net, x[chosen], y[chosen])
        # Optax raises floats to integer powers, which a user may have forbidden by JAX's strict promotion.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = rule.update(gradient, state, net)
        return (jax.tree.map(lambda p, u: p + (factor * u).astype(p.dtype), net, updates), state), value

    def epoch(carry, key):
        chosen = jax.random.permutation(key, G.shape[0])[:M].reshape(batches, -1)
        return jax.lax.scan(step, carry, chosen)

    (net, state), losses = jax.lax.scan(epoch, (critic.net, state), jax.random.split(key, epochs))
    return Critic(net, critic.mean, critic.std), state, jnp.mean(2 * losses[-1])
