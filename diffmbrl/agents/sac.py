r"""Soft actor-critic as a learner: pure updates on batches of transitions, real or imagined.

$$L_Q = \tfrac12 E\,\tfrac12\textstyle\sum_i \big(Q_i(x, u) - r - \gamma\,(1 - d)\,V(x')\big)^2,\quad
V(x') = \min_i \bar Q_i(x', u') - \alpha\log\pi(u'|x'),\quad u' \sim \pi(\cdot|x')$$
$$L_\pi = E\big[\alpha\log\pi(u|x) - \min_i Q_i(x, u)\big],\quad u \sim \pi(\cdot|x),\qquad
L_\alpha = \alpha\,E\big[-\log\pi(u|x) - \bar H\big]$$

The losses are our own: Brax's take flax networks, transitions with extras and a normaliser, and wrapping all three would save
sixty lines. On the same weights, batch and noise they are equal to Brax's (`tests/test_sac.py`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from diffmbrl.agents.actor import SquashedGaussian, network, sample_squashed, squashed_moments, unit
from diffmbrl.core import Policy, State, Task, parameter
from diffmbrl.models.buffer import Transition
from diffmbrl.nets import MLP


class SACState(NamedTuple):
    """The networks of SAC and its optimiser's state.

    Args:
        actor: From features to means and raw deviations.
        critics: Two networks on a leading axis, from features and u to Q.
        targets: The critics' slow copies.
        log_alpha: The logarithm of the temperature.
        moments: Adam's state for actor, critics and log_alpha together.
    """

    actor: MLP
    critics: MLP
    targets: MLP
    log_alpha: Float[Array, "*batch"]
    moments: PyTree


class SAC(eqx.Module):
    r"""Soft actor-critic with two critics and a learned temperature $\alpha$.

    One Adam moves actor, critics and $\log\alpha$ at once, all from their previous values, as in Brax. An episode cut off by
    the clock continues in the target: only `done` ends it. Weights over time and the terminal reward are ignored: it maximises
    the discounted sum of rewards.

    Args:
        rate: The learning rate.
        discount: The discount of a step.
        follow: The share of the difference by which the targets follow the critics in an update.
        entropy: The target entropy $\bar H$ of u (the action in [-1, 1]), per action dimension.
        temperature: The first value of $\alpha$.
        hidden: The widths of the hidden layers of actor and critics.
        activation: Their activation function.

    Cost: with hidden layers of width h, 16 products of N h h for each layer beyond the first, for a batch of N rows.
    A non-finite batch makes a non-finite state, which `learn` refuses and counts.
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
    entropy: Float[Array, ""] = parameter(-1.0)
    temperature: Float[Array, ""] = parameter(1.0)
    hidden: tuple[int, ...] = eqx.field(static=True, default=(256, 256))
    activation: Callable = eqx.field(static=True, default=jax.nn.relu)

    def init(self, task: Task, key: PRNGKeyArray) -> SACState:
        """Draw the networks.

        Args:
            task: The task.
            key: The random key.

        Returns:
            The state before the first update.
        """
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
        """Make the policy, which is stochastic if it is given a key.

        Args:
            state: The learner's state.
            task: The task.

        Returns:
            The policy.
        """
        return SquashedGaussian.around(state.actor, task)

    def best(self, state: SACState, task: Task) -> "Mode":
        """Make the policy without noise.

        Args:
            state: The learner's state.
            task: The task.

        Returns:
            The policy, which ignores its key.
        """
        return Mode(self.policy(state, task))

    def update(
        self, state: SACState, task: Task, batch: Transition, key: PRNGKeyArray
    ) -> tuple[SACState, dict[str, Array]]:
        """Make one step of Adam on all three losses, and one step of the targets.

        Args:
            state: The learner's state.
            task: The task.
            batch: Transitions, [N, ...].
            key: The random key.

        Returns:
            The new state, and metrics: the losses, `entropy` and `temperature`.

        Raises:
            ValueError: If the transitions have two leading axes, as streams of steps have.
        """
        if batch.r.ndim != 1:
            raise ValueError(
                f"SAC learns from transitions [N], not from streams of steps {list(batch.r.shape)}: use "
                "OffPolicy on the real system and OffPolicyPractice in a model; OnPolicy and OnPolicyPractice are for PPO"
            )
        (_, metrics), gradient = jax.value_and_grad(self.loss, has_aux=True)(
            (state.actor, state.critics, state.log_alpha), state.targets, task, batch, key
        )
        # Optax raises floats to powers of whole numbers: let it, also where a user has forbidden that to JAX.
        with jax.numpy_dtype_promotion("standard"):
            steps, moments = self._rule().update(gradient, state.moments)
        learned = (state.actor, state.critics, state.log_alpha)
        actor, critics, log_alpha = jax.tree.map(lambda x, u: x + u.astype(x.dtype), learned, steps)
        targets = jax.tree.map(lambda x, y: x + self.follow.astype(x.dtype) * (y - x), state.targets, critics)
        return SACState(actor, critics, targets, log_alpha, moments), metrics

    def loss(
        self, learned: tuple[MLP, MLP, Array], targets: MLP, task: Task, batch: Transition, key: PRNGKeyArray
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        r"""Compute $L_Q + L_\pi + L_\alpha$, where each has a gradient by its own part of `learned` only.

        Args:
            learned: Actor, critics and log_alpha.
            targets: The critics' slow copies.
            task: The task.
            batch: Transitions, [N, ...].
            key: The random key.

        Returns:
            The sum, and metrics.
        """
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
        metrics = {"critic_loss": critic_loss, "actor_loss": actor_loss, "entropy": entropy, "temperature": alpha}
        return critic_loss + actor_loss + temperature_loss, metrics

    def _rule(self) -> optax.GradientTransformation:
        return optax.adam(self.rate)


class Mode(eqx.Module):
    """A stochastic policy without its noise.

    Args:
        policy: The policy, which is called without a key.
    """

    policy: Policy

    def __call__(self, s: State, *, key: PRNGKeyArray | None = None) -> Float[Array, " m"]:
        return self.policy(s)


def q_values(critics: MLP, x: Float[Array, "N k"], u: Float[Array, "N m"]) -> Float[Array, "2 N"]:
    """Q of each critic, shape [2, N]."""
    return jax.vmap(lambda net: net.many(jnp.concatenate([x, u], axis=1))[:, 0])(critics)


def _draw(net: MLP, x: Float[Array, "N k"], limited: Array, key: PRNGKeyArray) -> tuple[Array, Array]:
    """u [N, m] and the logarithms of their densities [N]."""
    mean, std = squashed_moments(net.many(x))
    return sample_squashed(mean, std, jax.random.normal(key, mean.shape, mean.dtype), limited)
