"""Times as medians over interleaved rounds, compile time apart."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def compile_seconds(function: Callable, *arguments: Any) -> float:
    """The first call's wall-clock, which traces and compiles."""
    begun = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - begun


def medians(
    calls: dict[str, Callable[[], Any]],
    *,
    rounds: int = 9,
    least: float = 0.02,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each call, measured in turn, round after round, so that a drifting machine treats all alike.

    A round repeats a call until it has run for `least` seconds. The calls must have been compiled.
    """
    repeats = {}
    for name, call in calls.items():
        begun = clock()
        jax.block_until_ready(call())
        repeats[name] = max(1, int(least / max(clock() - begun, 1e-6)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begun = clock()
            for _ in range(repeats[name] - 1):
                call()
            jax.block_until_ready(call())
            samples[name].append((clock() - begun) / repeats[name])
    return {name: float(np.median(values)) for name, values in samples.items()}
