"""A whole run of lanes, looked at on the way."""

import time
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from diffmbrl.jobs.batch.protocol import BatchedRuns


class LearningCurve(NamedTuple):
    """What was seen of lanes before the first update, on the way and at the end, and what the updates so far had taken."""

    updates: list[int]
    looks: list[dict[str, np.ndarray]]  # evaluations, [rates, seeds] each
    cpu: list[float]  # seconds of the process in the updates of all lanes, without compiling and evaluating
    wall: list[float]  # likewise, of wall-clock
    compile: float  # seconds to trace and compile an update


def learning_curve(lanes: BatchedRuns, steps: int, *, looks: int) -> LearningCurve:
    """Compile lanes and make `steps` updates of them, evaluated before, after each of `looks` equal shares, and so at the end.

    Raises: `ValueError` for fewer than one look; of more looks than updates there is one for each update.

    >>> from diffmbrl.jobs.batch import BatchedPolicyRuns, draw_starts
    >>> from diffmbrl.optimizers import GaussNewton
    >>> from diffmbrl.tasks import make
    >>> task = make("pendulum", horizon=4)
    >>> lanes = BatchedPolicyRuns([GaussNewton()], task, (4,), draw_starts(task, 1, 2, 2, 0), sequential=False)
    >>> learning_curve(lanes, 3, looks=2).updates
    [0, 1, 3]
    """
    if looks < 1:
        raise ValueError(f"looks must be at least 1, got {looks}")
    compiling = lanes.compile()
    updates = np.unique(np.linspace(0, steps, looks + 1).astype(int)).tolist()
    seen, cpu, wall = [lanes.evaluate()], [0.0], [0.0]
    for done, end in pairwise(updates):
        begun = time.process_time(), time.perf_counter()
        lanes.advance(done, end - done)
        cpu.append(cpu[-1] + time.process_time() - begun[0])
        wall.append(wall[-1] + time.perf_counter() - begun[1])
        seen.append(lanes.evaluate())
    return LearningCurve(updates, seen, cpu, wall, compiling)
