"""The horizon up to which a float32 BPTT gradient is right: the column of the table of tasks.

For each task: a default policy of scale .01 (its last layer), 32 starts, the gradient in float32 and in float64. The safe
horizon is the largest of HORIZONS at which, for each of five seeds, |g32 - g64| <= .01 |g64|.
"""

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

import diffmbrl as d
from benchmarks.record import save, table
from diffmbrl.diagnostics import in_double

HORIZONS = (10, 25, 50, 100, 200, 400, 800)
TOLERANCE = 0.01


def run(*, quick: bool) -> None:
    horizons = HORIZONS[:3] if quick else HORIZONS
    rows, errors = [], {}
    # Brax's compile for too long to be compiled anew for each horizon: `benchmarks brax`.
    for name in (name for name in d.tasks.TASKS if not name.startswith("brax-")):
        errors[name] = [worst_error(name, horizon, seeds=2 if quick else 5) for horizon in horizons]
        safe = [T for T, error in zip(horizons, errors[name], strict=True) if error <= TOLERANCE]
        rows.append([name, str(max(safe, default=0)), *(f"{error:.1e}" for error in errors[name])])
    head = ["task", "safe", *(f"T = {T}" for T in horizons)]
    print(f"Largest |g32 - g64| / |g64| over seeds\n\n{table(head, rows)}")
    save("safe_horizon", {"horizons": horizons, "errors": errors, "tolerance": TOLERANCE}, quick=quick)


def worst_error(name: str, horizon: int, *, seeds: int) -> float:
    """The largest relative error of the float32 gradient over the seeds."""
    task = d.tasks.make(name, horizon=horizon)
    gradient = jax.jit(d.BPTT())
    worst = 0.0
    for seed in range(seeds):
        key_policy, key_starts = jax.random.split(jax.random.key(seed))
        policy = d.Neural.init(task, hidden=d.tasks.TASKS[name].hidden, output_scale=0.01, key=key_policy)
        s0 = task.starts(key_starts, 32)
        single = np.asarray(ravel_pytree(gradient(policy, task, s0, None)[1])[0], np.float64)
        with jax.enable_x64(True):
            double = np.asarray(ravel_pytree(gradient(*in_double((policy, task, s0)), None)[1])[0])
        error = np.linalg.norm(single - double) / np.linalg.norm(double)
        worst = max(worst, float(error) if np.isfinite(error) else np.inf)
    return worst
