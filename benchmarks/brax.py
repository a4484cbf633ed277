"""Brax's environments as tasks: what their steps and gradients cost to compile and to run, and how far gradients are right.

Of each environment and backend: CPU seconds to trace and compile one step f(s, a), and its reverse-mode derivative, for a batch
of 16 with no compilation cache; then microseconds for each of the 16. Of each on its generalized backend the gradient of J,
whole rollouts of a default policy, in float32 beside float64: the safe horizon is the largest of HORIZONS up to which they
agree to 1% on each seed. A horizon is a mask of weights here, so that one compiled gradient serves all. A stopped run goes on.
"""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import diffmbrl as d
from benchmarks.record import path, save, table
from diffmbrl.core import reweighted
from diffmbrl.diagnostics import in_double

COSTS = [
    ("brax-inverted-pendulum", "generalized"),
    ("brax-reacher", "generalized"),
    ("brax-inverted-double-pendulum", "generalized"),
    ("brax-swimmer", "generalized"),
    ("brax-halfcheetah", "generalized"),
    ("brax-hopper", "generalized"),
    ("brax-walker2d", "generalized"),
    ("brax-ant", "generalized"),
    ("brax-inverted-pendulum", "spring"),
    ("brax-inverted-pendulum", "positional"),
    ("brax-inverted-pendulum", "mjx"),
    ("brax-reacher", "spring"),
    ("brax-hopper", "spring"),
    ("brax-halfcheetah", "spring"),
    ("brax-ant", "spring"),
]
SAFE = (
    "brax-inverted-pendulum-shaped",
    "brax-reacher",
    "brax-inverted-double-pendulum",
    "brax-hopper",
    "brax-swimmer",
    "brax-halfcheetah",
    "brax-walker2d",
    "brax-ant",
)
HORIZONS, SEEDS, STARTS, TOLERANCE, BATCH = (5, 10, 25, 50, 100), 3, 4, 0.01, 16


def run(*, quick: bool) -> None:
    file = path("brax", quick=quick)
    found = json.loads(file.read_text())["result"] if file.exists() else {"costs": {}, "errors": {}}
    horizons = HORIZONS[:2] if quick else HORIZONS
    for name in SAFE[:1] if quick else SAFE:
        if name not in found["errors"]:
            found["errors"][name] = worst_errors(name, horizons)
            save("brax", found, quick=quick)
    for name, backend in COSTS[:2] if quick else COSTS:
        if f"{name} {backend}" not in found["costs"]:
            found["costs"][f"{name} {backend}"] = costs(name, backend)
            save("brax", found, quick=quick)
    head = ["", "n", "step: compile [CPU s]", "run [us]", "gradient: compile [CPU s]", "run [us]"]
    print(table(head, [[name, *row.values()] for name, row in found["costs"].items()]))
    rows = [[name, safe(row), *(f"{x:.1e}" for x in row.values())] for name, row in found["errors"].items()]
    print(f"\nLargest |g32 - g64| / |g64|\n\n{table(['task', 'safe', *(f'T = {T}' for T in horizons)], rows)}")


def safe(errors: dict[str, float]) -> str:
    """The largest horizon up to which all errors are within the tolerance."""
    wrong = [int(T) for T, error in errors.items() if not error <= TOLERANCE]
    return str(max((int(T) for T in errors if int(T) < min(wrong, default=10**9)), default=0))


def costs(name: str, backend: str) -> dict[str, float]:
    """State dimension, and compile and run times of a step and of its derivative."""
    jax.config.update("jax_enable_compilation_cache", False)
    task = d.tasks.make(name, backend=backend)
    s = task.starts(jax.random.key(0), BATCH)
    a = jax.random.uniform(jax.random.key(1), (BATCH, task.m), minval=-1)

    @jax.jit
    def step(dynamics, s, a):
        return jax.vmap(dynamics)(s, a)

    @jax.jit
    def gradient(dynamics, s, a):
        return jax.vjp(lambda *x: step(*x), dynamics, s, a)[1](jnp.ones_like(s))

    measured = {"n": float(task.n)}
    for label, function in (("step", step), ("gradient", gradient)):
        begun = time.process_time()
        compiled = function.lower(task.dynamics, s, a).compile()
        measured[f"{label}_compile"] = time.process_time() - begun
        jax.block_until_ready(compiled(task.dynamics, s, a))
        spent = []
        for _ in range(10):
            begun = time.process_time()
            jax.block_until_ready(compiled(task.dynamics, s, a))
            spent.append(time.process_time() - begun)
        measured[f"{label}_run"] = 1e6 * float(np.median(spent)) / BATCH
    jax.config.update("jax_enable_compilation_cache", True)
    print(name, backend, {key: round(value, 2) for key, value in measured.items()}, flush=True)
    return measured


def worst_errors(name: str, horizons: tuple[int, ...]) -> dict[str, float]:
    """Relative errors of the float32 gradient, the largest over the seeds, at each horizon."""
    task, worst = d.tasks.make(name, horizon=horizons[-1]), dict.fromkeys(map(str, horizons), 0.0)

    @jax.jit
    def gradients(policy, task, s0, weights):
        def at(w):
            masked = reweighted(task, w)
            return ravel_pytree(d.BPTT()(policy, masked, s0, None)[1])[0]

        return jax.lax.map(at, weights)

    for seed in range(SEEDS):
        key_policy, key_starts = jax.random.split(jax.random.key(seed))
        policy = d.Neural.init(task, hidden=(8,), output_scale=0.01, key=key_policy)
        masks = jnp.stack([(jnp.arange(horizons[-1] + 1) < T).astype(float) for T in horizons])
        inputs = (policy, task, task.starts(key_starts, STARTS), masks)
        single = np.asarray(gradients(*inputs), np.float64)
        with jax.enable_x64(True):
            double = np.asarray(gradients(*in_double(inputs)))
        for k, T in enumerate(horizons):
            error = np.linalg.norm(single[k] - double[k]) / np.linalg.norm(double[k])
            worst[str(T)] = max(worst[str(T)], float(error) if np.isfinite(error) else np.inf)
    print(name, worst, flush=True)
    return worst
