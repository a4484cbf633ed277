"""A job as a row of functions, and how each of them runs: checked, in a folder of its own, resumed if interrupted."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from diffmbrl.jobs.configs import RunOptions, options_of
from diffmbrl.jobs.table import Job
from diffmbrl.report import rebuild
from diffmbrl.runs import Progress, Writer, check_out, check_sinks, config_from_json, create, running, underway


@runtime_checkable
class Resolved(Protocol):
    """A config with every default filled in and every value checked, and the objects that it describes."""

    @property
    def config(self) -> Any:
        """The config without open defaults."""
        ...

    @property
    def notes(self) -> Mapping[str, Any]:
        """Further entries of `config.json`, for its reader; they follow from the config."""
        ...


class Records(NamedTuple):
    """The records and the progress of a job that writes no checkpoints; a `Session` has both too.

    Args:
        write: Writes a record to `metrics.jsonl`.
        progress: Shows how far the run is.
    """

    write: Callable[[dict[str, Any]], None]
    progress: Progress


class JobFunctions(NamedTuple):
    """The functions of a job.

    Args:
        resolve: Fills in a config's defaults and checks its values; raises `ValueError` naming a wrong one.
        arms: The number of its arms (methods, agents, starts).
        run: Does the work and writes the records, to a `Session`, or to `Records` if the job cannot be resumed.
        read: Prepares the entries of `config.json` for `config_from_json`, without the notes.
    """

    resolve: Callable[[Any], Resolved]
    arms: Callable[[Any], int]
    run: Callable[[Any, Any], None]
    read: Callable[[dict[str, Any]], dict[str, Any]] = dict


def functions_of(job: Job) -> JobFunctions:
    """Import the functions of a job.

    Args:
        job: The row of the job.

    Returns:
        The `FUNCTIONS` of its module.
    """
    return importlib.import_module(job.module).FUNCTIONS


def start_job(job: Job, config: Any, options: RunOptions | None = None) -> Path:
    """Run a job in a new folder.

    Args:
        job: The row of the job.
        config: Its options, an instance of `job.config`.
        options: The folder, the checkpoints and the trackers; by default a new folder under `runs/`.

    Returns:
        The run folder, with figures and report.

    Raises:
        ValueError: If a value of the config or the folder is wrong, before anything is written.
    """
    functions, options = functions_of(job), options or RunOptions()
    check_sinks(options.track)
    resolved = functions.resolve(config)
    check_out(options.out)
    folder = create(options.out, config.task, job.name, asdict(resolved.config) | dict(resolved.notes))
    if job.resumable:
        return _work(functions, resolved, folder, options, resumed=False)
    arms = functions.arms(resolved)
    with (
        running(folder),
        Writer(folder / "metrics.jsonl") as writer,
        Progress(arms, stream=options.stream) as progress,
    ):
        functions.run(resolved, Records(writer.write, progress))
    rebuild(folder)
    return folder


def resume_job(job: Job, folder: Path, config: dict[str, Any], options: RunOptions) -> Path:
    """Resume a run of a job from its newest valid checkpoint.

    Args:
        job: The row of the job.
        folder: The run folder.
        config: The entries of its `config.json`.
        options: The checkpoints and the trackers.

    Returns:
        The run folder, with figures and report.

    Raises:
        ValueError: If the config or the checkpoints do not fit the installed code.
    """
    functions = functions_of(job)
    return _work(functions, functions.resolve(restored_config(job, config)), folder, options, resumed=True)


def restored_config(job: Job, config: dict[str, Any]) -> Any:
    """Restore the config of a run from its `config.json`.

    Args:
        job: The row of the job.
        config: The entries of `config.json`.

    Returns:
        An instance of `job.config`.

    Raises:
        ValueError: If an entry is missing, unknown or of another type.
    """
    optional = [name for name, (option, _) in options_of(job.config).items() if option.added]
    return config_from_json(job.config, functions_of(job).read(config), optional=optional)


def _work(functions: JobFunctions, resolved: Resolved, folder: Path, options: RunOptions, *, resumed: bool) -> Path:
    with underway(
        folder,
        functions.arms(resolved),
        report=rebuild,
        stream=options.stream,
        every=options.checkpoint_every,
        track=options.track,
        resumed=resumed,
    ) as run:
        functions.run(resolved, run)
    return folder
