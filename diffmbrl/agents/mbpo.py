r"""The model as a simulator: a model-free learner on short imagined branches that start at real states."""

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
from diffmbrl.agents.world import World
from diffmbrl.buffer import Buffer, Transition
from diffmbrl.core import Task, as_float, parameter
from diffmbrl.models import TS1, Ensemble


class Simulation(NamedTuple):
    """A learner's state and the ensemble that it learns in."""

    learner: Any
    members: Any  # a leading axis of members on every leaf
    fits: Int[Array, "*batch"]  # made so far


class Growing(eqx.Module):
    """A length that grows from `low` after `begin` fits of the model to `high` after `end`, evenly, and then stays.

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


def branches_of(length: Any) -> Growing:
    """Branches of one length, whatever the number of fits."""
    return Growing(as_float(length), as_float(length))


class MBPO(eqx.Module):
    r"""Model-based policy optimisation: SAC on branches of the model.

    After each `every` real steps the ensemble is fitted to all of them. Then, `rounds` times, the policy as it is takes `steps`
    steps in the model on each of `branches` lanes, in branches of the scheduled `length` from states of the buffer, and the
    learner makes `updates / rounds` updates. A row of a batch is real with probability `real`, else one of the latest
    imagined. All that is one compiled call.

    Branches should be as long as a mistake takes to show. On the cart-pole those of 1 to 10 steps reach the best return and
    lose it again: neither branches nor data come to the ends of the rail, where the critics extrapolate upwards, and the
    policy drifts there. Those of 60 steps keep it.

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
        at_least_one(
            updates=self.updates, batch=self.batch, rounds=self.rounds, branches=self.branches, steps=self.steps
        )
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

    def model(self, carry: Simulation, task: Task) -> Ensemble:
        return Ensemble(carry.members, TS1())

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
    """PPO in the model: after each `every` real steps a fit, and `updates` updates on imagined streams [`branches`, `steps`].

    They are made of branches of the scheduled `length` from states of the buffer, at whose ends the critic says what is to
    come. With
    `learner=PPO.reinforce()` it is the policy gradient in the model. A row that the model made non-finite does not count in the
    update, and is counted in `imagined_rejected`.
    Cost per real step: `branches steps updates / every` rows of the model, and the updates on them.
    Reference: Kurutach et al. 2018, Model-ensemble trust-region policy optimization, algorithm 2, with PPO.

    >>> ModelPPO(learner=PPO.reinforce()).learner.epochs
    1
    """

    learner: PPO = eqx.field(default_factory=PPO)
    world: World = eqx.field(default_factory=World)
    length: Growing = eqx.field(default_factory=lambda: branches_of(25))
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

    def model(self, carry: Simulation, task: Task) -> Ensemble:
        return Ensemble(carry.members, TS1())

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
