r"""A value function of state and time: the network, its scale, TD($\lambda$) targets and how it is fitted to them."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from diffmbrl.core import State, Task
from diffmbrl.nets import MLP

LIMIT = 6.0  # deviations of symlog of the targets from their mean, beyond which none of them was


class Critic(eqx.Module):
    r"""$V(x) = \mathrm{symexp}(\mu + \varsigma\,\mathrm{net}(x))$, `x` the task's features and the share of the horizon passed.

    The network learns symlog of the targets, $\mathrm{sign}(G)\log(1 + |G|)$, at mean 0 and deviation 1: a few environments
    that have left the region of interest cost a thousand times what the others do, and must not hide the differences between
    those. `rescaled` changes $\mu$ and $\varsigma$ and no value. Least squares in symlog are biased where targets are noisy.
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
        """Draw the weights, the last layer's 0: the first windows see no slope that nobody has learned."""
        size = jax.eval_shape(lambda s: inputs(task, s, jnp.zeros((), jnp.int32)), task.state_shape).shape[0]
        net = MLP.init(size, hidden, 1, key=key, activation=activation, output_scale=0.0)
        dtype = task.weights.dtype
        return cls(jax.tree.map(lambda x: x.astype(dtype), net), jnp.zeros((), dtype), jnp.ones((), dtype))

    def __call__(self, x: Float[Array, " k"]) -> Float[Array, ""]:
        return symexp(self.mean + self.std * self.net(x)[0])

    def held(self, x: Float[Array, " k"]) -> Float[Array, ""]:
        """V with the network's output held within `LIMIT` deviations, beyond which it has no slope.

        For a critic whose moments follow its targets: in a state that an unstable system has run away to, the exponential of
        what the network makes of it would be infinite.
        """
        return symexp(self.mean + self.std * jnp.clip(self.net(x)[0], -LIMIT, LIMIT))

    def rescaled(self, mean: Float[Array, ""], std: Float[Array, ""]) -> "Critic":
        """The same values at another mean and scale of the network."""
        W, b = self.net.weights[-1] * (self.std / std), (self.std * self.net.biases[-1] + self.mean - mean) / std
        net = eqx.tree_at(lambda net: (net.weights[-1], net.biases[-1]), self.net, (W, b))
        return Critic(net, mean, std)


def symlog(x: Array) -> Array:
    """sign(x) log(1 + |x|)."""
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))


def symexp(x: Array) -> Array:
    """Its inverse, sign(x) (exp |x| - 1)."""
    return jnp.sign(x) * jnp.expm1(jnp.abs(x))


def inputs(task: Task, s: State, t: Int[Array, ""]) -> Float[Array, " k"]:
    """What the critic sees of state s at step t: the features, which tasks scale themselves, and t / T."""
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
    r"""$G_l = r_l + \gamma\,[(1 - \lambda) V(s_{l+1}) + \lambda G_{l+1}]$, $G_h = V(s_h)$; $G_l = r_l$ where an episode ends.

    `trace` is $\lambda$. What an episode ends with, its terminal reward, is in its last `r`. One stream; `vmap` for many.
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
    """Running mean and deviation of symlog G, moved by `rate` towards those given; the deviation is kept above 0."""
    G = symlog(G)
    mean = critic.mean + rate * (jnp.mean(G) - critic.mean)
    old = critic.std**2 + critic.mean**2
    second = old + rate * (jnp.mean(G**2) - old)
    floor = jnp.maximum((1e-3 * mean) ** 2, jnp.finfo(G.dtype).eps)
    return mean, jnp.sqrt(jnp.maximum(second - mean**2, floor))


def fit(
    critic: Critic,
    rule: optax.GradientTransformation,
    state: Any,
    x: Float[Array, "M k"],
    G: Float[Array, " M"],
    key: PRNGKeyArray,
    *,
    epochs: int,
    batches: int,
    factor: Float[Array, ""],
) -> tuple[Critic, Any, Float[Array, ""]]:
    """Least squares by `rule`, `epochs` times through the data in `batches` shuffled mini-batches, steps times `factor`.

    Returns the critic, the rule's state and the mean of the last epoch's losses, as a share of the variance of symlog G.
    """
    M = G.shape[0] // batches * batches
    y = (symlog(G) - critic.mean) / critic.std

    def loss(net, x, y):
        return jnp.mean(jnp.square(jax.vmap(net)(x)[:, 0] - y)) / 2

    def step(carry, chosen):
        net, state = carry
        value, gradient = jax.value_and_grad(loss)(net, x[chosen], y[chosen])
        # Optax raises floats to powers of whole numbers: let it, also where a user has forbidden that to JAX.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = rule.update(gradient, state, net)
        return (jax.tree.map(lambda p, u: p + (factor * u).astype(p.dtype), net, updates), state), value

    def epoch(carry, key):
        chosen = jax.random.permutation(key, G.shape[0])[:M].reshape(batches, -1)
        return jax.lax.scan(step, carry, chosen)

    (net, state), losses = jax.lax.scan(epoch, (critic.net, state), jax.random.split(key, epochs))
    return Critic(net, critic.mean, critic.std), state, jnp.mean(2 * losses[-1])
