"""A whole batch of runs, with evaluations along the way."""

import time
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from diffmbrl.jobs.batch.protocol import BatchedRuns


class LearningCurve(NamedTuple):
    """Evaluations of a batch of runs before the first update, along the way and at the end, with the time spent so far.

    Args:
        updates: The number of updates before each evaluation.
        evaluations: What `BatchedRuns.evaluate` returned at each of them, arrays of shape [variants, seeds].
        cpu: Process seconds spent in the updates of all replicas, without compiling and evaluating.
        wall: Wall-clock seconds, likewise.
        compile: Seconds to trace and compile an update.
    """

    updates: list[int]
    evaluations: list[dict[str, np.ndarray]]
    cpu: list[float]
    wall: list[float]
    compile: float


def learning_curve(runs: BatchedRuns, steps: int, *, evaluations: int) -> LearningCurve:
    """Compile the runs, make `steps` updates, and evaluate before the first and after each of `evaluations` equal shares.

    Args:
        runs: The runs; they hold the result of the last update afterwards.
        steps: The number of updates of each replica.
        evaluations: The number of evaluations after the first one; at most one follows each update.

    Returns:
        The evaluations, and the time that the updates took.

    Raises:
        ValueError: If `evaluations` is less than 1.

    >>> from diffmbrl.jobs.batch import BatchedPolicyRuns, draw_starts
    >>> from diffmbrl.optimizers import GaussNewton
    >>> from diffmbrl.tasks import make
    >>> task = make("pendulum", horizon=4)
    >>> runs = BatchedPolicyRuns([GaussNewton()], task, (4,), draw_starts(task, 1, 2, 2, 0), sequential=False)
    >>> learning_curve(runs, 3, evaluations=2).updates
    [0, 1, 3]
    """
    if evaluations < 1:
        raise ValueError(f"evaluations must be at least 1, got {evaluations}")
    compiling = runs.compile()
    updates = np.unique(np.linspace(0, steps, evaluations + 1).astype(int)).tolist()
    found, cpu, wall = [runs.evaluate()], [0.0], [0.0]
    for done, end in pairwise(updates):
        begun = time.process_time(), time.perf_counter()
        runs.advance(done, end - done)
        cpu.append(cpu[-1] + time.process_time() - begun[0])
        wall.append(wall[-1] + time.perf_counter() - begun[1])
        found.append(runs.evaluate())
    return LearningCurve(updates, found, cpu, wall, compiling)
