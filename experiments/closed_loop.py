r"""How far from its start does a plan hold, alone, with iLQR's feedback, planned anew at each step, and how far a policy?

From a nominal start iLQR finds a plan of T steps, $a_t = \bar a_t + K_t (s_t - \bar s_t)$, the best of several from random
actions. Then the start is moved by $\epsilon \xi$, $\xi \sim N(0, I)$ in all states (rad, m and their rates), for growing
$\epsilon$, and the return is that of
* the plan: the actions $\bar a_t$, whatever happens;
* its feedback: the plan with its gains;
* MPC: the plan improved at each step by a few updates of iLQR, to the end of the episode;
* a trained policy: one network for all starts, trained on the task's starts moved by up to `spread` $\xi$.

A seed is a nominal start and a policy; medians over the directions $\xi$ of each.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from diffmbrl.core import Task
from diffmbrl.jobs.batch import BatchedPolicyRuns, draw_starts
from diffmbrl.methods import METHODS, solver
from diffmbrl.planners import MPC, Ending
from diffmbrl.planners.windows import Clocked
from diffmbrl.policies import OpenLoop
from diffmbrl.report.figures import name_ends, style_of
from diffmbrl.rollout import episode_return, returns, rollout
from diffmbrl.tasks import make, squashed
from experiments.record import array
from experiments.sheet import band, heading, log_limits, sheet, title

EXPECTED = (
    "Without feedback the plan fails after a small perturbation; iLQR's feedback holds in a neighbourhood, then fails as well; "
    "MPC holds throughout at nearly the optimal cost; the policy holds throughout, at a cost that is higher near the "
    "nominal start."
)
WHO = ("plan", "feedback", "MPC", "policy")
HELD = 2.0  # times the cost at no perturbation, up to which a controller is said to hold


class Size(NamedTuple):
    """How much is measured."""

    tasks: tuple[str, ...]
    horizon: int
    seeds: int
    radii: tuple[float, ...]
    directions: int
    tries: int  # plans from random actions, of which the best is taken
    plan_updates: int
    step_updates: int  # of MPC
    method: str  # that trains the policy
    policy_updates: int
    starts: int
    hidden: tuple[int, ...]
    spread: float


RADII = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 2.0)
FULL = Size(
    ("pendulum-swingup", "cartpole-swingup"), 100, 3, RADII, 12, 8, 200, 3, "krylov-newton", 100, 64, (32, 32), 0.5
)
QUICK = FULL._replace(
    tasks=FULL.tasks[:1],
    horizon=40,
    seeds=2,
    radii=RADII[1::2],
    directions=4,
    tries=2,
    plan_updates=40,
    step_updates=1,
    method="lbfgs",
    policy_updates=60,
    starts=16,
    hidden=(8, 8),
)


def measure(size: Size, parts: Any):
    """Costs and successes of all controllers on each task."""
    numbers: dict[str, Any] = {}
    for name in size.tasks:
        key = {"task": name} | {k: v for k, v in size._asdict().items() if k != "tasks"}
        numbers[name] = parts(key, lambda name=name: _measure(name, size))
        yield numbers


def _measure(name: str, size: Size) -> dict[str, Any]:
    task = make(name, horizon=size.horizon)
    nominal, perturbed = _starts(task, size)
    planner = solver(METHODS["ilqr"], task, rate=None, steps=size.plan_updates, continuation="default")
    # The planner that MPC uses is the one that has made the plan: grown to the whole horizon.
    mpc = MPC.init(planner, task, horizon=size.horizon, iterations=size.step_updates)
    keys = jax.random.split(jax.random.key(3), size.seeds)
    plans, carries = jax.jit(jax.vmap(lambda s, k: _plan(planner, task, mpc, s, k, size)))(nominal, keys)
    found = jax.jit(_follow)(task, _whole(task), mpc, plans, carries, perturbed, nominal)
    found["policy"] = _follow_policies(task, _policies(task, size), perturbed)
    costs, successes = ({who: np.asarray(x[i]) for who, x in found.items()} for i in (0, 1))
    return {
        "radii": size.radii,
        "nominal": -np.asarray(found["nominal"][0]),
        **{who: {"cost": _middle(-costs[who]), "success": np.mean(successes[who], axis=2).T} for who in WHO},
    }


def _starts(task: Task, size: Size) -> tuple[Any, Any]:
    """Nominal starts [seeds, n] and perturbed ones [seeds, radii, directions, n]: the same directions at every radius."""
    root = jax.random.key(0)
    nominal = task.starts(jax.random.fold_in(root, 0), size.seeds)
    directions = jax.random.normal(jax.random.fold_in(root, 1), (size.seeds, 1, size.directions, task.n))
    radii = jnp.asarray(size.radii)[:, None, None]
    return nominal, nominal[:, None, None] + radii * directions


def _whole(task: Task) -> Task:
    """The task, squashed, with the clock that MPC's plans have in their states: the same returns."""
    return Ending().task(squashed(task), task.horizon)


def _plan(planner: Any, task: Task, mpc: MPC, s: Any, key: Any, size: Size) -> tuple[Any, Any]:
    """The best plan from one start, and the planner's carry."""
    inside, s0 = mpc.model, _clocked(task, s)

    def attempt(key):
        plan = eqx.tree_at(lambda plan: plan.a, mpc.plan, jax.random.normal(key, mpc.plan.a.shape))
        start = (plan, planner.init(plan, inside))
        plan, carry = jax.lax.fori_loop(
            0, size.plan_updates, lambda _, state: planner.update(*state, inside, s0, key=None)[:2], start
        )
        return plan, carry, episode_return(plan, inside, s0)

    plans, carries, J = jax.vmap(attempt)(jax.random.split(key, size.tries))
    best = jnp.argmax(jnp.where(jnp.isfinite(J), J, -jnp.inf))
    return jax.tree.map(lambda x: x[best], (plans, carries))


def _clocked(task: Task, s: Any) -> Clocked:
    return Clocked(s, jnp.asarray(task.horizon, s.dtype))


def _follow(
    task: Task, whole: Task, mpc: MPC, plans: Any, carries: Any, perturbed: Any, nominal: Any
) -> dict[str, Any]:
    """Returns and successes of plan, feedback and MPC, [seeds, radii, directions] each; of the nominal start, [seeds]."""

    def seed(plan, carry, starts, s0):
        actions = OpenLoop(rollout(plan, whole, _clocked(task, s0)).a)
        controller = _Begun(mpc, plan, carry)
        ways = {
            "plan": lambda s: _earned(actions, whole, _clocked(task, s)),
            "feedback": lambda s: _earned(plan, whole, _clocked(task, s)),
            "MPC": lambda s: _earned(controller, task, s),
        }
        found = {who: jax.vmap(jax.vmap(way))(starts) for who, way in ways.items()}
        return found | {"nominal": _earned(plan, whole, _clocked(task, s0))}

    return jax.vmap(seed)(plans, carries, perturbed, nominal)


def _follow_policies(task: Task, policies: Any, perturbed: Any) -> Any:
    @jax.jit
    def run(policies, perturbed):
        return jax.vmap(lambda pi, starts: jax.vmap(jax.vmap(lambda s: _earned(pi, task, s)))(starts))(
            policies, perturbed
        )

    return run(policies, perturbed)


def _earned(policy: Any, task: Task, s: Any) -> tuple[Any, Any]:
    trajectory = rollout(policy, task, s)
    success = jnp.array(False) if task.success is None else task.success(trajectory.s_T)
    return returns(trajectory, task), success


class _Begun:
    """The MPC with the plan and the planner's carry of an episode before."""

    is_stateful = True

    def __init__(self, mpc: MPC, plan: Any, carry: Any):
        self.mpc, self.plan, self.carry = mpc, plan, carry

    def start(self, task: Task) -> Any:
        return self.mpc.start(task)._replace(plan=self.plan, carry=self.carry)

    def step(self, memory: Any, s: Any, *, key: Any = None) -> Any:
        return self.mpc.step(memory, s, key=key)


def _policies(task: Task, size: Size) -> Any:
    """One trained policy for each seed."""
    row = METHODS[size.method]
    train, test, keys = draw_starts(task, size.seeds, size.starts, 16, 0)
    noise = jax.random.normal(jax.random.key(2), train.shape)
    made = solver(row, task, rate=None, steps=size.policy_updates, continuation="default")
    lanes = BatchedPolicyRuns(
        [made], task, size.hidden, (train + size.spread * noise, test, keys), sequential=row.sequential
    )
    lanes.advance(0, size.policy_updates)
    return lanes.policies


def _middle(costs: np.ndarray) -> np.ndarray:
    """[radii, seeds]: medians over the directions; what is not finite is infinite."""
    return np.median(np.where(np.isfinite(costs), costs, np.inf), axis=2).T


def conclude(numbers: Any) -> str:
    """How far each holds, and what it costs near and far, medians over seeds."""
    return " ".join(_sentence(name, found) for name, found in numbers.items())


def _sentence(name: str, found: Any) -> str:
    radii, base = array(found["radii"]), float(np.median(array(found["nominal"])))
    said = []
    for who in WHO:
        cost = np.median(array(found[who]["cost"]), axis=1)
        success = np.mean(array(found[who]["success"]), axis=1)
        lost = np.flatnonzero(cost > HELD * base)
        reach = radii[-1] if not lost.size else radii[lost[0] - 1] if lost[0] else 0.0
        held = f"holds to {reach:g}" if reach else "holds nowhere"
        said.append(
            f"{who} {held} (cost {cost[0]:.3g} to {cost[-1]:.3g}, success {success[0]:.0%} to {success[-1]:.0%})"
        )
    return (
        f"{name}, nominal cost {base:.3g}; within {HELD:g} times of it, for perturbations from {radii[0]:g} to {radii[-1]:g}: "
        f"{'; '.join(said)}."
    )


STYLES = {who: style_of(who, index=i) for i, who in enumerate(WHO)}


def paint(numbers: Any) -> Any:
    """A row for each task: cost and success against the perturbation."""
    figure, axes = sheet(len(numbers), (0.95, 0.95))
    heading(figure, "Local and global closed loops: the start is moved away from the plan's")
    for row, (name, found) in zip(axes, numbers.items(), strict=True):
        radii = array(found["radii"])
        for axis, what in zip(row, ("cost", "success"), strict=True):
            values = {who: array(found[who][what]) for who in WHO}
            log_limits(axis, "x", [radii])
            if what == "cost":
                log_limits(axis, "y", list(values.values()))
            else:
                axis.set_ylim(-0.03, 1.03)
            axis.set_xlabel("perturbation of the start")
            axis.set_ylabel({"cost": "cost", "success": "share of successes"}[what])
            lines = [band(axis, STYLES[who], radii, y) for who, y in values.items()]
            name_ends(axis, lines)
            title(axis, f"{name}: {what}")
    return figure
