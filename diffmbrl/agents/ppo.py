r"""Proximal policy optimisation as a learner: pure updates on streams of its policy's own steps, real or imagined.

$$L_\pi = -E\big[\min(\varrho A,\ \mathrm{clip}(\varrho, 1 - \epsilon, 1 + \epsilon) A)\big] - \eta\,H,\qquad
\varrho = \pi_\theta(u|x) / \pi_{old}(u|x),\qquad A_t = G^\lambda_t - V(x_t)$$

Returns $G^\lambda$ and critic are those of `optimizers/short_horizon/critic.py`. The losses are our own, for the reasons
given in `sac.py`; on the same batch the policy's loss equals Brax's (`tests/test_ppo.py`) if $\lambda = 1$. Otherwise Brax's
advantage is $r + \gamma G^\lambda_{t+1} - V$, which reaches one step further than generalised advantages.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from diffmbrl.agents.actor import SquashedGaussian, entropy, limited, log_density, logit, network, squashed_moments
from diffmbrl.agents.sac import Mode
from diffmbrl.core import State, Task, parameter
from diffmbrl.models.buffer import Transition
from diffmbrl.nets import MLP
from diffmbrl.optimizers.short_horizon.critic import Critic, fit, td_lambda
from diffmbrl.optimizers.short_horizon.critic import running_moments as return_moments


class PPOState(NamedTuple):
    """The networks of PPO and its optimisers' states.

    Args:
        actor: From features to means and raw deviations.
        critic: From features to V.
        moments: Adam's state for the actor.
        critic_moments: Adam's state for the critic.
    """

    actor: MLP
    critic: Critic
    moments: PyTree
    critic_moments: PyTree


class Rows(NamedTuple):
    """Steps as the policy's loss takes them.

    Args:
        x: Features, shape [M, k].
        z: The action before squashing, shape [M, m].
        log_prob: Log density of the action under the policy that took it, shape [M].
        advantage: Shape [M].
        weight: 1, or 0 for a row that does not count, shape [M].
    """

    x: Float[Array, "M k"]
    z: Float[Array, "M m"]
    log_prob: Float[Array, " M"]
    advantage: Float[Array, " M"]
    weight: Float[Array, " M"]


class PPO(eqx.Module):
    r"""Proximal policy optimisation with a clipped surrogate and a fitted critic.

    An update passes `epochs` times through the steps, for the critic and for the actor. The streams must be steps of the policy
    given, whose densities are the reference of the ratio. The critic values an episode that the clock cuts off; only `done`
    ends it. Weights over time and the terminal reward are ignored: it maximises the discounted sum of rewards. With
    `epochs=1, batches=1, trace=1.0` the ratio is 1 and an update is one step of Adam on the likelihood-ratio gradient with the
    critic as baseline: REINFORCE (`PPO.reinforce`).

    Args:
        rate: The actor's learning rate.
        critic_rate: The critic's learning rate.
        discount: The discount of a step.
        trace: $\lambda$ of the returns.
        clip: $\epsilon$, by which the ratio may differ from 1.
        entropy: $\eta$, the weight of the entropy.
        epochs: Passes through the steps in an update.
        batches: The number of shuffled mini-batches of a pass.
        hidden: The widths of the hidden layers of actor and critic.
        activation: Their activation function.

    Cost: per epoch, a gradient of both networks at N h rows, for streams [N, h].
    A non-finite row, or one after the end of its episode, does not count. Advantages are normalised over all steps.
    Reference: Schulman et al. 2017, Proximal policy optimization algorithms, equations 7 and 11; Williams 1992.

    >>> from diffmbrl import tasks
    >>> task = tasks.cartpole_continuous()
    >>> learner = PPO(hidden=(16,), batches=2)
    >>> state = learner.init(task, jax.random.key(0))
    >>> s, a, no = task.starts(jax.random.key(1), 8), jnp.zeros((8, 1)), jnp.zeros(8, bool)
    >>> one = Transition(s, a, jnp.ones(8), s, no, no)
    >>> state, metrics = learner.update(state, task, jax.tree.map(lambda x: x[:, None], one), jax.random.key(2))
    >>> sorted(metrics)
    ['actor_loss', 'clipped', 'critic_loss', 'entropy']
    """

    rate: Float[Array, ""] = parameter(3e-4)
    critic_rate: Float[Array, ""] = parameter(1e-3)
    discount: Float[Array, ""] = parameter(0.99)
    trace: Float[Array, ""] = parameter(0.95)
    clip: Float[Array, ""] = parameter(0.2)
    entropy: Float[Array, ""] = parameter(1e-3)
    epochs: int = eqx.field(static=True, default=10)
    batches: int = eqx.field(static=True, default=32)
    hidden: tuple[int, ...] = eqx.field(static=True, default=(64, 64))
    activation: Callable = eqx.field(static=True, default=jnp.tanh)

    @classmethod
    def reinforce(cls, **fields: Any) -> "PPO":
        """Make the policy gradient: one step of Adam for each batch of streams, on whole returns minus the critic's values.

        Args:
            **fields: Fields of `PPO` that differ from REINFORCE's.

        Returns:
            The learner.
        """
        return cls(**{"epochs": 1, "batches": 1, "trace": 1.0, "rate": 1e-2} | fields)

    def init(self, task: Task, key: PRNGKeyArray) -> PPOState:
        """Draw the networks; the critic's last layer is 0.

        Args:
            task: The task.
            key: The random key.

        Returns:
            The state before the first update.
        """
        key_actor, key_critic = jax.random.split(key)
        actor: Any = network(task, hidden=self.hidden, activation=self.activation, key=key_actor)
        inputs, dtype = actor.weights[0].shape[1], task.weights.dtype
        net: Any = MLP.init(inputs, self.hidden, 1, key=key_critic, activation=self.activation, output_scale=0.0)
        critic = Critic(net, jnp.zeros((), dtype), jnp.ones((), dtype))
        return PPOState(actor, critic, optax.adam(self.rate).init(actor), optax.adam(self.critic_rate).init(net))

    def policy(self, state: PPOState, task: Task) -> SquashedGaussian:
        """Make the policy, which is stochastic if it is given a key.

        Args:
            state: The learner's state.
            task: The task.

        Returns:
            The policy.
        """
        return SquashedGaussian.around(state.actor, task)

    def best(self, state: PPOState, task: Task) -> Mode:
        """Make the policy without noise.

        Args:
            state: The learner's state.
            task: The task.

        Returns:
            The policy, which ignores its key.
        """
        return Mode(self.policy(state, task))

    def update(
        self, state: PPOState, task: Task, steps: Transition, key: PRNGKeyArray
    ) -> tuple[PPOState, dict[str, Array]]:
        """Fit the critic to the returns, and improve the actor on the advantages.

        Args:
            state: The learner's state.
            task: The task.
            steps: Streams of steps, [N, h, ...], which need not begin or end with episodes.
            key: The random key.

        Returns:
            The new state, and metrics: the losses, `entropy`, and the share `clipped` of the ratios.

        Raises:
            ValueError: If the steps are not streams, or are fewer than the mini-batches.
        """
        if steps.r.ndim != 2:
            raise ValueError(
                f"PPO learns from its own streams of steps [N, h], not from transitions {list(steps.r.shape)}: use OnPolicy on "
                "the real system and OnPolicyPractice in a model; OffPolicy and OffPolicyPractice are for SAC"
            )
        key_critic, key_actor = jax.random.split(key)
        x, x_next = (_features(task, s) for s in (steps.s, steps.s_next))
        keep = _counts(task, steps)
        G, V = self.returns(state.critic, x, x_next, steps, keep)
        A = normalised((G - V).ravel(), keep.ravel())
        z = jnp.where(keep[..., None], logit(steps.a, task.a_low, task.a_high), 0).reshape(-1, task.m)
        flat = x.reshape(-1, x.shape[-1])
        bounded = limited(task.a_low, task.a_high)
        log_prob = log_density(*squashed_moments(state.actor.many(flat)), z, bounded)
        rows = Rows(flat, z, log_prob, A, keep.ravel().astype(A.dtype))
        if flat.shape[0] < self.batches:
            raise ValueError(
                f"{flat.shape[0]} steps cannot make {self.batches} mini-batches: collect more, or make fewer"
            )

        rate = jnp.full((), 0.1, G.dtype)
        critic = state.critic.rescaled(*return_moments(state.critic, jnp.where(keep, G, V), rate))
        critic, critic_moments, critic_loss = fit(
            critic,
            optax.adam(self.critic_rate),
            state.critic_moments,
            flat,
            jnp.where(keep, G, V).ravel(),
            key_critic,
            epochs=self.epochs,
            batches=self.batches,
            factor=jnp.ones((), G.dtype),
        )

        def step(carry, x):
            actor, moments_ = carry
            chosen, key = x
            part = jax.tree.map(lambda x: x[chosen], rows)
            (_, metrics), gradient = jax.value_and_grad(self.loss, has_aux=True)(actor, part, bounded, key)
            # Optax raises floats to powers of whole numbers: let it, also where a user has forbidden that to JAX.
            with jax.numpy_dtype_promotion("standard"):
                change, moments_ = optax.adam(self.rate).update(gradient, moments_)
            return (jax.tree.map(lambda x, u: x + u.astype(x.dtype), actor, change), moments_), metrics

        def epoch(carry, keys):
            order = jax.random.permutation(keys[0], flat.shape[0])
            chosen = order[: flat.shape[0] // self.batches * self.batches].reshape(self.batches, -1)
            return jax.lax.scan(step, carry, (chosen, jax.random.split(keys[1], self.batches)))

        keys = jax.vmap(jax.random.split)(jax.random.split(key_actor, self.epochs))
        (actor, moments_), metrics = jax.lax.scan(epoch, (state.actor, state.moments), keys)
        metrics = {name: jnp.mean(x[-1]) for name, x in metrics.items()} | {"critic_loss": critic_loss}
        return PPOState(actor, critic, moments_, critic_moments), metrics

    def returns(
        self,
        critic: Critic,
        x: Float[Array, "N h k"],
        x_next: Float[Array, "N h k"],
        steps: Transition,
        keep: Bool[Array, "N h"],
    ) -> tuple[Float[Array, "N h"], Float[Array, "N h"]]:
        r"""Compute $G^\lambda$ and V of each step; a step that does not count gets the critic's value, and cuts the trace.

        Args:
            critic: The critic.
            x: Features of the states, shape [N, h, k].
            x_next: Features of the next states, shape [N, h, k].
            steps: The streams, [N, h, ...].
            keep: Which steps count, shape [N, h].

        Returns:
            $G^\lambda$ and V, shape [N, h] each.
        """
        V, V_next = (jax.vmap(jax.vmap(critic))(features) for features in (x, x_next))
        cut = steps.last & ~steps.done
        r = jnp.where(keep, jnp.where(keep, steps.r, 0) + self.discount * jnp.where(cut, V_next, 0), V)
        trace = jax.vmap(lambda r, v, e: td_lambda(r, v, e, discount=self.discount, trace=self.trace))
        return trace(r, V_next, steps.last | ~keep), V

    def loss(
        self, actor: MLP, rows: Rows, bounded: Bool[Array, " m"], key: PRNGKeyArray
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        r"""Compute the actor's loss $L_\pi$.

        Args:
            actor: The network.
            rows: The rows of a mini-batch.
            bounded: Which actions have limits, shape [m].
            key: The random key of the entropy's noise.

        Returns:
            The loss, and metrics.
        """
        mean, std = squashed_moments(actor.many(rows.x))
        ratio = jnp.exp(log_density(mean, std, rows.z, bounded) - rows.log_prob)
        inside = jnp.clip(ratio, 1 - self.clip, 1 + self.clip)
        total = jnp.maximum(jnp.sum(rows.weight), 1)
        gain = jnp.sum(rows.weight * jnp.minimum(ratio * rows.advantage, inside * rows.advantage)) / total
        noise = jax.random.normal(key, mean.shape, mean.dtype)
        H = jnp.sum(rows.weight * entropy(mean, std, noise, bounded)) / total
        clipped = jnp.sum(rows.weight * (ratio != inside).astype(ratio.dtype)) / total
        loss = -gain - self.entropy * H
        return loss, {"actor_loss": loss, "entropy": H, "clipped": clipped}


def normalised(A: Float[Array, " M"], keep: Bool[Array, " M"]) -> Float[Array, " M"]:
    """Shift and scale advantages to mean 0 and deviation 1 over the rows that count; 0 elsewhere."""
    weight = keep.astype(A.dtype)
    total = jnp.maximum(jnp.sum(weight), 1)
    centred = jnp.where(keep, A - jnp.sum(jnp.where(keep, A, 0)) / total, 0)
    return centred / (jnp.sqrt(jnp.sum(centred**2) / total) + 1e-8)


def _features(task: Task, s: State) -> Float[Array, "N h k"]:
    """Features of states, with zeros for non-finite ones: they do not count, and must not affect the others."""
    x = jax.vmap(jax.vmap(task.features))(s)
    return jnp.where(jnp.isfinite(x), x, 0)


def _counts(task: Task, steps: Transition) -> Bool[Array, "N h"]:
    """Which steps are finite, and start before the end of their episode."""
    leaves = [x.reshape(*steps.r.shape, -1) for x in jax.tree.leaves((steps.s, steps.a, steps.r, steps.s_next))]
    whole = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x), axis=-1) for x in leaves]), axis=0)
    return whole if task.done is None else whole & ~jax.vmap(jax.vmap(task.done))(steps.s)
