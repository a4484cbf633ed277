"""Model-based RL 1.5: real steps and CPU seconds to solve the cart-poles of mbrl-lib and of PETS, by planner, five seeds.

* `cartpole-continuous`: solved by an episode of return 200, of 200 steps. mbrl-lib's PETS (7 networks of 4x200, CEM of 350
  sequences x 20 particles x 15 steps x 5 iterations) was measured at about 490 real steps, 325 CPU s, 3.4 CPU s an action.
* `pets-cartpole`: solved by an episode above 170, of 200 steps. The paper's curve: about 168 after 1200 steps, 180 after 2400.

All plan through five networks of 2x64 (but for the arm that says 2x128, and trains longer), warm start, one refit every 50
steps. A seed runs by itself; CPU seconds are the process's, of fits, plans and steps, compile time apart: `to solve` up to the
end of the first 50 steps in which it was solved.
`an action` is that of a planned step alone. Evaluations are of 8 fresh starts with the
last model.

The reward of the balancing cart-pole is 1 until the fall. "margin" plans on `tasks.soft_margin(task)`, "raw" on the task.

Absolute times scale with the machine: `rollout` is a rollout of a policy of 2x64, 32 starts, T = 200 (1.04 ms where mbrl-lib
was measured). Seeds that are done are kept in the results file: an interrupted run goes on from there.
"""

import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
import optax

import diffmbrl as d
from benchmarks.record import path, save, table
from benchmarks.timing import medians
from diffmbrl import tasks
from diffmbrl.agents import EnsembleTrainer, System, learn
from diffmbrl.agents.mpc_agent import MPCAgent
from diffmbrl.core import Task
from diffmbrl.models import NetworkDynamics, Training, TSInfinity
from diffmbrl.planners import CEM, Coloured, Receding, Sampling, Shooting

SEEDS = 5
PEER = {"real steps": 490, "CPU s": 325.0, "CPU s an action": 3.4, "rollout": 1.04e-3, "SAC update": 14e-3}
HEAD = [
    "arm",
    "solved",
    "at real steps",
    "CPU s to solve",
    "in all",
    "ms an action",
    "of mbrl-lib",
    "evaluation",
    "worst",
]


class Case(NamedTuple):
    """A task and when it is solved."""

    name: str
    solved: float
    real_steps: int


BALANCE = Case("cartpole-continuous", 200, 400)
SWING = Case("pets-cartpole", 170, 1500)


def _cem(particles: int | None = 5) -> Sampling:
    return Sampling(CEM(elites=6), samples=60, particles=particles)


def _icem() -> Sampling:
    return Sampling(CEM(elites=6), draw=Coloured(2.0), samples=60, keep=3, particles=5, share=0.5)


def _adam() -> Shooting:
    return Shooting(d.OptaxSolver(optax.adam, learning_rate=0.1), particles=5)


def _larger() -> EnsembleTrainer:
    training = Training(epochs=100, patience=20, batch=32)
    return EnsembleTrainer(training, members=5, elites=5, hidden=(128, 128), model=NetworkDynamics.init)


def _agent(task: Task, planner: Any = None, **options: Any) -> MPCAgent:
    propagation = None if planner is None else TSInfinity()
    return MPCAgent(task, planner, window=Receding(), propagation=propagation, **options)


ARMS: dict[str, tuple[Case, Callable[[Task], MPCAgent]]] = {
    "balance, iLQR, margin": (BALANCE, lambda task: _agent(tasks.soft_margin(task), horizon=50)),
    "swing, iLQR": (SWING, lambda task: _agent(task, warmup=200)),
    "swing, iLQR, 2x128": (SWING, lambda task: _agent(task, warmup=200, world=_larger())),
    "balance, CEM, raw": (BALANCE, lambda task: _agent(task, _cem(), horizon=25, iterations=2, first=2)),
    "balance, CEM, margin": (
        BALANCE,
        lambda task: _agent(tasks.soft_margin(task), _cem(), horizon=25, iterations=2, first=2),
    ),
    "balance, Adam, margin": (
        BALANCE,
        lambda task: _agent(tasks.soft_margin(task), _adam(), horizon=50, iterations=5),
    ),
    "swing, iCEM": (SWING, lambda task: _agent(task, _icem(), horizon=20, iterations=2, first=2, warmup=200)),
    "swing, Adam": (SWING, lambda task: _agent(task, _adam(), iterations=5, warmup=200)),
}


def run(*, quick: bool) -> None:
    seeds = 1 if quick else SEEDS
    done = _kept(quick)
    rollout = _rollout_seconds()
    for name, (case, make) in list(ARMS.items())[:1] if quick else ARMS.items():
        task = d.tasks.make(case.name)
        agent = make(task)
        for seed in range(seeds):
            if f"{name}, {seed}" not in done:
                case = case._replace(real_steps=200) if quick else case
                done[f"{name}, {seed}"] = one(agent, task, case, seed)
                save("mbrl", _result(done, rollout), quick=quick)
        print(table(HEAD, [_row(name, done)]).splitlines()[-1], flush=True)
    rows = [_row(name, done) for name in ARMS if f"{name}, 0" in done]
    print(f"\nRollout {1e3 * rollout:.3g} ms; mbrl-lib: {PEER}\n\n{table(HEAD, rows)}")
    save("mbrl", _result(done, rollout), quick=quick)


def one(agent: MPCAgent, task: Task, case: Case, seed: int) -> dict[str, Any]:
    """One seed: when it was solved, what that cost, and what it earned."""
    keys = jax.random.split(jax.random.key(1000 + seed), 1)
    learned = learn(agent, task, keys, real_steps=case.real_steps, evaluations=8, evaluate_every=10**6)
    found = learned.records
    solved, cpu, episodes = None, None, []
    for record in found:
        first = record["real_steps"] - record["returns"].shape[1]
        for at in np.flatnonzero(record["ended"][0]):
            J = float(record["returns"][0, at])
            episodes.append([first + int(at) + 1, J])
            if case.solved <= J and solved is None:
                solved, cpu = first + int(at) + 1, record["cpu_seconds"]
    return {
        "solved": solved,
        "cpu_to_solve": cpu,
        "cpu": found[-1]["cpu_seconds"],
        "cpu_action": _action_seconds(agent, task, learned.carry),
        "episodes": episodes,
        "evaluation": found[-1]["evaluation"][0].tolist(),
        "model_error": [float(r["model_error"][0]) for r in found[1:]],
        "rejected": int(sum(r["rejected"].sum() for r in found)),
        "refused": int(sum(r.get("refused", np.zeros(1)).sum() for r in found)),
    }


def _action_seconds(agent: MPCAgent, task: Task, carry: Any) -> float:
    """CPU seconds of a planned step, the mean over an episode in one scan."""
    one = jax.tree.map(lambda x: x[0], carry)
    # An episode that does not end early: every step is planned.
    task = eqx.tree_at(lambda t: t.done, System(task).plant, None, is_leaf=lambda x: x is None)

    @jax.jit
    def follow(agent, carry, s0, key):
        return d.rollout(agent.best(carry, task), task, s0, key, remat=None).s_T  # which depends on all actions

    s0, key = task.initial(jax.random.key(0)), jax.random.key(1)
    jax.block_until_ready(follow(agent, one, s0, key))
    begun = time.process_time()
    jax.block_until_ready(follow(agent, one, s0, key))
    return (time.process_time() - begun) / task.horizon


def _rollout_seconds() -> float:
    task = d.tasks.cartpole_balance(horizon=200)
    policy = d.Neural.init(task, hidden=[64, 64], key=jax.random.key(0))
    call = jax.jit(lambda policy, s0: d.mean_return(policy, task, s0))
    s0 = task.starts(jax.random.key(1), 32)
    jax.block_until_ready(call(policy, s0))
    return medians({"rollout": lambda: call(policy, s0)}, clock=time.process_time)["rollout"]


def _kept(quick: bool) -> dict[str, Any]:
    file = path("mbrl", quick=quick)
    return json.loads(file.read_text())["result"]["seeds"] if file.exists() and not quick else {}


def _result(done: dict[str, Any], rollout: float) -> dict[str, Any]:
    rows = [_row(name, done) for name in ARMS if f"{name}, 0" in done]
    return {"columns": HEAD, "rows": rows, "seeds": done, "rollout": rollout, "mbrl-lib": PEER}


def _row(name: str, done: dict[str, Any]) -> list[Any]:
    found = [done[key] for seed in range(SEEDS) if (key := f"{name}, {seed}") in done]
    solved = [x for x in found if x["solved"] is not None]
    evaluation = np.asarray([x["evaluation"] for x in found])

    def median(key: str, of: list[dict[str, Any]]) -> Any:
        return float(np.median([x[key] for x in of])) if of else "-"

    cpu = median("cpu_to_solve", solved)
    return [
        name,
        f"{len(solved)} of {len(found)}",
        "-" if not solved else f"{median('solved', solved):.0f}, at most {max(x['solved'] for x in solved)}",
        cpu,
        median("cpu", found),
        1e3 * median("cpu_action", found),
        f"{100 * cpu / PEER['CPU s']:.2g}%" if solved and name.startswith("balance") else "-",
        float(evaluation.mean()),
        float(evaluation.min()),
    ]
