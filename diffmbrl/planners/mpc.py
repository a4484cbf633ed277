r"""Receding-horizon control: a planner in the loop, as a policy with a memory."""

from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from diffmbrl.core import State, Task, Trajectory, as_float, is_concrete, is_plan, is_planner
from diffmbrl.info import Info
from diffmbrl.planners.windows import Ending
from diffmbrl.policies import centre_and_half
from diffmbrl.rollout import recorded
from diffmbrl.tasks.transforms.plant import Delayed
from diffmbrl.tasks.transforms.squash import squashed

LOGIT_COST = 0.1  # a second, of actions squashed into their limits


class Memory(NamedTuple):
    """What an MPC keeps from one step of an episode to the next."""

    plan: Any  # for the window that begins now: shifted already
    carry: Any  # the planner's
    weights: Float[Array, " T1"]  # of the task
    t: Int[Array, ""]
    info: Info  # of the last step's updates: the last one's, but for `work`, `nonfinite` and `inner_iterations`, their sums


class MPC(eqx.Module):
    r"""Model predictive control: at each step, improve a plan of H steps from the state at hand and apply its first action.

    $$a_t = \pi^{(t)}_0(s_t),\qquad \pi^{(t)} = \mathrm{update}^k\big(\mathrm{shift}(\pi^{(t-1)}), s_t\big)$$

    An MPC is a policy with a memory: `rollout`, `value`, `expected`, `rollouts` take it, on any task with the same states and
    actions. The planner sees `model` alone, so the plant may be another: other masses, noise, late actions
    (`tasks/transforms/plant.py`). T and the weights are the plant's.

    The plan is shifted by one step, its last slice repeated; the planner's carry goes through the planner's own
    `shift(carry)`, which keeps what was learned of the problem (damping, temperature). The first step
    of an episode makes `first` updates. An update that the planner rejects leaves the plan of before, whose feedback, if it
    has any, still acts on the state. `window` (`planners/windows.py`) says what the plan makes of the end of the episode. With
    `hold` = k > 1 a plan is improved at every k-th step alone and followed in between: at k = H nothing is ever planned anew.

    A planner that draws needs `key`; it gets a fresh one at each update, which differs by the rollout's too. Without `key` the
    planner gets none, and so plans without the model's noise.
    Action limits are the model's: the planner keeps them, or they are moved into the model by `squashed` (`planning_task`).

    Shapes: as its task's. Cost of a step: k updates of the planner. Raises: `TypeError` if `planner` is not of kind "plan",
    `ValueError` if `horizon`, `iterations` or `first` is below 1, or `hold` not from 1 to H.
    Reference: Mayne, Rawlings, Rao, Scokaert 2000; Diehl, Bock, Schloeder 2005 (one iteration a step).

    >>> import jax
    >>> from diffmbrl import ILQR, rollout, tasks
    >>> mpc = MPC.init(ILQR(), tasks.pendulum_swingup(), horizon=20, iterations=2)
    >>> plant = tasks.pendulum_swingup(horizon=30, gravity=16.0)
    >>> rollout(mpc, plant, plant.initial(jax.random.key(0))).a.shape
    (30, 1)
    """

    planner: Any
    model: Task  # the planning task: H steps, without action limits
    plan: Any  # that an episode begins with
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
        """A controller that plans `horizon` steps of `model`, with `iterations` updates a step (`first` in the first one).

        A plan is followed for `hold` steps. `plan` is what it begins with, for the planning task that `planning_task` gives;
        the planner's first plan by default. `window` is `Ending()` unless given; `seen`, what it makes of the plant's state, is
        `FullState()`; `logit_cost` is that of `planning_task`.
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
        """The planner's, of this step: of the MPC's own key and, where the rollout has one, of that too."""
        if self.key is None:
            return None
        own = _fold(self.key, t)
        return own if key is None else _fold(own, jax.random.bits(key))

    def _within_limits(self, z: Float[Array, " m"]) -> Float[Array, " m"]:
        """The plant's action: squashed wherever the model's limits were moved into the planning task."""
        inside = jnp.isfinite(self.a_low) & jnp.isfinite(self.a_high) & ~jnp.isfinite(self.model.a_high)
        centre, half = centre_and_half(self.a_low, self.a_high)
        return jnp.where(inside, centre + half * jnp.tanh(z), z)


@jax.jit
def act(mpc: MPC, memory: Memory, s: State, key: PRNGKeyArray | None = None) -> tuple[Array, Memory]:
    """One step, compiled once for all numbers: what a real controller calls.

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
    """The state as the plant has it, now."""

    def __call__(self, s: State) -> tuple[State, int]:
        return s, 0


class Unaware(eqx.Module):
    """The state of a plant whose actions arrive late (`Delayed`), by a controller that knows nothing of that."""

    def __call__(self, s: Delayed) -> tuple[State, int]:
        return s.s, 0


class Predicted(eqx.Module):
    r"""The state in which the next action will arrive: $s_{t+d}$, by a model from $s_t$ and the d actions under way.

    Planning from there loses nothing to the delay but what the model gets wrong in d steps.
    """

    dynamics: Any  # of real actions, not of squashed ones

    def __call__(self, s: Delayed) -> tuple[State, int]:
        ahead = jax.lax.scan(lambda x, a: (self.dynamics(x, a), None), s.s, s.queue)[0]
        return ahead, s.queue.shape[0]


def planning_task(planner: Any, model: Task, horizon: int, *, window: Any = None, logit_cost: Any = LOGIT_COST) -> Task:
    r"""The task that an MPC's planner solves: `horizon` steps of `model`.

    For a planner that does not keep action limits (`keeps_limits`) they are moved into the plant, and the logit z of a
    limited action costs $\tfrac{1}{2} c\,dt\,z^2$ more: a plan that is warm started for hundreds of steps otherwise drifts to
    logits of hundreds, where tanh has no slope left, and no planner comes back from there. Median return of iLQR with H = 50
    and 3 updates a step on `cartpole-swingup`, 16 starts: -3360 without, -21.5, -19.3 and -12.1 with c = .001, .01 and .1.
    Raises: `ValueError` if the horizon is below 1.
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
    """A plan one step on, its last slice repeated."""
    return jax.tree.map(lambda x: jnp.concatenate([x[1:], x[-1:]]), plan)


def control(mpc: MPC, task: Task, s0: State, key: PRNGKeyArray | None = None) -> tuple[Trajectory, Info]:
    """The rollout of a controller, and what its planner said at each step: `Info` with a leading axis of T."""
    return recorded(mpc, task, s0, key, keep=lambda memory: memory.info)


def _summed(before: Info, info: Info) -> Info:
    """The last update's, with the counts of all."""
    counts = ("work", "nonfinite", "inner_iterations")
    return info._replace(**{n: jax.tree.map(jnp.add, getattr(before, n), getattr(info, n)) for n in counts})


def _fold(key: PRNGKeyArray, number: Any) -> PRNGKeyArray:
    return jax.random.fold_in(key, number)


@jax.jit
def _update(planner: Any, plan: Any, carry: Any, task: Task, s0: State, key: PRNGKeyArray | None) -> Any:
    """Of its own, so that it is traced once: for what it returns, and in the loop."""
    return planner.update(plan, carry, task, s0, key=key)
