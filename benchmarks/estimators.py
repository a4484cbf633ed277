"""Each estimator's gradient against its own forward and backward passes, in CPU time: at most 1.3 times their sum.

The passes are what no implementation can do without: of BPTT in all its forms, a plain BPTT gradient of the same policy, noise
included where it has some; of the likelihood ratio, the rollouts of the noisy policy and one reverse product of log pi at
the states met; of mixtures, the noisy BPTT gradient and that product (and a second rollout where a test takes one); of
evolution, the rollouts of 2B policies that are given.
"""

import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import diffmbrl as d
from benchmarks.record import save, table
from benchmarks.timing import medians
from diffmbrl.gradients import Decoupled, Smoothed
from diffmbrl.gradients.registry import ESTIMATORS, NOISE
from diffmbrl.rollout import split_keys

MOST = 1.3
EVOLUTION = ("evolution", "evolution-rank")
MIXTURES = ("inverse-variance", "inverse-variance-per-step", "total-propagation", "alpha-order", "discontinuity-tested")


def run(*, quick: bool) -> None:
    horizon, batches = (50, (8,)) if quick else (200, (32, 256))
    rows = [row for batch in batches for row in _measure(horizon, batch, rounds=3 if quick else 5)]
    head = ["estimator", "B", "ms", "over its passes", "over BPTT"]
    print(f"one gradient, cart-pole, MLP 2x64, T = {horizon}, float32, CPU time\n\n{table(head, rows)}")
    above = [f"{row[0]} at B = {row[1]}: {row[3]:.2f}" for row in rows if row[3] > MOST]
    print(f"\nabove {MOST} times its passes: {'; '.join(above) if above else 'none'}")
    save("estimators", {"horizon": horizon, "most": MOST, "columns": head, "rows": rows}, quick=quick)


def _measure(horizon: int, batch: int, *, rounds: int) -> list[list[Any]]:
    task = d.tasks.cartpole_balance(horizon=horizon)
    policy = d.Neural.init(task, hidden=(64, 64), key=jax.random.key(0))
    s0, key = task.starts(jax.random.key(1), batch), jax.random.key(2)
    noisy = Smoothed(d.BPTT(), std=NOISE).around(policy, task)
    paths = jax.jit(d.rollouts)(noisy, task, s0, key)
    many = jax.tree.map(lambda x: jnp.broadcast_to(x, (2 * batch, *x.shape)), policy)
    twice = jnp.tile(s0, (2, 1))

    def score(policy, s, a):
        return jax.grad(lambda pi: jnp.sum(jax.vmap(jax.vmap(pi.log_prob))(s, a)))(policy)

    def each(policies, s0):
        return jax.vmap(lambda pi, s, k: d.episode_return(pi, task, s, k, remat=None))(
            policies, s0, split_keys(key, s0)
        )

    passes = {
        "bptt": (d.BPTT(), policy, task, s0, None),
        "noisy bptt": (d.BPTT(), noisy, task, s0, key),
        "noisy rollouts": (partial(d.rollouts, remat=None), noisy, task, s0, key),
        "score": (score, noisy, paths.s, paths.a),
        "rollouts of 2B policies": (each, many, twice),
    }
    made = {name: row.make(task) for name, row in ESTIMATORS.items()} | {"decoupled": Decoupled(task.dynamics)}
    given = {f"estimator {name}": (estimator, policy, task, s0, key) for name, estimator in made.items()}
    calls = {}
    for name, (function, *arguments) in (passes | given).items():
        calls[name] = partial(jax.jit(lambda *x, f=function: f(*x)), *arguments)
        jax.block_until_ready(calls[name]())
    t = medians(calls, rounds=rounds, clock=time.process_time)
    return [
        [
            name,
            str(batch),
            t[f"estimator {name}"] * 1e3,
            t[f"estimator {name}"] / sum(t[p] for p in _passes(name)),
            t[f"estimator {name}"] / t["bptt"],
        ]
        for name in made
    ]


def _passes(name: str) -> tuple[str, ...]:
    """Which of the passes are an estimator's own."""
    if name in EVOLUTION:
        return ("rollouts of 2B policies",)
    if name.startswith("likelihood-ratio"):
        return ("noisy rollouts", "score")
    if name in MIXTURES:
        return ("noisy bptt", "score", "noisy rollouts") if name == "discontinuity-tested" else ("noisy bptt", "score")
    return ("noisy bptt",) if name == "bptt-smoothed" else ("bptt",)
