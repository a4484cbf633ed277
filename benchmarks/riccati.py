"""The Riccati sweep by scan and by associative scan, and the cost of an implicit gradient relative to the solve.

Two tables. The sweeps on random LQR problems of n states and max(1, n / 3) actions, float32, with compile time. Then iLQR to
its optimum, where J changes no more (1e-12), and to 0.1% of it, on the systems of trajectory_problems.py, float64, T = 100,
against the gradient of one function of its plan with respect to the start and every leaf of the task, in CPU time; the
gradient's error is its distance to central differences of neighbours solved anew.

Products of a matrix and a vector at all steps at once are one product, not arithmetic: 35 us of 410 for the quadrotor's
gradient. Actions at a limit answer through the Hessians that are there. Two thirds of the Hamiltonian's tangents could be
saved where its Hessian has zeros for all numbers: another 35 us, for which no pattern of zeros is worked out.
"""

import time
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import diffmbrl as d
from benchmarks.record import save, table
from benchmarks.timing import compile_seconds, medians
from benchmarks.trajectory_problems import PROBLEMS, problem
from diffmbrl.diagnostics import in_double
from diffmbrl.planners import implicit
from diffmbrl.second_order.linearize import Linearization, linearize
from diffmbrl.second_order.parallel_riccati import parallel_riccati
from diffmbrl.second_order.riccati import riccati

MOST = {"pendulum": 100, "cart-pole": 800, "acrobot": 300, "quadrotor": 60}  # updates in which iLQR converges
REPEATS = 10  # of a solve or a gradient in one program: the call from Python is no part of either


def run(*, quick: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", False)  # a compile time that comes from a cache is none
    sweeps = _sweeps((100,) if quick else (100, 1000), (2, 4) if quick else (2, 4, 12))
    with jax.enable_x64(True):
        gradients = _gradients(["pendulum"] if quick else list(PROBLEMS), rounds=5 if quick else 9)
    save("riccati", {"sweeps": sweeps, "implicit": gradients}, quick=quick)


def _sweeps(horizons: tuple[int, ...], sizes: tuple[int, ...]) -> dict[str, Any]:
    rows = []
    for horizon in horizons:
        for n in sizes:
            m = max(1, n // 3)
            task = d.tasks.random_lqr(jax.random.key(n), n, m, stability="marginal", horizon=horizon)
            lin = jax.jit(_along)(task, task.initial(jax.random.key(0)))
            damping = jnp.asarray(0.1, lin.A.dtype)
            scanned, parallel = jax.jit(riccati), jax.jit(parallel_riccati)
            compiling = [_cpu_seconds(f, lin, damping) for f in (scanned, parallel)]
            seconds = medians(
                {"scan": partial(scanned, lin, damping), "parallel": partial(parallel, lin, damping)}, rounds=9
            )
            apart = jnp.max(jnp.abs(scanned(lin, damping).K - parallel(lin, damping).K))
            rows.append(
                [f"{horizon}", f"{n}", seconds["scan"] * 1e3, seconds["parallel"] * 1e3]
                + [seconds["parallel"] / seconds["scan"], *compiling, float(apart)]
            )
    head = ["T", "n", "scan ms", "parallel ms", "ratio", "scan compile CPU s", "parallel compile CPU s", "gains apart"]
    print(f"The Riccati sweep, float32, {jax.default_backend()}\n\n{table(head, rows)}\n")
    return {"device": jax.default_backend(), "columns": head, "rows": rows}


def _along(task: d.Task, s0: jax.Array) -> Linearization:
    return linearize(task, d.rollout(d.OpenLoop.zeros(task), task, s0))


def _cpu_seconds(function: Any, *arguments: Any) -> float:
    begun = time.process_time()
    jax.block_until_ready(function(*arguments))
    return time.process_time() - begun


def _gradients(names: list[str], *, rounds: int) -> dict[str, Any]:
    rows = []
    for name in names:
        task, planner = problem(name, 100), in_double(d.ILQR())
        s0 = task.initial(jax.random.key(0)) + 0.03
        rest = d.Affine.zeros(task)
        plan, history = d.solve(planner, rest, task, s0, None, MOST[name], relative=1e-12)
        J = history.info.J
        near = int(np.argmax(J - J[-1] >= -1e-3 * abs(J[-1])))
        gradient, values = jax.jit(jax.grad(smooth_loss, argnums=(1, 2))), jax.jit(smooth_loss)
        compiling = compile_seconds(gradient, plan, task, s0)
        calls: dict[str, Any] = {
            label: partial(_solves, planner, rest, task, s0, jnp.int32(updates))
            for label, updates in {"near": near, "solve": history.updates}.items()
        }
        calls |= {
            label: partial(jax.jit(partial(_repeated, f)), plan, task, s0)
            for label, f in {"gradient": gradient, "value": values}.items()
        }
        jax.block_until_ready([call() for call in calls.values()])
        seconds = medians(calls, rounds=rounds, clock=time.process_time)
        seconds = {label: spent / REPEATS for label, spent in seconds.items()}
        rows.append(
            [name, f"{history.updates}", seconds["solve"] * 1e3, seconds["gradient"] * 1e3]
            + [seconds[what] / seconds["solve"] for what in ("gradient", "value")]
            + [f"{near}", seconds["gradient"] / seconds["near"]]
            + [largest_error(gradient, plan, task, s0), compiling]
        )
    head = ["", "updates", "solve ms", "gradient ms", "of a solve", "its value"]
    head += ["to .1%", "of that", "error", "compile s"]
    print(f"Implicit gradients of iLQR's plan, T = 100, float64\n\n{table(head, rows)}")
    return {"columns": head, "rows": rows}


def _solved(planner: Any, plan: Any, task: d.Task, s0: jax.Array, updates: int | jax.Array) -> Any:
    def update(_, state):
        return planner.update(*state, task, s0, key=None)[:2]

    return jax.lax.fori_loop(0, updates, update, (plan, planner.init(plan, task)))[0]


@jax.jit
def _solves(planner: Any, plan: Any, task: d.Task, s0: jax.Array, updates: jax.Array) -> jax.Array:
    def one(i, x):
        # A solve that depends on the last, so that none is hoisted out of the loop.
        moved = eqx.tree_at(lambda plan: plan.a, plan, plan.a + 1e-30 * x)
        return jnp.sum(_solved(planner, moved, task, s0, updates).a)

    return jax.lax.fori_loop(0, REPEATS, one, jnp.zeros(()))


def _repeated(function: Any, plan: Any, task: d.Task, s0: jax.Array) -> jax.Array:
    def one(i, x):
        return sum(jnp.sum(y) for y in jax.tree.leaves(function(plan, task, s0 + 1e-30 * x)))

    return jax.lax.fori_loop(0, REPEATS, one, jnp.zeros(()))


def smooth_loss(plan: d.Affine, task: d.Task, s0: jax.Array) -> jax.Array:
    """A function of actions and states in which every time step counts differently."""
    out = implicit(plan, task, s0)
    t = jnp.linspace(0.0, 1.0, task.horizon)
    return jnp.sum(jnp.cos(3 * t)[:, None] * out.plan.a) + jnp.sum(jnp.sin(5 * t)[:, None] * out.plan.s) + out.J


def largest_error(gradient: Any, plan: d.Affine, task: d.Task, s0: jax.Array, *, eps: float = 1e-2) -> float:
    """Of the derivatives in the reward's weights and the start, relative to the largest, against central differences.

    Of fourth order and wide: a neighbour is solved to some 1e-7, since rounding alone moves the end of a swing-up, and that
    over `eps` is the error of the difference. With second order and 1e-3 it was 5e-4 on the acrobot, and grew as 1 / eps.
    """
    by_task, by_start = gradient(plan, task, s0)
    at_plan = jax.jit(lambda task, s0: smooth_loss(_resolved(plan, task, s0), task, s0))
    w = task.reward.w  # type: ignore[attr-defined]

    def at(i, change):
        """At a changed start, or at changed weights, relative to what they are."""
        if i < s0.size:
            return at_plan(task, s0.at[i].add(change))
        return at_plan(eqx.tree_at(lambda t: t.reward.w, task, w.at[i - s0.size].multiply(1 + change)), s0)

    found = jnp.concatenate([by_start, by_task.reward.w * w])
    wanted = []
    for i in range(found.size):
        near, far = (at(i, step) - at(i, -step) for step in (eps, 2 * eps))
        wanted.append((8 * near - far) / (12 * eps))
    scale = jnp.concatenate([jnp.ones_like(s0), w])
    found, wanted = (np.asarray(x / scale) for x in (found, jnp.asarray(wanted)))
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def _resolved(plan: d.Affine, task: d.Task, s0: jax.Array) -> d.Affine:
    """The neighbour's own optimum by iLQR from the plan; open loop, a swing-up strays from it by rounding alone."""
    # With gains of its own: those that iLQR ends with are damped to nothing by its last, failed searches.
    lin = linearize(task, d.rollout(plan, task, plan.s[0]))
    plan = d.Affine(riccati(lin, jnp.zeros((), plan.a.dtype)).K, plan.a, plan.s)
    return _solved(in_double(d.ILQR()), plan, task, s0, updates=200)
