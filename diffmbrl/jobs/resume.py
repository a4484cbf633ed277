"""Going on with a run that was interrupted: what `diffmbrl resume` runs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from diffmbrl.jobs import compare, plan
from diffmbrl.jobs import learn as race
from diffmbrl.runs import EVERY, check_sinks, read_config

JOBS = {"compare": compare.resume, "learn": race.resume, "plan": plan.resume}


def resume(folder: Path, *, stream: Any = None, every: float = EVERY, track: Sequence[str] = ()) -> Path:
    """Go on with a run from its newest valid checkpoint, on a CPU to the numbers of a run in one piece.

    What was recorded after the checkpoint is cut off and made again. A killed run that has no checkpoint yet begins anew, and
    an agent on a system that is stepped on the host does, whose state cannot be kept.
    Raises: `ValueError` if `folder` is not a run that can go on, or is one whose precision is not the one in force, whose
    config the installed code does not know, whose checkpoints are all damaged, or that another process runs.
    """
    check_sinks(track)
    folder = Path(folder)
    config = read_config(folder)
    if is_finished(folder):
        raise ValueError(f"'{folder}' is finished: there is nothing to resume")
    job = config.get("job")
    if job not in JOBS:
        raise ValueError(f"a run of {job!r} cannot be resumed, only one of {', '.join(JOBS)}: start it anew")
    x64 = bool(jax.config.jax_enable_x64)  # pyright: ignore[reportAttributeAccessIssue]
    if config.get("x64") != x64:
        raise ValueError(f"'{folder}' has x64 = {config.get('x64')!r}, and jax_enable_x64 is {x64}: set it first")
    return JOBS[job](folder, config, stream=stream, every=every, track=track)


def is_finished(folder: Path) -> bool:
    """Whether the run's status says so."""
    try:
        return json.loads((folder / "status.json").read_text(encoding="utf-8")).get("status") == "finished"
    except (OSError, ValueError, AttributeError):
        return False
