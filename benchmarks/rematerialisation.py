"""Memory of a BPTT gradient at T = 2000, B = 64, against how much of the rollout is recomputed.

`_temporary_bytes(compiled)` is what XLA allocates beside arguments and results.
"""

from functools import partial
from typing import Any

import jax

import diffmbrl as d
from benchmarks.record import save, table
from benchmarks.timing import compile_seconds, medians

SETTINGS = {"none": None, "each step": 1, "segments of 10": 10, "segments of 45": 45, "segments of 200": 200}


def run(*, quick: bool) -> None:
    horizon, batch = (200, 64) if quick else (2000, 64)
    task = d.tasks.cartpole_balance(horizon=horizon)
    policy = d.Neural.init(task, hidden=(64, 64), key=jax.random.key(0))
    s0 = task.starts(jax.random.key(1), batch)
    calls, memory, compiling = {}, {}, {}
    for name, remat in SETTINGS.items():
        gradient = jax.jit(d.BPTT(remat=remat))
        compiled = gradient.lower(policy, task, s0, None).compile()
        memory[name] = _temporary_bytes(compiled)
        compiling[name] = compile_seconds(gradient, policy, task, s0, None)
        calls[name] = partial(gradient, policy, task, s0, None)
    seconds = medians(calls, rounds=5)
    rows = [
        [name, memory[name] / 2**20, memory["none"] / memory[name], seconds[name] * 1e3, compiling[name]]
        for name in SETTINGS
    ]
    head = ["recomputed", "MiB", "less by", "ms", "compile s"]
    print(f"BPTT gradient, cart-pole, MLP 2x64, T = {horizon}, B = {batch}, float32\n\n{table(head, rows)}")
    save("rematerialisation", {"horizon": horizon, "batch": batch, "columns": head, "rows": rows}, quick=quick)


def _temporary_bytes(compiled: Any) -> int:
    """What the program allocates beside arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes
