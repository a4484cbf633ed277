r"""The model as a simulator: a model-free learner on short imagined branches that start at real states."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from diffmbrl.agents.collect import RandomActions
from diffmbrl.agents.imagine import imagine
from diffmbrl.agents.model_free import at_least_one
from diffmbrl.agents.ppo import PPO
from diffmbrl.agents.sac import SAC
from diffmbrl.buffer import Buffer, Transition
from diffmbrl.core import Task, parameter
from diffmbrl.models import GaussianDynamics, Training, train


class Simulation(NamedTuple):
    """A learner's state and the ensemble that it learns in."""

    learner: Any
    members: Any  # a leading axis of members on every leaf
    fits: Int[Array, "*batch"]  # made so far


class Growing(eqx.Module):
    r"""A length that grows with the number k of fits: $\mathrm{low} + (\mathrm{high} - \mathrm{low})(k - b)/(e - b)$, between its ends.

    >>> int(Growing(low=1.0, high=15.0, begin=2.0, end=6.0)(jnp.asarray(4)))
    8
    """

    low: Float[Array, ""] = parameter(1.0)
    high: Float[Array, ""] = parameter(1.0)
    begin: Float[Array, ""] = parameter(0.0)
    end: Float[Array, ""] = parameter(1.0)

    def __call__(self, fits: Int[Array, ""]) -> Int[Array, ""]:
        share = jnp.clip((fits.astype(self.low.dtype) - self.begin) / (self.end - self.begin), 0, 1)
        return jnp.round(self.low + (self.high - self.low) * share).astype(jnp.int32)


class World(eqx.Module):
    """An ensemble that is fitted to a buffer: how it is made and trained, and how many of its members are used.

    `model` is a constructor, `model(task, hidden=, key=)`. Every fit goes on from the weights of the last. The `elites` best
    members on the rows held out are those that are simulated.

    >>> World(members=7, elites=5).hidden
    (200, 200, 200)
    """

    training: Training = eqx.field(default_factory=Training)
    members: int = eqx.field(static=True, default=5)
    elites: int = eqx.field(static=True, default=5)
    hidden: tuple[int, ...] = eqx.field(static=True, default=(200, 200, 200))
    model: Callable = eqx.field(static=True, default=GaussianDynamics.init)

    def __check_init__(self):
        at_least_one(members=self.members, elites=self.elites)
        if self.elites > self.members:
            raise ValueError(f"elites must be at most the number of members, {self.members}; got {self.elites}")

    def init(self, task: Task, key: PRNGKeyArray) -> Any:
        """Draw the members."""
        return jax.vmap(lambda k: self.model(task, hidden=self.hidden, key=k))(jax.random.split(key, self.members))

    def fit(self, members: Any, buffer: Buffer, key: PRNGKeyArray) -> tuple[Any, Any, dict[str, Array]]:
        """All members trained on, the elites among them, and what is worth a record."""
        members, curves = train(members, buffer.rows, buffer.size, key, self.training)
        best = jnp.argsort(curves.holdout)[: self.elites]
        elites = jax.tree.map(lambda x: x[best], members)
        said = {
            "model_error": jnp.mean(curves.holdout[best]),
            "disagreement": disagreement(elites, buffer.sample(key, 256)),
            "model_epochs": jnp.mean(curves.epochs.astype(curves.holdout.dtype)),
            "model_rejected": jnp.sum(curves.rejected),
        }
        return members, elites, said


def disagreement(members: Any, rows: Transition) -> Float[Array, ""]:
    """The members' deviation from their mean, relative to the change of the state: root of the mean over rows and states."""
    predicted = jax.vmap(lambda f: jax.vmap(lambda s, a: f(s, a))(rows.s, rows.a))(members)

    def relative(x, s, s_next):
        return jnp.mean(jnp.var(x, axis=0) / (jnp.var(s_next - s, axis=0) + jnp.finfo(x.dtype).eps))

    parts = jax.tree.leaves(jax.tree.map(relative, predicted, rows.s, rows.s_next))
    return jnp.sqrt(jnp.mean(jnp.stack(parts)))


class MBPO(eqx.Module):
    r"""Model-based policy optimisation: SAC on branches of the model.

    For every `every` real steps: the ensemble is fitted to all of them; then, `rounds` times, the policy as it is takes `steps`
    steps in the model from each of `branches` states of the buffer, in branches of the scheduled `length`, and the learner makes
    `updates / rounds` updates. A row of a batch is real with probability `real`, else one of the latest imagined. All that is one
    compiled call.

    A row that the model made non-finite is not used (a real one takes its place) and counted in `imagined_rejected`.
    Cost per real step: `updates / every` updates and `branches steps rounds / every` rows of the model, and the fit.
    Raises: `ValueError` for sizes below 1, or `updates` that `rounds` does not divide.
    Reference: Janner et al. 2019, When to trust your model, algorithm 2.

    >>> MBPO(updates=200, rounds=4).learner.hidden
    (256, 256)
    """

    learner: SAC = eqx.field(default_factory=SAC)
    world: World = eqx.field(default_factory=World)
    length: Growing = eqx.field(default_factory=Growing)
    real: Float[Array, ""] = parameter(0.05)
    updates: int = eqx.field(static=True, default=1000)
    batch: int = eqx.field(static=True, default=256)
    rounds: int = eqx.field(static=True, default=4)
    branches: int = eqx.field(static=True, default=400)
    steps: int = eqx.field(static=True, default=10)
    warmup: int = eqx.field(static=True, default=200)
    every: int = eqx.field(static=True, default=50)
    environments: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        at_least_one(updates=self.updates, batch=self.batch, rounds=self.rounds, branches=self.branches, steps=self.steps)
        if self.updates % self.rounds:
            raise ValueError(f"updates ({self.updates}) must be a multiple of rounds ({self.rounds})")

    def init(self, task: Task, key: PRNGKeyArray) -> Simulation:
        return simulation(self, task, key)

    def first(self, carry: Simulation, task: Task) -> RandomActions:
        return RandomActions(task)

    def policy(self, carry: Simulation, task: Task) -> Any:
        return self.learner.policy(carry.learner, task)

    def best(self, carry: Simulation, task: Task) -> Any:
        return self.learner.best(carry.learner, task)

    def update(
        self, carry: Simulation, task: Task, buffer: Buffer, fresh: Transition, key: PRNGKeyArray
    ) -> tuple[Simulation, dict[str, Array]]:
        key_fit, key_rounds = jax.random.split(key)
        members, elites, said = self.world.fit(carry.members, buffer, key_fit)
        length = self.length(carry.fits)

        def one_round(state, key):
            key_branches, key_updates = jax.random.split(key)
            policy = self.learner.policy(state, task)
            sizes = {"branches": self.branches, "steps": self.steps, "length": length}
            rows, keep = jax.tree.map(_flat, imagine(policy, task, elites, buffer, key_branches, **sizes))

            def step(state, key):
                key_mix, key_update = jax.random.split(key)
                batch = self._mixed(rows, keep, buffer, key_mix)
                return self.learner.update(state, task, batch, key_update)

            state, losses = jax.lax.scan(step, state, jax.random.split(key_updates, self.updates // self.rounds))
            return state, (jax.tree.map(jnp.mean, losses), jnp.sum(~keep, dtype=jnp.int32))

        state, (losses, rejected) = jax.lax.scan(one_round, carry.learner, jax.random.split(key_rounds, self.rounds))
        said |= {name: x[-1] for name, x in losses.items()}
        said |= {"imagined_rejected": jnp.sum(rejected), "length": length}
        return Simulation(state, members, carry.fits + 1), said

    def _mixed(self, rows: Transition, keep: Array, buffer: Buffer, key: PRNGKeyArray) -> Transition:
        key_real, key_imagined, key_which = jax.random.split(key, 3)
        real = buffer.sample(key_real, self.batch)
        chosen = jax.random.randint(key_imagined, (self.batch,), 0, keep.shape[0])
        use_real = (jax.random.uniform(key_which, (self.batch,), self.real.dtype) < self.real) | ~keep[chosen]

        def pick(x, y):
            return jnp.where(use_real.reshape(-1, *[1] * (x.ndim - 1)), x, y[chosen])

        return jax.tree.map(pick, real, rows)


class ModelPPO(eqx.Module):
    r"""PPO in the model: for every `every` real steps a fit, and `updates` updates of the learner on streams of `steps` steps from
    each of `branches` states of the buffer.

    The branches are of the scheduled `length`, at whose end the critic says what is to come; the next one starts. With
    `learner=PPO.reinforce()` it is the policy gradient in the model. A row that the model made non-finite does not count in the
    update, and is counted in `imagined_rejected`.
    Cost per real step: `branches steps updates / every` rows of the model, and the updates on them.
    Reference: Kurutach et al. 2018, Model-ensemble trust-region policy optimization, algorithm 2, with PPO.

    >>> ModelPPO(learner=PPO.reinforce()).learner.epochs
    1
    """

    learner: PPO = eqx.field(default_factory=PPO)
    world: World = eqx.field(default_factory=World)
    length: Growing = eqx.field(default_factory=lambda: Growing(low=25.0, high=25.0))
    updates: int = eqx.field(static=True, default=10)
    branches: int = eqx.field(static=True, default=100)
    steps: int = eqx.field(static=True, default=25)
    warmup: int = eqx.field(static=True, default=200)
    every: int = eqx.field(static=True, default=50)
    environments: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        at_least_one(updates=self.updates, branches=self.branches, steps=self.steps)

    def init(self, task: Task, key: PRNGKeyArray) -> Simulation:
        return simulation(self, task, key)

    def first(self, carry: Simulation, task: Task) -> RandomActions:
        return RandomActions(task)

    def policy(self, carry: Simulation, task: Task) -> Any:
        return self.learner.policy(carry.learner, task)

    def best(self, carry: Simulation, task: Task) -> Any:
        return self.learner.best(carry.learner, task)

    def update(
        self, carry: Simulation, task: Task, buffer: Buffer, fresh: Transition, key: PRNGKeyArray
    ) -> tuple[Simulation, dict[str, Array]]:
        key_fit, key_updates = jax.random.split(key)
        members, elites, said = self.world.fit(carry.members, buffer, key_fit)
        length = self.length(carry.fits)

        def step(state, key):
            key_branches, key_update = jax.random.split(key)
            policy = self.learner.policy(state, task)
            sizes = {"branches": self.branches, "steps": self.steps, "length": length}
            rows, keep = imagine(policy, task, elites, buffer, key_branches, **sizes)
            state, losses = self.learner.update(state, task, rows, key_update)
            return state, (losses, jnp.sum(~keep, dtype=jnp.int32))

        state, (losses, rejected) = jax.lax.scan(step, carry.learner, jax.random.split(key_updates, self.updates))
        said |= {name: x[-1] for name, x in losses.items()}
        said |= {"imagined_rejected": jnp.sum(rejected), "length": length}
        return Simulation(state, members, carry.fits + 1), said


def simulation(agent: Any, task: Task, key: PRNGKeyArray) -> Simulation:
    """Where an agent with a `learner` and a `world` begins."""
    key_learner, key_members = jax.random.split(key)
    zero = jnp.zeros((), jnp.int32)
    return Simulation(agent.learner.init(task, key_learner), agent.world.init(task, key_members), zero)


def _flat(x: Array) -> Array:
    return x.reshape(-1, *x.shape[2:])
