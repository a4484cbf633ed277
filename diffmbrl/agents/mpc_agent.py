r"""Planning through a learned model: model-based RL 0.5, 1.0 and 1.5 of the lecture as one agent."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray, PyTree

from diffmbrl.agents.collect import RandomActions
from diffmbrl.agents.ensemble_trainer import EnsembleTrainer
from diffmbrl.agents.exploration import ExploredMPC
from diffmbrl.choices import validate_choice
from diffmbrl.core import Solver, Task, as_float, is_concrete
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

ALWAYS = 2**31 - 1  # fits: one at every update
Tree = TypeVar("Tree")


class MPCCarry(NamedTuple):
    """All that an `MPCAgent` has learned.

    Args:
        members: All members of the ensemble, with a leading axis on every leaf.
        elites: The members that are planned on.
        updates: The number of the agent's updates so far.
    """

    members: PyTree
    elites: PyTree
    updates: Int[Array, "*batch"]


class MPCAgent(eqx.Module):
    r"""Fits an ensemble to all real steps, plans through it at every step, acts, and repeats: model-based RL 1.5.

    $$a_t = \arg\max_{a_{t:t+H}} \sum_{j<H} w_{t+j}\, r(\hat s_j, a_{t+j}) + w_{t+H}\, \phi(\hat s_H),\qquad
    \hat s_0 = s_t,\; \hat s_{j+1} = \hat f(\hat s_j, a_{t+j})$$

    | model-based RL | | |
    |---|---|---|
    | 0.5 | random actions, one fit, plan | `fits=1` |
    | 1.0 | refit, but follow every plan to its end | `hold=horizon` (the task's, to plan whole episodes) |
    | 1.5 | refit, and plan again at every step | the default |

    Args:
        task: The task to plan for, whose dynamics are not used. Its states, limits and features are the real one's; its reward
            may differ, such as `tasks.soft_margin(task)` for a reward that is constant until the end.
        planner: A solver of kind "plan"; by default iLQR with the task's limits. `Sampling(particles=)` and
            `Shooting(particles=)` plan on the members one by one, with `propagation=TSInfinity()` or `TS1()`.
        world: Makes and fits the ensemble.
        propagation: Makes one dynamics of the ensemble; by default the mean of its members.
        horizon: The number H of steps of a plan.
        iterations: Updates of the planner at each real step.
        first: Updates at the first step of an episode.
        hold: Real steps between two plans.
        window: The planning task of each step; see `planners.MPC`.
        noise: Standard deviation of the noise of collected actions, in half widths of the limits.
        fits: Fit the ensemble only at the first `fits` updates.
        warmup: Real steps before the first update.
        every: Real steps between two updates.
        environments: Real systems in parallel, which share these steps.

    Raises:
        ValueError: If the noise is negative or `fits` is below 1; if `MPC.init` refuses a value.

    Cost: of an update, a fit; of a real step, `iterations` of the planner's updates. Under `vmap` all seeds wait for the one
    whose planner or training takes longest: on a CPU one seed at a time is cheaper.
    Reference: the lecture's model-based RL 0.5 to 1.5; Chua et al. 2018 (PETS); Nagabandi et al. 2018.

    >>> from diffmbrl import tasks
    >>> MPCAgent(tasks.pendulum(), horizon=25).every
    50
    """

    mpc: MPC  # its members are untrained
    world: EnsembleTrainer
    noise: Float[Array, ""]
    fits: Int[Array, ""]
    warmup: int = eqx.field(static=True)
    every: int = eqx.field(static=True)
    environments: int = eqx.field(static=True)

    def __init__(
        self,
        task: Task,
        planner: Solver | None = None,
        *,
        world: EnsembleTrainer | None = None,
        propagation: Propagation | None = None,
        horizon: int = 25,
        iterations: int = 1,
        first: int = 10,
        hold: int = 1,
        window: Any = None,
        noise: ArrayLike = 0.0,
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
        key = jax.random.key(0)  # each step folds its own key into it
        draws = isinstance(planner, Sampling | Shooting)  # the other planners ignore the model's noise
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
        def learned(x: object) -> object:
            return Ensemble(carry.elites, x.propagation) if isinstance(x, Ensemble) else x

        model = jax.tree.map(learned, self.mpc.model, is_leaf=_is_ensemble)
        return eqx.tree_at(lambda mpc: mpc.model, self.mpc, model)

    def model(self, carry: MPCCarry, task: Task) -> Ensemble:
        """The ensemble that it plans on."""
        [ensemble] = filter(_is_ensemble, jax.tree.leaves(self.mpc.model.dynamics, is_leaf=_is_ensemble))
        return Ensemble(carry.elites, ensemble.propagation)

    def update(
        self, carry: MPCCarry, task: Task, buffer: Buffer, fresh: Transition, key: PRNGKeyArray
    ) -> tuple[MPCCarry, dict[str, Array]]:
        """Fit the ensemble, or retain it after `fits` updates; its error is then measured on the latest steps."""
        wanted = carry.updates < self.fits
        # Without patience training stops at once. Under `vmap` a `cond` would run both branches.
        patience = jnp.where(wanted, self.world.training.patience, 0)
        world = eqx.tree_at(lambda w: w.training.patience, self.world, patience)
        members, elites, metrics = world.fit(carry.members, buffer, key)

        def chosen(new: Tree, old: Tree) -> Tree:
            return jax.tree.map(lambda x, y: jnp.where(wanted, x, y), new, old)

        rows = flat(fresh)
        error = jnp.mean(jax.vmap(lambda f: jax.vmap(f.row_loss)(rows))(carry.elites))
        metrics |= {"model_error": jnp.where(wanted, metrics["model_error"], error)}
        found = MPCCarry(chosen(members, carry.members), chosen(elites, carry.elites), carry.updates + 1)
        return found, metrics


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
    """Make an `MPCAgent` by the name of its planner, on the soft margin of a task that has an end.

    The default planner follows from the measurements of `benchmarks/mbrl.py`.

    Args:
        task: The task.
        warmup: Real steps before the first update.
        every: Real steps between two updates.
        planner: "ilqr" on the members' mean, or "cem" or "adam" on the members one by one.
        seconds: The length of a plan.
        iterations: A factor of the planner's updates at each step.
        hold: Real steps between two plans.
        fits: Fit the ensemble only at the first `fits` updates.
        members: The number of members of the ensemble.
        units: The width of their two hidden layers.
        noise: Standard deviation of the noise of collected actions, in half widths of the limits.

    Returns:
        The agent.

    Raises:
        ValueError: If the planner is unknown, naming the nearest; if `MPCAgent` refuses a value.
    """
    row = PLANNERS[validate_choice("planner", planner, PLANNERS)]
    # A learned end is still untrained here, and so would be its margin.
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
    """A planner of the table.

    Args:
        make: Makes it from the task and the number of members.
        propagation: Makes one dynamics of the ensemble.
        iterations: The planner's updates at each step.
    """

    make: Callable[[Task, int], Solver]
    propagation: Propagation
    iterations: int


PLANNERS = {
    "ilqr": PlannerRow(lambda task, members: ILQR.with_limits(task), Mean(), 1),
    "cem": PlannerRow(lambda task, members: Sampling(CEM(elites=6), samples=60, particles=members), TSInfinity(), 2),
    "adam": PlannerRow(
        lambda task, members: Shooting(OptaxSolver(optax.adam, learning_rate=0.1), particles=members), TSInfinity(), 5
    ),
}


def small_world(members: int = 5, units: int = 64) -> EnsembleTrainer:
    """Make an ensemble of deterministic networks of two layers, fast to plan through, for systems of a few bodies.

    Args:
        members: The number of members, all of which are used.
        units: The width of their hidden layers.

    Returns:
        The ensemble's trainer.
    """
    training = Training(epochs=100, patience=10, batch=64)
    return EnsembleTrainer(training, members=members, elites=members, hidden=(units, units), model=NetworkDynamics.init)


def _is_ensemble(x: object) -> bool:
    return isinstance(x, Ensemble)
