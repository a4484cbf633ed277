"""Model-based policy optimisation: a model-free learner on branches of a model that start at real states."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, ScalarLike

from diffmbrl.agents.collect import RandomActions
from diffmbrl.agents.ensemble_trainer import EnsembleTrainer
from diffmbrl.agents.model_free import Learner
from diffmbrl.agents.practice import OffPolicyPractice, Practice
from diffmbrl.agents.sac import SAC
from diffmbrl.core import Policy, Task, as_float, parameter
from diffmbrl.models import TS1, Ensemble
from diffmbrl.models.buffer import Buffer, Transition


class Simulation(NamedTuple):
    """A learner's state and the ensemble that it learns in.

    Args:
        learner: The learner's state.
        members: All members of the ensemble, with a leading axis on every leaf.
        elites: The members that are used.
        fits: The number of fits so far.
    """

    learner: PyTree
    members: PyTree
    elites: PyTree
    fits: Int[Array, "*batch"]


class Growing(eqx.Module):
    """Branch length that grows linearly with the number of fits of the model, and then stays constant.

    Args:
        low: The length up to `begin` fits, in steps.
        high: The length from `end` fits on, in steps.
        begin: The number of fits after which it starts to grow.
        end: The number of fits after which it stays constant.

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


def branches_of(length: ScalarLike) -> Growing:
    """Make a schedule of constant length.

    Args:
        length: The length, in steps of the model.

    Returns:
        The schedule.

    Raises:
        ValueError: If the length is below 1.
    """
    if not np.asarray(length) >= 1:
        raise ValueError(f"length must be at least 1 step of the model, got {length}")
    return Growing(as_float(length), as_float(length))


class MBPO(eqx.Module):
    r"""Model-based policy optimisation: a model-free learner that practises in an ensemble.

    After every `every` real steps the ensemble is fitted to all of them, and the learner practises on branches of the model
    from states of the buffer, in one compiled call. Non-finite rows of the model are dropped and counted in
    `imagined_rejected`.

    Branches should be as long as a mistake takes to show. On the cart-pole, branches of 1 to 10 steps reach the best return and
    lose it again: neither branches nor data come to the ends of the rail, where the critics extrapolate upwards, and the
    policy drifts there. Branches of 60 steps lose it on some seeds, at a rate of 1e-3; whole episodes at a rate of 3e-4 keep
    it. There a fall ends a branch. In a task that nothing ends, long branches diverge (`cartpole-balance`, 200 steps: the cart
    is driven 90 m off) and the critics learn little but their rewards: their loss was 1e5 to 1e8, and .02 to .04 with branches
    of 20 steps. Hence the lengths in the registry: 200 steps for tasks with an end, 20 for those without.

    Args:
        learner: The model-free learner: `SAC()`, `PPO()`, or `PPO.reinforce()` for the policy gradient.
        world: Makes and fits the ensemble.
        length: The length of the branches, in steps of the model.
        practice: `OffPolicyPractice` for a learner from rows of any policy (SAC, as in the paper), `OnPolicyPractice` for one
            from rows of its own policy (PPO).
        warmup: Real steps before the first update.
        every: Real steps between two updates.
        environments: Real systems in parallel, which share these steps.

    Reference: Janner et al. 2019, When to trust your model, algorithm 2; Kurutach et al. 2018, Model-ensemble trust-region
    policy optimization, algorithm 2, with PPO.

    >>> from diffmbrl.agents import PPO, OnPolicyPractice
    >>> MBPO(PPO.reinforce(), practice=OnPolicyPractice()).learner.epochs
    1
    """

    learner: Learner = eqx.field(default_factory=SAC)
    world: EnsembleTrainer = eqx.field(default_factory=EnsembleTrainer)
    length: Growing = eqx.field(default_factory=Growing)
    practice: Practice = eqx.field(default_factory=OffPolicyPractice)
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

    def policy(self, carry: Simulation, task: Task) -> Policy:
        return self.learner.policy(carry.learner, task)

    def best(self, carry: Simulation, task: Task) -> Policy:
        return self.learner.best(carry.learner, task)

    def model(self, carry: Simulation, task: Task) -> Ensemble:
        """The ensemble that the learner practises in."""
        return Ensemble(carry.elites, TS1())

    def update(
        self, carry: Simulation, task: Task, buffer: Buffer, fresh: Transition, key: PRNGKeyArray
    ) -> tuple[Simulation, dict[str, Array]]:
        key_fit, key_practice = jax.random.split(key)
        members, elites, metrics = self.world.fit(carry.members, buffer, key_fit)
        length = self.length(carry.fits)
        state, learned = self.practice(self.learner, carry.learner, task, elites, buffer, length, key_practice)
        return Simulation(state, members, elites, carry.fits + 1), metrics | learned | {"length": length}
