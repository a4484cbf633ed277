"""Resume a run that was interrupted."""

import json
from pathlib import Path

import jax

from diffmbrl.jobs.configs import RunOptions
from diffmbrl.jobs.job import resume_job
from diffmbrl.jobs.table import RESUMABLE
from diffmbrl.runs import check_sinks, read_config


def resume_run(folder: Path, options: RunOptions | None = None) -> Path:
    """Resume a run from its newest valid checkpoint; on a CPU its numbers equal those of an uninterrupted run.

    Records after the checkpoint are removed and made again. Without a checkpoint the run starts again, and so does an agent on
    a system that is stepped on the host, since its state cannot be saved.

    Args:
        folder: The run folder.
        options: The checkpoints and the trackers; `out` is not used.

    Returns:
        The run folder, with figures and report.

    Raises:
        ValueError: If `folder` is no run that can be resumed: it is finished, of another precision, has a config that the
            installed code does not know, has only damaged checkpoints, or is being run by another process.
    """
    folder, options = Path(folder), options or RunOptions()
    check_sinks(options.track)
    config = read_config(folder)
    if is_finished(folder):
        raise ValueError(f"'{folder}' is finished: there is nothing to resume")
    job = config.get("job")
    if job not in RESUMABLE:
        raise ValueError(
            f"a run of {job!r} cannot be resumed, only one of {', '.join(RESUMABLE)}: start it again in a new folder"
        )
    x64 = bool(jax.config.jax_enable_x64)  # pyright: ignore[reportAttributeAccessIssue]
    if config.get("x64") != x64:
        raise ValueError(f"'{folder}' has x64 = {config.get('x64')!r}, and jax_enable_x64 is {x64}: set it first")
    return resume_job(RESUMABLE[job], folder, config, options)


def is_finished(folder: Path) -> bool:
    """Whether the status of a run is `finished`.

    Args:
        folder: The run folder.

    Returns:
        False if it is not, or if there is no status that can be read.
    """
    try:
        return json.loads((folder / "status.json").read_text(encoding="utf-8")).get("status") == "finished"
    except (OSError, ValueError, AttributeError):
        return False
