"""MBPO to the best return: real steps and CPU seconds on the balancing cart-pole and the inverted pendulum, five seeds.

Real steps are those before the first evaluation in which every one of eight starts earns the best return, T; the first 200
are random actions. CPU seconds are the process's, for five seeds side by side, evaluations included and compilation apart;
"alone" is one seed from the start, with all there is to compile. "Kept" is the share of the later evaluations' starts that
earned T as well: reaching is not keeping. The agent is `mbpo` of the registry, with its defaults. mbrl-lib's figures are
quoted, measured once on one core: its defaults, one evaluation episode; its inverted pendulum has not been measured.
"""

import time
from typing import Any

import jax
import numpy as np

import diffmbrl as d
from benchmarks.record import save, table
from diffmbrl.agents import Agent, learn
from diffmbrl.agents.registry import make_agent

SEEDS, EVALUATIONS = 5, 8
MBRL_LIB = {"cartpole-continuous": (5600, 208.0)}  # real steps, CPU s
STEPS = {"cartpole-continuous": 600, "inverted-pendulum": 1200}


def run(*, quick: bool) -> None:
    rows, result = [], {}
    head = ["task", "seeds at T", "real steps", "CPU s a seed", "kept", "alone, compilation too"]
    for name, steps in STEPS.items():
        task = d.tasks.make(name)
        made = make_agent("mbpo", task, {"updates": 20, "units": 8} if quick else {})
        keys = jax.random.split(jax.random.key(0), 2 if quick else SEEDS)
        steps = 300 if quick else steps
        together = measured(made, task, keys, steps)
        first = together["reached"][0]
        # Its program has one seed and is another: nothing of it has been compiled.
        alone = measured(made, task, keys[:1], steps if first is None else together["real_steps"][first])
        result[name] = {"alone": alone, "together": together, "mbrl_lib": MBRL_LIB.get(name)}
        rows.append([name, *summary(task, together), alone["cpu"][-1]])
        if name in MBRL_LIB:
            rows.append(["  mbrl-lib (quoted)", "-", *map(float, MBRL_LIB[name]), "-", "-"])
        save("mbpo", {"columns": head, "rows": rows, "runs": result}, quick=quick)  # a long run keeps what it has
    print(table(head, rows))


def measured(made: Agent, task: d.Task, keys: Any, steps: int) -> dict[str, Any]:
    """Evaluations and CPU seconds of each record, and in which each seed first earned the best return from all starts."""
    begun, cpu = time.process_time(), []
    learned = learn(
        made,
        task,
        keys,
        real_steps=steps,
        evaluations=EVALUATIONS,
        on_record=lambda *_: cpu.append(time.process_time() - begun),
    )
    found = np.stack([record["evaluation"] for record in learned.records])  # [records, S, starts]
    best = np.all(found >= task.horizon, axis=2)
    reached = [int(np.argmax(best[:, i])) if best[:, i].any() else None for i in range(len(keys))]
    return {
        "real_steps": [record["real_steps"] for record in learned.records],
        "evaluation": found.mean(axis=2).tolist(),
        "best_starts": (found >= task.horizon).mean(axis=2).tolist(),
        "cpu": cpu,
        "reached": reached,
        "rejected": [np.asarray(record.get("imagined_rejected", 0)).tolist() for record in learned.records],
    }


def summary(task: d.Task, run: dict[str, Any]) -> list[Any]:
    """How many seeds earned T; median real steps and CPU seconds a seed to there, compilation apart; what was kept."""
    reached = [i for i in run["reached"] if i is not None]
    if not reached:
        return [f"0 of {len(run['reached'])}", "-", "-", "-"]
    # The first iteration compiles: it is counted as one of the later ones.
    each = np.diff(run["cpu"])
    iteration = float(np.median(each[1:])) / len(run["reached"])
    shares = np.asarray(run["best_starts"])
    kept = [shares[i:, seed].mean() for seed, i in enumerate(run["reached"]) if i is not None]
    steps = float(np.median([run["real_steps"][i] for i in reached]))
    return [
        f"{len(reached)} of {len(run['reached'])}",
        steps,
        float(np.median(reached)) * iteration,
        float(np.mean(kept)),
    ]
