"""Brax's reacher and inverted pendulum learned by two of our methods, and by Brax's own APG, PPO and SAC.

Ours: `mpc`, iLQR through an ensemble learned from 600 real steps, and short windows with a critic through Brax. All on the
generalized backend, three seeds, and judged alike: Brax's return of an episode from 32 held-out starts (reacher: 50 steps;
pendulum: 1000 steps, 1 each). CPU seconds are of the process, from building to the last update; compiling is in those of the
first seed, and in the later ones as far as nothing was kept of it. On the pendulum Brax's reward has no gradient, so that ours
learn from `brax-inverted-pendulum-shaped`, and APG, as it must, nothing. Rows are kept as they come: a stopped run goes on.
"""

import functools
import json
import time
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import diffmbrl as d
from benchmarks.brax_shim import trainers
from benchmarks.record import path, save, table
from diffmbrl.agents import learn
from diffmbrl.agents.registry import make_agent as make_agent
from diffmbrl.optimizers import Entropy, Noise
from diffmbrl.optimizers.clipped import clipped_adam
from diffmbrl.tasks.adapters import brax
from diffmbrl.tasks.adapters.brax_rewards import brax_rewards

HELD_OUT, SEEDS = 32, 3


class Case(NamedTuple):
    """An environment, the task to learn from, and the one to be judged by."""

    env: str
    learned: str
    judged: str
    horizon: int  # of the task learned from


CASES = {
    "reacher": Case("reacher", "brax-reacher", "brax-reacher", 50),
    "inverted-pendulum": Case("inverted_pendulum", "brax-inverted-pendulum-shaped", "brax-inverted-pendulum", 100),
}
UPDATES, REAL_STEPS = 150, 600
PEERS: dict[str, dict[str, Any]] = {
    "APG": {"policy_updates": 300, "horizon_length": 16, "num_envs": 16, "learning_rate": 3e-3},
    "PPO": {
        "num_timesteps": 200_000,
        "num_envs": 64,
        "unroll_length": 5,
        "num_minibatches": 8,
        "batch_size": 64,
        "num_updates_per_batch": 4,
        "learning_rate": 1e-3,
        "discounting": 0.95,
        "normalize_observations": True,
    },
    "SAC": {
        "num_timesteps": 20_000,
        "num_envs": 16,
        "min_replay_size": 1000,
        "learning_rate": 1e-3,
        "batch_size": 128,
        "discounting": 0.97,
        "max_replay_size": 20_000,
        "grad_updates_per_step": 16,
    },
}
SMALL = {
    "APG": {"policy_updates": 2},
    "PPO": {"num_timesteps": 500},
    "SAC": {"num_timesteps": 1100, "grad_updates_per_step": 1},
}


def run(*, quick: bool) -> None:
    file = path("brax_peers", quick=quick)
    found = json.loads(file.read_text())["result"] if file.exists() else {}
    for arm in (*OURS, *PEERS):
        for name, case in CASES.items():
            row = found.setdefault(f"{name} {arm}", {})
            for seed in range(1 if quick else SEEDS):
                if str(seed) in row:
                    continue
                train = OURS[arm] if arm in OURS else functools.partial(theirs, arm)
                row[str(seed)] = judged(case, functools.partial(train, case, seed, quick=quick), quick=quick)
                print(name, arm, seed, row[str(seed)], flush=True)
                save("brax_peers", found, quick=quick)
    head = ["", "resting", "return: worst seed", "best seed", "worst start", "CPU s: first seed", "last"]
    print(table(head, [[name, *_line(list(row.values()))] for name, row in found.items()]))


def _line(seeds: list[dict[str, float]]) -> list[float]:
    means = [seed["mean"] for seed in seeds]
    worst = min(seed["worst"] for seed in seeds)
    return [seeds[0]["resting"], min(means), max(means), worst, seeds[0]["seconds"], seeds[-1]["seconds"]]


def judged(case: Case, train: Any, *, quick: bool) -> dict[str, float]:
    """Returns of what an arm has learned, from held-out starts, beside those of a policy that rests."""
    begun = time.process_time()
    policy = train()
    seconds = time.process_time() - begun
    task = d.tasks.make(case.judged, **({"horizon": 10} if quick else {}))
    s0 = task.starts(jax.random.key(99), HELD_OUT)

    @jax.jit
    def returns(policy, task, s0):
        return jax.vmap(lambda trajectory: brax_rewards(task, trajectory).sum())(d.rollouts(policy, task, s0))

    J = np.asarray(returns(policy, task, s0))
    resting = np.asarray(returns(d.OpenLoop.zeros(task), task, s0))
    return {"mean": J.mean(), "worst": J.min(), "best": J.max(), "seconds": seconds, "resting": resting.mean()}


def by_mpc(case: Case, seed: int, *, quick: bool) -> Any:
    """The agent `mpc` of the command line, its own defaults."""
    task = d.tasks.make(case.learned)
    agent = make_agent("mpc", task)
    learned = learn(agent, task, jax.random.key(seed)[None], real_steps=150 if quick else REAL_STEPS)
    return agent.best(jax.tree.map(lambda x: x[0], learned.carry), task)


def by_windows(case: Case, seed: int, *, quick: bool) -> Any:
    """Windows of 10 steps of 16 environments with a critic, noise at a learned price of entropy, from one first policy."""
    task, updates = d.tasks.make(case.learned, horizon=case.horizon), 2 if quick else UPDATES
    rule = d.OptaxSolver(clipped_adam, learning_rate=1e-2, anneal=float(updates))
    noise = Noise(entropy=Entropy())
    made = d.ShortHorizon(rule, window=10, environments=16, noise=noise)
    key_policy, key_starts, key = jax.random.split(jax.random.key(seed), 3)
    policy = d.Neural.init(task, hidden=(32, 32), key=key_policy)
    learned, history = d.solve(made, policy, task, task.starts(key_starts, 64), key, updates)
    print(f"J from {history.info.J[0]:.2f} to {history.info.J[-1]:.2f}; {history.stop}", flush=True)
    return learned


OURS = {"mpc": by_mpc, "short-horizon": by_windows}


def theirs(name: str, case: Case, seed: int, *, quick: bool) -> Any:
    """Brax's trainer on Brax's environment."""
    with warnings.catch_warnings(), trainers():
        warnings.simplefilter("ignore")
        env = brax._brax("envs").get_environment(case.env, backend="generalized")
        train = brax._brax(f"training.agents.{name.lower()}.train").train
        options = PEERS[name] | (SMALL[name] if quick else {})
        horizon = d.tasks.make(case.judged).horizon
        length = 20 if quick else horizon
        make_policy, params, _ = train(
            environment=env, episode_length=length, num_evals=1, num_eval_envs=8, seed=seed, **options
        )
    task = d.tasks.make(case.judged, horizon=1)
    return jax.tree_util.Partial(_act, jax.tree_util.Partial(make_policy(params, deterministic=True)), task.features)


def _act(act: Any, features: Any, s: Any, *, key: Any = None) -> Any:
    """Brax's observations are our features."""
    return jnp.clip(act(features(s), jax.random.PRNGKey(0))[0], -1, 1)
