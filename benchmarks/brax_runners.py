"""Brax's hopper and ant by short windows with a critic, as SHAC trains its runners: for a GPU, on the device at hand.

Windows of 32 steps, 256 environments, episodes of 1000 steps; at most `SECONDS` of updates each, measured every 50 updates:
Brax's return of 1000 steps from 128 held-out starts, and wall-clock seconds without compiling. Its quick form was run from
start to end on a CPU (hopper, spring backend, two updates); whole, it has not yet been run. The same from the command line,
at its own settings:

    diffmbrl compare brax-hopper --methods short-horizon --horizon 1000 --starts 256 --seeds 1
    diffmbrl learn brax-ant --agent ppo --real-steps 10000000
"""

import time

import jax
import numpy as np
import optax

import diffmbrl as d
from benchmarks.record import save, table
from diffmbrl.optimizers import Entropy, Noise
from diffmbrl.tasks.adapters.brax_rewards import brax_rewards

RUNNERS = ("brax-hopper", "brax-ant")
SECONDS, UPDATES, CHUNK, HORIZON = 1500.0, 2000, 50, 1000


def run(*, quick: bool) -> None:
    found = {}
    for name in RUNNERS[:1] if quick else RUNNERS:
        found[name] = learn(name, quick=quick)
        save("brax_runners", found, quick=quick)
    rows = [[name, row["returns"][0], max(row["returns"]), row["seconds"][-1]] for name, row in found.items()]
    print(table(["", "first return", "best", "s"], rows))


def learn(name: str, *, quick: bool) -> dict[str, list[float]]:
    """Returns on held-out starts and seconds spent, after each chunk of updates."""
    horizon, chunk, updates, environments = (4, 1, 2, 4) if quick else (HORIZON, CHUNK, UPDATES, 256)
    # The spring backend compiles soonest.
    task = d.tasks.make(name, horizon=horizon, backend="spring" if quick else "generalized")
    rule = d.OptaxSolver(optax.adam, learning_rate=2e-3, anneal=float(updates))
    noise = Noise(entropy=Entropy())
    window = 2 if quick else 32
    made = d.ShortHorizon(rule, window=window, environments=environments, noise=noise, discount=0.99)
    policy = d.Neural.init(task, hidden=d.tasks.TASKS[name].hidden, key=jax.random.key(0))
    starts, held_out = task.starts(jax.random.key(1), environments), task.starts(jax.random.key(2), 4 if quick else 128)

    @jax.jit
    def judge(policy, task, s0):
        return jax.vmap(lambda trajectory: brax_rewards(task, trajectory).sum())(d.rollouts(policy, task, s0)).mean()

    # The carry goes on from chunk to chunk.
    update = jax.jit(lambda policy, carry, task, s0, key: made.update(policy, carry, task, s0, key=key))
    carry = jax.jit(lambda policy, task: made.init(policy, task))(policy, task)
    compiled = update.lower(policy, carry, task, starts, jax.random.key(3)).compile()
    returns, seconds, spent = [float(judge(policy, task, held_out))], [0.0], 0.0
    begun = time.perf_counter()
    for k in range(updates):
        policy, carry, _ = compiled(policy, carry, task, starts, jax.random.fold_in(jax.random.key(4), k))
        if (k + 1) % chunk == 0:
            jax.block_until_ready(policy)
            spent += time.perf_counter() - begun
            returns.append(float(judge(policy, task, held_out)))
            seconds.append(spent)
            print(f"{name}: {k + 1} updates, {spent:.0f} s, return {np.round(returns[-1], 1)}", flush=True)
            if spent > SECONDS:
                break
            begun = time.perf_counter()
    return {"returns": returns, "seconds": seconds}
