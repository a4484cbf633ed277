"""Time of a step of receding-horizon control on one core, and the return of the loop against that of the open-loop plan.

iLQR with H = 50, warm started, 1, 2 and 3 updates a step, set up as by `diffmbrl plan --mpc`; float32, one start at a time.
* from Python: the state goes in, the action comes out, step by step, as a real controller would call it. Wall-clock and CPU
  time of every step but the first, which makes 50 updates; on a busy machine the second is the one to read;
* in one scan: the same loop with its plant, compiled whole.

Returns: medians over starts, of the plan without its feedback, with it, and of the controller, on the model and on a plant with
one parameter 20% larger. Pin the process to a core (`taskset -c 1 python -m benchmarks mpc`) to time one.
"""

import os
import time
from typing import Any

import equinox as eqx
import jax
import numpy as np

import diffmbrl as d
from benchmarks.record import save, table
from benchmarks.timing import medians
from diffmbrl.core import Task, is_planner
from diffmbrl.jobs.batch import BatchedPlanRuns
from diffmbrl.jobs.plan import FIRST, WINDOW
from diffmbrl.methods import METHODS, solver
from diffmbrl.planners import MPC, act

TASKS = {"pendulum-swingup": "gravity", "cartpole-swingup": "m_c", "quadrotor2d": "mass"}
UPDATES = (1, 2, 3)
HERTZ = 50.0
TIMES = [
    "task, updates a step",
    "median",
    "95%",
    "99%",
    "max",
    "CPU median",
    "CPU 99%",
    "in a scan",
    "ms; Hz at 99% CPU",
]
RETURNS = ["task, plant", "plan", "with feedback", *(f"MPC, {k}" for k in UPDATES)]


def run(*, quick: bool) -> None:
    steps, episodes, starts = (20, 1, 2) if quick else (100, 5, 16)
    timed, earned, raw, cores = [], [], {}, len(os.sched_getaffinity(0))
    for name in list(TASKS)[:1] if quick else TASKS:
        task = d.tasks.make(name, horizon=steps)
        controllers = {k: controller(name, task, k) for k in (UPDATES[:1] if quick else UPDATES)}
        for k, mpc in controllers.items():
            wall, cpu = step_times(mpc, task, episodes)
            scan = scan_time(mpc, task)
            raw[f"{name}, {k}"] = {"wall": quantiles(wall), "cpu": quantiles(cpu), "scan": scan}
            ms = [1e3 * x for x in (*np.percentile(wall, [50, 95, 99, 100]), *np.percentile(cpu, [50, 99]), scan)]
            timed.append([f"{name}, {k}", *map(float, ms), float(1 / np.percentile(cpu, 99))])
            print(table(TIMES, timed[-1:]).splitlines()[-1], flush=True)
        plants = {"model": task, f"{TASKS[name]} x 1.2": mismatched(name, task)}
        earned += returns(task, plants, controllers, starts, 20 if quick else METHODS["ilqr"].steps)
        result = {"hertz": HERTZ, "cores": cores, "columns": TIMES, "rows": timed, "times": raw}
        save("mpc", result | {"return_columns": RETURNS, "returns": earned}, quick=quick)
    print(f"\nms a step, H = {WINDOW}, {cores} core(s), float32\n\n{table(TIMES, timed)}\n\n{table(RETURNS, earned)}")


def quantiles(seconds: list[float]) -> list[float]:
    """0%, 5%, ... 100%."""
    return [float(f"{x:.4g}") for x in np.percentile(seconds, np.arange(0, 101, 5))]


def controller(name: str, task: Task, updates: int) -> MPC:
    """iLQR in the loop."""
    window = d.tasks.make(name, horizon=WINDOW)
    made = solver(METHODS["ilqr"], window, rate=None, steps=FIRST, continuation="default")
    return MPC.init(made, task, horizon=WINDOW, iterations=updates, first=FIRST)


def mismatched(name: str, task: Task) -> Task:
    """The task on dynamics with one parameter 20% larger."""
    parameter = TASKS[name]
    return eqx.tree_at(lambda t: getattr(t.dynamics, parameter), task, 1.2 * getattr(task.dynamics, parameter))


def step_times(mpc: MPC, task: Task, episodes: int) -> tuple[list[float], list[float]]:
    """Seconds of each step but the first of an episode, by the wall's clock and by the process's."""
    plant = jax.jit(lambda task, s, a: task.dynamics(s, a))
    wall, cpu = [], []
    for episode in range(episodes):
        s, memory = task.initial(jax.random.key(episode)), mpc.start(task)
        for t in range(task.horizon):
            began = time.perf_counter(), time.process_time()
            a, memory = act(mpc, memory, s)
            a.block_until_ready()
            if t > 0:
                wall.append(time.perf_counter() - began[0])
                cpu.append(time.process_time() - began[1])
            s = jax.block_until_ready(plant(task, s, a))
    return wall, cpu


def scan_time(mpc: MPC, task: Task) -> float:
    """Median seconds a step of the compiled loop: of a whole episode less that of its first step, over the rest."""
    loop = jax.jit(d.rollout)
    short = d.tasks.make(task.name, horizon=1)
    s0 = task.initial(jax.random.key(0))
    found = medians({"all": lambda: loop(mpc, task, s0).a, "first": lambda: loop(mpc, short, s0).a}, rounds=5)
    return (found["all"] - found["first"]) / (task.horizon - 1)


def returns(
    task: Task, plants: dict[str, Task], controllers: dict[int, MPC], starts: int, updates: int
) -> list[list[Any]]:
    """A row for each plant: medians over the starts."""
    s0 = task.starts(jax.random.key(7), starts)
    made = solver(METHODS["ilqr"], task, rate=None, steps=updates, continuation="default")
    plans, inside = planned(made, task, s0, updates)
    rows = []
    for label, plant in plants.items():
        outside = plant if not is_planner(made) or made.keeps_limits else d.tasks.squashed(plant)
        bare, fed = follow_plans(plans, inside, outside, s0)
        loops = [np.median(jax.jit(d.episode_returns)(mpc, plant, s0)) for mpc in controllers.values()]
        cells = [float(x) for x in (np.median(bare), np.median(fed), *loops)]
        rows.append([f"{task.name}, {label}", *cells, *[float("nan")] * (len(UPDATES) - len(loops))])
    return rows


def planned(made: Any, task: Task, s0: Any, updates: int) -> tuple[Any, Task]:
    """A plan from each start, and the task that they are plans of."""
    lanes = BatchedPlanRuns([made], task, (s0[None], s0[:1], jax.random.split(jax.random.key(0), 1)))
    lanes.advance(0, updates)
    return lanes.train[0], lanes.task


@jax.jit
def follow_plans(plans: Any, inside: Task, outside: Task, s0: Any) -> tuple[Any, Any]:
    """The returns of the actions alone and of the plan with its feedback, [starts] each."""

    def one(plan, s):
        actions = d.OpenLoop(d.rollout(plan, inside, s).a)
        return d.episode_return(actions, outside, s), d.episode_return(plan, outside, s)

    return jax.vmap(one)(plans, s0)
