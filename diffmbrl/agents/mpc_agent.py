r"""Planning through a learned model: model-based RL 0.5, 1.0 and 1.5 of the lecture are settings of one agent."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from diffmbrl.agents.collect import RandomActions
from diffmbrl.agents.ensemble_trainer import EnsembleTrainer
from diffmbrl.agents.exploration import ExploredMPC
from diffmbrl.choices import validate_choice
from diffmbrl.core import Task, as_float, is_concrete
from diffmbrl.models import EndModel, Ensemble, Mean, NetworkDynamics, Training, TSInfinity
from diffmbrl.models.buffer import Buffer, Transition, flat
from diffmbrl.models.ensemble import Propagation
from diffmbrl.optimizers.optax_solver import OptaxSolver
from diffmbrl.planners.ilqr import ILQR
from diffmbrl.planners.mpc import MPC
from diffmbrl.planners.refit import CEM
from diffmbrl.planners.sampling import Sampling
from diffmbrl.planners.shooting import Shooting
from diffmbrl.planners.windows import Receding
from diffmbrl.tasks.transforms.margin import soft_margin

ALWAYS = 2**31 - 1  # updates: as many as there are


class MPCCarry(NamedTuple):
    """What an `MPCAgent` has learned."""

    members: Any  # models, a leading axis of members on every leaf
    elites: Any  # those of them that are planned on
    updates: Int[Array, "*batch"]  # of the agent, made so far


class MPCAgent(eqx.Module):
    r"""Fit an ensemble to all real steps, plan through it at every step, act, and again: model-based RL 1.5.

    $$a_t = \arg\max_{a_{t:t+H}} \sum_{j<H} w_{t+j}\, r(\hat s_j, a_{t+j}) + w_{t+H}\, \phi(\hat s_H),\qquad
    \hat s_0 = s_t,\; \hat s_{j+1} = \hat f(\hat s_j, a_{t+j})$$

    `planner` is any solver of kind "plan", in the loop as `planners.MPC` has it, whose are `horizon` = H, `iterations`,
    `first`, `hold` and `window`. By default it is iLQR on the mean of the ensemble, with the limits of the task.
    `Sampling(particles=)` and `Shooting(particles=)` take the ensemble apart, with `propagation=TSInfinity()` or `TS1()`.

    | model-based RL | | |
    |---|---|---|
    | 0.5 | random actions, one fit, plan | `fits=1` |
    | 1.0 | refit, but follow every plan to its end | `hold=horizon` (the task's, to plan whole episodes) |
    | 1.5 | refit, and plan anew at every step | the default |

    `task` is the one that is planned for: its states, limits and features are the real one's, its reward may be another, and
    its dynamics are not used. Where a reward says nothing until the end comes, give `tasks.soft_margin(task)`. `noise` is that
    of the steps that are collected, in half widths of the limits.

    Cost of an update: a fit; of a real step: `iterations` of the planner's updates. Under `vmap` all seeds wait for the one
    whose planner or training takes longest: on a CPU one seed at a time is cheaper.
    Raises: what `MPC.init` raises; `ValueError` for negative noise or `fits` below 1.
    Reference: the lecture's model-based RL 0.5 to 1.5; Chua et al. 2018 (PETS); Nagabandi et al. 2018.

    >>> from diffmbrl import tasks
    >>> MPCAgent(tasks.pendulum(), horizon=25).every
    50
    """

    mpc: MPC  # with members that are not trained
    world: EnsembleTrainer
    noise: Float[Array, ""]
    fits: Int[Array, ""]
    warmup: int = eqx.field(static=True)
    every: int = eqx.field(static=True)
    environments: int = eqx.field(static=True)

    def __init__(
        self,
        task: Task,
        planner: Any = None,
        *,
        world: EnsembleTrainer | None = None,
        propagation: Propagation | None = None,
        horizon: int = 25,
        iterations: int = 1,
        first: int = 10,
        hold: int = 1,
        window: Any = None,
        noise: Any = 0.0,
        fits: int = ALWAYS,
        warmup: int = 100,
        every: int = 50,
        environments: int = 1,
    ):
        if not bool(jnp.all(jnp.asarray(noise) >= 0)):
            raise ValueError(f"noise must not be negative, got {noise}")
        if is_concrete(fits) and int(fits) < 1:
            raise ValueError(f"fits must be at least 1, got {fits}")
        self.world = small_world() if world is None else world
        planner = ILQR.with_limits(task) if planner is None else planner
        key = jax.random.key(0)  # the steps' keys are folded into it
        draws = isinstance(planner, Sampling | Shooting)  # the others plan without the model's noise
        blank = Ensemble(self.world.first(self.world.init(task, key)), propagation)
        self.mpc = MPC.init(
            planner,
            eqx.tree_at(lambda t: t.dynamics, task, blank),
            horizon=horizon,
            iterations=iterations,
            first=first,
            hold=hold,
            window=window,
            key=key if draws else None,
        )
        self.noise, self.fits = as_float(noise), jnp.asarray(fits, jnp.int32)
        self.warmup, self.every, self.environments = warmup, every, environments

    def init(self, task: Task, key: PRNGKeyArray) -> MPCCarry:
        members = self.world.init(task, key)
        return MPCCarry(members, self.world.first(members), jnp.zeros((), jnp.int32))

    def first(self, carry: MPCCarry, task: Task) -> RandomActions:
        return RandomActions(task)

    def policy(self, carry: MPCCarry, task: Task) -> ExploredMPC:
        return ExploredMPC(self.best(carry, task), self.noise)

    def best(self, carry: MPCCarry, task: Task) -> MPC:
        def learned(x: Any) -> Any:
            return Ensemble(carry.elites, x.propagation) if _is_ensemble(x) else x

        model = jax.tree.map(learned, self.mpc.model, is_leaf=_is_ensemble)
        return eqx.tree_at(lambda mpc: mpc.model, self.mpc, model)

    def model(self, carry: MPCCarry, task: Task) -> Ensemble:
        """What it plans on."""
        [ensemble] = filter(_is_ensemble, jax.tree.leaves(self.mpc.model.dynamics, is_leaf=_is_ensemble))
        return Ensemble(carry.elites, ensemble.propagation)

    def update(
        self, carry: MPCCarry, task: Task, buffer: Buffer, fresh: Transition, key: PRNGKeyArray
    ) -> tuple[MPCCarry, dict[str, Array]]:
        """Fit, or keep the model of before and judge it by the latest steps."""
        wanted = carry.updates < self.fits
        # With no patience nothing is trained, which costs nothing; both branches of a `cond` would run under `vmap`.
        patience = jnp.where(wanted, self.world.training.patience, 0)
        world = eqx.tree_at(lambda w: w.training.patience, self.world, patience)
        members, elites, said = world.fit(carry.members, buffer, key)

        def chosen(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda x, y: jnp.where(wanted, x, y), new, old)

        rows = flat(fresh)
        kept = jnp.mean(jax.vmap(lambda f: jax.vmap(f.row_loss)(rows))(carry.elites))
        said |= {"model_error": jnp.where(wanted, said["model_error"], kept)}
        found = MPCCarry(chosen(members, carry.members), chosen(elites, carry.elites), carry.updates + 1)
        return found, said


def mpc(
    task: Task,
    *,
    warmup: int = 100,
    every: int = 50,
    planner: str = "ilqr",
    seconds: float = 1.0,
    iterations: int = 1,
    hold: int = 1,
    fits: int = ALWAYS,
    members: int = 5,
    units: int = 64,
    noise: float = 0.0,
) -> MPCAgent:
    """MPC by the name of its planner, with windows of so many `seconds`; on the soft margin of a task that has an end.

    `planner` is "ilqr" on the members' mean, or "cem" or "adam" on the members side by side; `benchmarks/mbrl.py` has the
    measurements by which it is iLQR unless another is named.
    Raises: `ValueError` for another planner, naming the nearest; what `MPCAgent` raises.
    """
    row = PLANNERS[validate_choice("planner", planner, PLANNERS)]
    # The margin of an end that is learned would be that of a network without training.
    given = task if task.done is None or isinstance(task.done, EndModel) else soft_margin(task)
    return MPCAgent(
        given,
        row.make(given, members),
        world=small_world(members, units),
        propagation=row.propagation,
        horizon=max(1, min(task.horizon, round(seconds / task.dt))),
        iterations=iterations * row.iterations,
        first=max(10, iterations * row.iterations),
        hold=hold,
        window=Receding(),
        noise=noise,
        fits=fits,
        warmup=warmup,
        every=every,
    )


class PlannerRow(NamedTuple):
    """A planner by its name, and how it meets the ensemble."""

    make: Callable[[Task, int], Any]  # of the task and the number of members
    propagation: Propagation
    iterations: int  # at each step


PLANNERS = {
    "ilqr": PlannerRow(lambda task, members: ILQR.with_limits(task), Mean(), 1),
    "cem": PlannerRow(lambda task, members: Sampling(CEM(elites=6), samples=60, particles=members), TSInfinity(), 2),
    "adam": PlannerRow(
        lambda task, members: Shooting(OptaxSolver(optax.adam, learning_rate=0.1), particles=members), TSInfinity(), 5
    ),
}


def small_world(members: int = 5, units: int = 64) -> EnsembleTrainer:
    """Deterministic networks of two layers: all that systems of a few bodies need, and fast to plan through."""
    training = Training(epochs=100, patience=10, batch=64)
    return EnsembleTrainer(training, members=members, elites=members, hidden=(units, units), model=NetworkDynamics.init)


def _is_ensemble(x: Any) -> bool:
    return isinstance(x, Ensemble)
