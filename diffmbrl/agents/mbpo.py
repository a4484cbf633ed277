"""The model as a simulator: a model-free learner on short imagined branches that start at real states."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from diffmbrl.agents.collect import RandomActions
from diffmbrl.agents.ensemble_trainer import EnsembleTrainer
from diffmbrl.agents.practice import OffPolicyPractice
from diffmbrl.agents.sac import SAC
from diffmbrl.core import Task, as_float, parameter
from diffmbrl.models import TS1, Ensemble
from diffmbrl.models.buffer import Buffer, Transition


class Simulation(NamedTuple):
    """A learner's state and the ensemble that it learns in."""

    learner: Any
    members: Any  # a leading axis of members on every leaf
    elites: Any
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
    """Branches of one length, whatever the number of fits. Raises: `ValueError` if it is below 1."""
    if not length >= 1:
        raise ValueError(f"length must be at least 1 step of the model, got {length}")
    return Growing(as_float(length), as_float(length))


class MBPO(eqx.Module):
    r"""Model-based policy optimisation: a model-free `learner` that practises in an ensemble.

    After each `every` real steps the ensemble is fitted to all of them, and the learner practises on branches of the scheduled
    `length` from states of the buffer: `OffPolicyPractice()` for one that learns from rows of any policy (SAC, as in
    the paper), or `Streamed()` for one that learns from its own (`PPO()`, or `PPO.reinforce()` for the policy gradient
    in the model). All that is one compiled call. A row that the model made non-finite is not used, and is counted in
    `imagined_rejected`.

    Branches should be as long as a mistake takes to show. On the cart-pole those of 1 to 10 steps reach the best return and
    lose it again: neither branches nor data come to the ends of the rail, where the critics extrapolate upwards, and the
    policy drifts there. Those of 60 steps lose it on some seeds, at a rate of 1e-3; whole episodes at a rate of 3e-4 keep it.
    That is where a fall ends a branch. Where nothing does, long branches run away (`cartpole-balance`, 200 steps: the cart is
    driven 90 m off) and their rewards are all that the critics learn: their loss was 1e5 to 1e8, where branches of 20 steps
    had .02 to .04. Hence the lengths that the registry gives: 200 steps for tasks with an end, 20 for those without.

    Reference: Janner et al. 2019, When to trust your model, algorithm 2; Kurutach et al. 2018, Model-ensemble trust-region
    policy optimization, algorithm 2, with PPO.

    >>> from diffmbrl.agents import PPO, OnPolicyPractice
    >>> MBPO(PPO.reinforce(), practice=OnPolicyPractice()).learner.epochs
    1
    """

    learner: Any = eqx.field(default_factory=SAC)
    world: EnsembleTrainer = eqx.field(default_factory=EnsembleTrainer)
    length: Growing = eqx.field(default_factory=Growing)
    practice: Any = eqx.field(default_factory=OffPolicyPractice)
    warmup: int = eqx.field(static=True, default=200)
    every: int = eqx.field(static=True, default=50)
    environments: int = eqx.field(static=True, default=1)

    def init(self, task: Task, key: PRNGKeyArray) -> Simulation:
        key_learner, key_members = jax.random.split(key)
        members = self.world.init(task, key_members)
        zero = jnp.zeros((), jnp.int32)
        return Simulation(self.learner.init(task, key_learner), members, self.world.first(members), zero)

    def first(self, carry: Simulation, task: Task) -> RandomActions:
        return RandomActions(task)

    def policy(self, carry: Simulation, task: Task) -> Any:
        return self.learner.policy(carry.learner, task)

    def best(self, carry: Simulation, task: Task) -> Any:
        return self.learner.best(carry.learner, task)

    def model(self, carry: Simulation, task: Task) -> Ensemble:
        """What it practises in."""
        return Ensemble(carry.elites, TS1())

    def update(
        self, carry: Simulation, task: Task, buffer: Buffer, fresh: Transition, key: PRNGKeyArray
    ) -> tuple[Simulation, dict[str, Array]]:
        key_fit, key_practice = jax.random.split(key)
        members, elites, said = self.world.fit(carry.members, buffer, key_fit)
        length = self.length(carry.fits)
        state, learned = self.practice(self.learner, carry.learner, task, elites, buffer, length, key_practice)
        return Simulation(state, members, elites, carry.fits + 1), said | learned | {"length": length}
