r"""Soft actor-critic as a learner: pure updates on batches of transitions, wherever those come from.

$$L_Q = \tfrac12 E\,\tfrac12\textstyle\sum_i \big(Q_i(x, u) - r - \gamma\,(1 - d)\,V(x')\big)^2,\quad
V(x') = \min_i \bar Q_i(x', u') - \alpha\log\pi(u'|x'),\quad u' \sim \pi(\cdot|x')$$
$$L_\pi = E\big[\alpha\log\pi(u|x) - \min_i Q_i(x, u)\big],\quad u \sim \pi(\cdot|x),\qquad
L_\alpha = \alpha\,E\big[-\log\pi(u|x) - \bar H\big]$$

The losses are our own and not Brax's, whose functions take flax networks, transitions with Brax's extras and a normaliser: to
use them is to wrap all three, for sixty lines saved. On the same weights, batch and noise they are equal (`tests/test_sac.py`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from diffmbrl.agents.actor import SquashedGaussian, network, sample_squashed, squashed_moments, unit
from diffmbrl.core import Task, parameter
from diffmbrl.models.buffer import Transition
from diffmbrl.nets import MLP


class SACState(NamedTuple):
    """What SAC learns."""

    actor: MLP  # features -> mean and raw deviation
    critics: MLP  # two, on a leading axis: (features, u) -> Q
    targets: MLP  # their slow copies
    log_alpha: Float[Array, "*batch"]
    moments: Any  # of Adam, for actor, critics and log alpha together


class SAC(eqx.Module):
    r"""Soft actor-critic with two critics and a learned temperature $\alpha$: `init`, `update` on a batch, `policy`, `best`.

    One Adam of rate `rate` moves actor, critics and $\log\alpha$ at once, all from their values of before, as in Brax; the
    targets follow the critics by `follow`. The temperature keeps the entropy of u (the action in [-1, 1]) near $\bar H$ =
    `entropy` times m. An episode cut off by the clock goes on in the target: only `done` ends it. Weights over time and the
    terminal reward are not seen: it maximises the sum of rewards discounted by `discount`.

    Shapes: batch `[N, ...]`. Cost: with hidden layers of width h, 16 products of N h h for each layer beyond the first.
    A batch that is not finite makes a state that is not, which `learn` refuses and counts.
    Reference: Haarnoja et al. 2018, Soft actor-critic algorithms and applications, sections 4 and 5.

    >>> from diffmbrl import tasks
    >>> task = tasks.cartpole_continuous()
    >>> learner = SAC(hidden=(16,))
    >>> state = learner.init(task, jax.random.key(0))
    >>> s, a = task.starts(jax.random.key(1), 8), jnp.zeros((8, 1))
    >>> batch = Transition(s, a, jnp.ones(8), s, jnp.zeros(8, bool), jnp.zeros(8, bool))
    >>> state, losses = learner.update(state, task, batch, jax.random.key(2))
    >>> sorted(losses)
    ['actor_loss', 'critic_loss', 'entropy', 'temperature']
    """

    rate: Float[Array, ""] = parameter(3e-4)
    discount: Float[Array, ""] = parameter(0.99)
    follow: Float[Array, ""] = parameter(0.005)
    entropy: Float[Array, ""] = parameter(-1.0)  # per action
    temperature: Float[Array, ""] = parameter(1.0)  # at first
    hidden: tuple[int, ...] = eqx.field(static=True, default=(256, 256))
    activation: Callable = eqx.field(static=True, default=jax.nn.relu)

    def init(self, task: Task, key: PRNGKeyArray) -> SACState:
        """Draw the networks."""
        key_actor, key_critics = jax.random.split(key)
        actor = network(task, hidden=self.hidden, activation=self.activation, key=key_actor)
        inputs = actor.weights[0].shape[1] + task.m
        critics = jax.vmap(lambda k: MLP.init(inputs, self.hidden, 1, key=k, activation=self.activation))(
            jax.random.split(key_critics)
        )
        log_alpha = jnp.log(self.temperature)
        parameters: Any = (actor, critics, log_alpha)
        return SACState(actor, critics, critics, log_alpha, self._rule().init(parameters))

    def policy(self, state: SACState, task: Task) -> SquashedGaussian:
        """The policy, which is stochastic given a key."""
        return SquashedGaussian.around(state.actor, task)

    def best(self, state: SACState, task: Task) -> "Mode":
        """The policy at its mode, key or not."""
        return Mode(self.policy(state, task))

    def update(
        self, state: SACState, task: Task, batch: Transition, key: PRNGKeyArray
    ) -> tuple[SACState, dict[str, Array]]:
        """One step of Adam on all three losses, and one of the targets. Raises: `ValueError` for what are streams of steps."""
        if batch.r.ndim != 1:
            raise ValueError(
                f"SAC learns from transitions [N], not from streams of steps {list(batch.r.shape)}: let it practise with "
                "Replayed() in a model and with OffPolicy on the real system; Streamed() and OnPolicy are for PPO"
            )
        (_, said), gradient = jax.value_and_grad(self.loss, has_aux=True)(
            (state.actor, state.critics, state.log_alpha), state.targets, task, batch, key
        )
        # Optax raises floats to powers of whole numbers: let it, also where a user has forbidden that to JAX.
        with jax.numpy_dtype_promotion("standard"):
            steps, moments = self._rule().update(gradient, state.moments)
        learned = (state.actor, state.critics, state.log_alpha)
        actor, critics, log_alpha = jax.tree.map(lambda x, u: x + u.astype(x.dtype), learned, steps)
        targets = jax.tree.map(lambda x, y: x + self.follow.astype(x.dtype) * (y - x), state.targets, critics)
        return SACState(actor, critics, targets, log_alpha, moments), said

    def loss(
        self, learned: tuple[MLP, MLP, Array], targets: MLP, task: Task, batch: Transition, key: PRNGKeyArray
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        r"""$L_Q + L_\pi + L_\alpha$, each with a gradient in its own third of `learned` alone."""
        actor, critics, log_alpha = learned
        fixed_actor, fixed_critics, alpha = jax.lax.stop_gradient((actor, critics, jnp.exp(log_alpha)))
        pi = self.policy(SACState(actor, critics, targets, log_alpha, None), task)
        x, x_next = (jax.vmap(task.features)(s) for s in (batch.s, batch.s_next))
        u = jax.vmap(lambda a: unit(a, task.a_low, task.a_high))(batch.a)
        key_now, key_next = jax.random.split(key)

        u_next, log_prob = _draw(fixed_actor, x_next, pi.limited, key_next)
        V_next = jnp.min(q_values(targets, x_next, u_next), axis=0) - alpha * log_prob
        y = batch.r + self.discount * jnp.where(batch.done, 0, V_next)
        critic_loss = 0.5 * jnp.mean(jnp.square(q_values(critics, x, u) - jax.lax.stop_gradient(y)))

        u_now, log_prob = _draw(actor, x, pi.limited, key_now)
        actor_loss = jnp.mean(alpha * log_prob - jnp.min(q_values(fixed_critics, x, u_now), axis=0))
        entropy = -jnp.mean(jax.lax.stop_gradient(log_prob))
        temperature_loss = jnp.exp(log_alpha) * (entropy - self.entropy * task.m)
        said = {"critic_loss": critic_loss, "actor_loss": actor_loss, "entropy": entropy, "temperature": alpha}
        return critic_loss + actor_loss + temperature_loss, said

    def _rule(self) -> optax.GradientTransformation:
        return optax.adam(self.rate)


class Mode(eqx.Module):
    """A policy without its noise."""

    policy: Any

    def __call__(self, s: Any, *, key: PRNGKeyArray | None = None) -> Float[Array, " m"]:
        return self.policy(s)


def q_values(critics: MLP, x: Float[Array, "N k"], u: Float[Array, "N m"]) -> Float[Array, "2 N"]:
    """Q of each critic."""
    return jax.vmap(lambda net: net.many(jnp.concatenate([x, u], axis=1))[:, 0])(critics)


def _draw(net: MLP, x: Float[Array, "N k"], limited: Array, key: PRNGKeyArray) -> tuple[Array, Array]:
    """u [N, m] and the logarithms of their densities [N]."""
    mean, std = squashed_moments(net.many(x))
    return sample_squashed(mean, std, jax.random.normal(key, mean.shape, mean.dtype), limited)
