r"""Receding-horizon control: a planner in the loop, as a policy with a memory."""

from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from diffmbrl.core import Dynamics, State, Task, Trajectory, as_float, is_concrete, is_plan, is_planner
from diffmbrl.info import Info
from diffmbrl.planners.windows import Ending
from diffmbrl.policies import centre_and_half
from diffmbrl.rollout import recorded
from diffmbrl.tasks.transforms.plant import Delayed
from diffmbrl.tasks.transforms.squash import squashed

LOGIT_COST = 0.1  # a second, of actions squashed into their limits


class Memory(NamedTuple):
    """Memory of an MPC between two steps of an episode.

    Args:
        plan: Plan for the window that begins now, already shifted.
        carry: Carry of the planner.
        weights: Weights of the plant's task, shape [T + 1].
        t: Number of the step, shape [].
        info: Report of the last step's final update; `work`, `nonfinite` and `inner_iterations` are sums over its
            updates.
    """

    plan: PyTree
    carry: PyTree
    weights: Float[Array, " T1"]
    t: Int[Array, ""]
    info: Info


class MPC(eqx.Module):
    r"""Model predictive control: at each step, improve a plan of H steps from the current state and apply its first action.

    $$a_t = \pi^{(t)}_0(s_t),\qquad \pi^{(t)} = \mathrm{update}^k\big(\mathrm{shift}(\pi^{(t-1)}), s_t\big)$$

    An MPC is a policy with a memory, so `rollout`, `episode_return` and `mean_return` take it, on any plant with the
    same states and actions as the model. The plan is shifted by one step with its last slice repeated, and the
    planner's carry by the planner's own `shift`. If the planner rejects an update, the feedback of the old plan still acts.

    Args:
        planner: Solver of kind "plan".
        model: Planning task of H steps, from `planning_task`.
        plan: Plan with which an episode begins.
        iterations: Updates per step k.
        first: Updates in the first step of an episode.
        hold: Number of steps for which a plan is followed before it is improved again.
        a_low, a_high: Action limits of the plant, shape [m].
        window: How a plan treats the end of the episode: `Ending()` or `Receding()`.
        seen: Function from the plant's state to the state to plan from, and how many steps ahead that is:
            `FullState()`, `Unaware()` or `Predicted(dynamics)`.
        key: Key for a planner that draws, which gets a new one at each update; None for plans without noise.

    Raises:
        TypeError: If the planner is not of kind "plan" (from `init`).
        ValueError: If `horizon`, `iterations` or `first` is below 1, or `hold` is not from 1 to H (from `init`).

    Cost: k updates of the planner per step.
    Reference: Mayne, Rawlings, Rao, Scokaert 2000; Diehl, Bock, Schloeder 2005 (one iteration a step).

    >>> import jax
    >>> from diffmbrl import ILQR, rollout, tasks
    >>> mpc = MPC.init(ILQR(), tasks.pendulum_swingup(), horizon=20, iterations=2)
    >>> plant = tasks.pendulum_swingup(horizon=30, gravity=16.0)
    >>> rollout(mpc, plant, plant.initial(jax.random.key(0))).a.shape
    (30, 1)
    """

    planner: Any
    model: Task
    plan: Any
    iterations: Int[Array, ""]
    first: Int[Array, ""]
    hold: Int[Array, ""]
    a_low: Float[Array, " m"]
    a_high: Float[Array, " m"]
    window: Any
    seen: Any
    key: PRNGKeyArray | None
    is_stateful: ClassVar[bool] = True

    @classmethod
    def init(
        cls,
        planner: Any,
        model: Task,
        *,
        horizon: int,
        iterations: int = 1,
        first: int | None = None,
        hold: int = 1,
        plan: Any = None,
        window: Any = None,
        seen: Any = None,
        logit_cost: Any = LOGIT_COST,
        key: PRNGKeyArray | None = None,
    ) -> "MPC":
        """Make a controller that plans on `model`.

        Args:
            planner: Solver of kind "plan".
            model: Task that the planner sees; its action limits are kept by the planner or moved into the planning
                task.
            horizon: Number of steps H of a plan.
            iterations: Updates per step.
            first: Updates in the first step; None for `iterations`.
            hold: Number of steps for which a plan is followed before it is improved again.
            plan: First plan, for `planning_task`; None for the planner's own.
            window: How a plan treats the end of the episode; None for `Ending()`.
            seen: The state to plan from; None for `FullState()`.
            logit_cost: As for `planning_task`.
            key: Key for a planner that draws; None for none.

        Returns:
            The controller.

        Raises:
            TypeError: If the planner is not of kind "plan".
            ValueError: If `horizon`, `iterations` or `first` is below 1, `hold` is not from 1 to H, or `plan` is not a
                plan of H steps.
        """
        if not is_planner(planner):
            raise TypeError(f"MPC plans with a solver of kind 'plan', such as ILQR(); got {type(planner).__name__}")
        first = iterations if first is None else first
        for name, number in [("iterations", iterations), ("first", first)]:
            if is_concrete(number) and int(number) < 1:
                raise ValueError(f"{name} must be at least 1 update, got {number}")
        if is_concrete(hold) and not 1 <= int(hold) <= max(horizon, 1):
            raise ValueError(f"hold must be from 1 to the {horizon} steps of a plan, got {hold}")
        window, seen = Ending() if window is None else window, FullState() if seen is None else seen
        task = planning_task(planner, model, horizon, window=window, logit_cost=logit_cost)
        plan = planner.first_plan(task) if plan is None else plan
        if not is_plan(plan) or jax.tree.leaves(plan)[0].shape[0] != horizon:
            raise ValueError(
                f"plan must be a plan of {horizon} steps for `planning_task`; got {type(plan).__name__} with leaves "
                f"{[list(x.shape) for x in jax.tree.leaves(plan)]}"
            )
        iterations_, first_, hold_ = (jnp.asarray(number, jnp.int32) for number in (iterations, first, hold))
        return cls(planner, task, plan, iterations_, first_, hold_, model.a_low, model.a_high, window, seen, key)

    def start(self, task: Task) -> Memory:
        """The memory at the start of an episode of `task`."""
        if task.weights.ndim != 1:
            raise ValueError(
                f"an MPC takes one start: task.weights must have shape [T+1], got {list(task.weights.shape)}"
            )
        carry, t = self.planner.init(self.plan, self.model), jnp.zeros((), jnp.int32)
        window = self.window.at(self.model, task.weights, t)
        s0 = jax.eval_shape(self.model.initial, jax.random.key(0))
        info = jax.eval_shape(_update, self.planner, self.plan, carry, window, s0, self._key(t, None))[2]
        return Memory(self.plan, carry, task.weights, t, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), info))

    def step(self, memory: Memory, s: State, *, key: PRNGKeyArray | None = None) -> tuple[Array, Memory]:
        """The action in state s, and the memory for the next step (`act` is the same, compiled)."""
        plan, carry, weights, t, blank = memory
        s, ahead = self.seen(s)
        window = self.window.at(self.model, weights, t + ahead)
        s0 = self.window.state(s, t + ahead, weights.shape[0] - 1)
        own = self._key(t, key)

        def update(i, state):
            plan, carry, before = state
            plan, carry, info = _update(self.planner, plan, carry, window, s0, None if own is None else _fold(own, i))
            return plan, carry, _summed(before, info)

        count = jnp.where(t == 0, self.first, jnp.where(t % self.hold == 0, self.iterations, 0))
        start = (plan, carry, jax.tree.map(jnp.zeros_like, blank))
        plan, carry, info = jax.lax.fori_loop(jnp.zeros_like(count), count, update, start)
        a = self._within_limits(jax.tree.map(lambda x: x[0], plan)(s0))
        return a, Memory(shifted(plan), self.planner.shift(carry), weights, t + 1, info)

    def _key(self, t: Int[Array, ""], key: PRNGKeyArray | None) -> PRNGKeyArray | None:
        """Key of this step for the planner: from the MPC's own key and, if there is one, the rollout's."""
        if self.key is None:
            return None
        own = _fold(self.key, t)
        return own if key is None else _fold(own, jax.random.bits(key))

    def _within_limits(self, z: Float[Array, " m"]) -> Float[Array, " m"]:
        """Return the plant's action: squashed if the model's limits were moved into the planning task."""
        inside = jnp.isfinite(self.a_low) & jnp.isfinite(self.a_high) & ~jnp.isfinite(self.model.a_high)
        centre, half = centre_and_half(self.a_low, self.a_high)
        return jnp.where(inside, centre + half * jnp.tanh(z), z)


@jax.jit
def act(mpc: MPC, memory: Memory, s: State, key: PRNGKeyArray | None = None) -> tuple[Array, Memory]:
    """Do one step of control, compiled once for all values: the function that a real controller calls.

    Args:
        mpc: Controller.
        memory: Its memory, from `mpc.start(task)` or the step before.
        s: State of the plant.
        key: Key of the rollout; None for none.

    Returns:
        The action, shape [m], and the memory for the next step.

    >>> import jax
    >>> from diffmbrl import ILQR, tasks
    >>> task = tasks.pendulum_swingup()
    >>> mpc = MPC.init(ILQR(), task, horizon=20)
    >>> memory = mpc.start(task)
    >>> a, memory = act(mpc, memory, task.initial(jax.random.key(0)))
    >>> a.shape, int(memory.t)
    ((1,), 1)
    """
    return mpc.step(memory, s, key=key)


class FullState(eqx.Module):
    """Current state of the plant, unchanged."""

    def __call__(self, s: State) -> tuple[State, int]:
        return s, 0


class Unaware(eqx.Module):
    """State of a plant whose actions arrive late (`Delayed`), for a controller that ignores the delay."""

    def __call__(self, s: Delayed) -> tuple[State, int]:
        return s.s, 0


class Predicted(eqx.Module):
    r"""State in which the next action will arrive: $s_{t+d}$, predicted from $s_t$ and the d actions under way.

    Planning from it loses only the model's error over d steps to the delay.

    Args:
        dynamics: Model of the plant, on actions within their limits.
    """

    dynamics: Dynamics

    def __call__(self, s: Delayed) -> tuple[State, int]:
        ahead = jax.lax.scan(lambda x, a: (self.dynamics(x, a), None), s.s, s.queue)[0]
        return ahead, s.queue.shape[0]


def planning_task(planner: Any, model: Task, horizon: int, *, window: Any = None, logit_cost: Any = LOGIT_COST) -> Task:
    r"""Make the task of H steps that an MPC's planner solves.

    If the planner does not keep action limits, they are moved into the plant, and the logit z of a limited action costs
    $\tfrac{1}{2} c\,dt\,z^2$: otherwise a plan that is warm started for hundreds of steps drifts to logits of hundreds,
    where tanh has no slope, and no planner returns from there. Median return of iLQR with H = 50 and 3 updates a step on
    `cartpole-swingup`, 16 starts: -3360 without, -21.5, -19.3 and -12.1 with c = .001, .01 and .1.

    Args:
        planner: The planner.
        model: Task that the planner sees.
        horizon: Number of steps H.
        window: How a plan treats the end of the episode; None for `Ending()`.
        logit_cost: Cost c per second of squared logits of limited actions.

    Returns:
        The planning task.

    Raises:
        ValueError: If the horizon is below 1.
    """
    inside = model if planner.keeps_limits else squashed(model)
    if inside is not model:
        cost = as_float(logit_cost) * jnp.asarray(model.dt, model.a_low.dtype)
        limited = (jnp.isfinite(model.a_low) & jnp.isfinite(model.a_high)).astype(model.a_low.dtype)
        inside = eqx.tree_at(lambda t: t.reward, inside, _Leashed(inside.reward, cost * limited))
    return (Ending() if window is None else window).task(inside, horizon)


class _Leashed(eqx.Module):
    inner: Any
    cost: Float[Array, " m"]

    def __call__(self, s: State, a: Float[Array, " m"]) -> Float[Array, ""]:
        return self.inner(s, a) - jnp.sum(self.cost * a**2) / 2


def shifted(plan: PyTree) -> PyTree:
    """Shift a plan by one step; its last slice is repeated."""
    return jax.tree.map(lambda x: jnp.concatenate([x[1:], x[-1:]]), plan)


def control(mpc: MPC, task: Task, s0: State, key: PRNGKeyArray | None = None) -> tuple[Trajectory, Info]:
    """Roll out a controller and record its planner's reports.

    Args:
        mpc: Controller.
        task: Plant.
        s0: One start state.
        key: Key of the plant's noise; None for none.

    Returns:
        The trajectory, and the planner's `Info` of each step with a leading axis of T.
    """
    return recorded(mpc, task, s0, key, keep=lambda memory: memory.info)


def _summed(before: Info, info: Info) -> Info:
    """The last update's, with the counts of all."""
    counts = ("work", "nonfinite", "inner_iterations")
    return info._replace(**{n: jax.tree.map(jnp.add, getattr(before, n), getattr(info, n)) for n in counts})


def _fold(key: PRNGKeyArray, number: Any) -> PRNGKeyArray:
    return jax.random.fold_in(key, number)


@jax.jit
def _update(planner: Any, plan: Any, carry: Any, task: Task, s0: State, key: PRNGKeyArray | None) -> Any:
    """A function of its own, traced once for both the shapes of its results and the loop."""
    return planner.update(plan, carry, task, s0, key=key)
