"""Run the commands: read their options, do the work, and print the result.

The jobs are imported when they run, so that `diffmbrl --help` does not wait for them.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from io import TextIOBase
from pathlib import Path
from typing import Any

from diffmbrl.jobs.configs import (
    DoctorConfig,
    RenderConfig,
    ReportConfig,
    ResumeConfig,
    RunOptions,
    SweepConfig,
)
from diffmbrl.jobs.configure import configure
from diffmbrl.jobs.table import JOBS, Job


def _start(job: Job, config: Any, options: RunOptions) -> int:
    # A job without the option needs float64: a diagnosis measures in both precisions.
    configure(getattr(config, "x64", True), getattr(config, "devices", 1))
    from diffmbrl.devices import primary_only
    from diffmbrl.jobs.job import start_job

    with primary_only(options.out) as (out, stream):
        folder = start_job(job, config, replace(options, out=out, stream=stream))
        return _show(folder, stream)


def _resume(config: ResumeConfig, options: RunOptions) -> int:
    from diffmbrl.runs import read_config

    written = read_config(config.run)
    devices = written.get("devices", 1)
    configure(written.get("x64") is True, devices if isinstance(devices, int) else 1)
    from diffmbrl.devices import resume_copies
    from diffmbrl.jobs.resume import is_finished, resume_run

    if is_finished(config.run):
        print(f"'{config.run}' is finished: there is nothing to resume")
        return 0
    with resume_copies(config.run) as (place, stream):
        folder = resume_run(place, replace(options, stream=stream))
        return _show(folder, stream)


def _sweep(config: SweepConfig) -> int:
    from diffmbrl.jobs.sweep.points import read_sweep

    asked = read_sweep(config.file)
    configure(asked.x64)
    from diffmbrl.jobs.sweep import sweep

    slurm = config.slurm
    if slurm is not None:
        slurm = {name: int(x) if x.isdecimal() else x for name, x in slurm.items()}
    folder, complete = sweep(asked, out=config.out, processes=config.processes, slurm=slurm)
    _show(folder)
    return 0 if complete or slurm is not None else 1


def _report(config: ReportConfig) -> int:
    from diffmbrl.report import rebuild

    print(f"report: {rebuild(config.run).resolve()}")
    return 0


def _render(config: RenderConfig) -> int:
    from diffmbrl.jobs.render import config_of, render_run

    configure(bool(config_of(config.run).get("x64")))
    print(f"animation: {render_run(config).resolve()}")
    return 0


def _agents() -> int:
    from diffmbrl.agents.registry import agents_listing

    print(agents_listing())
    return 0


def _tasks() -> int:
    from diffmbrl.tasks.listing import tasks_listing

    print(tasks_listing())
    return 0


def _doctor(config: DoctorConfig) -> int:
    configure(config.x64)
    from diffmbrl.jobs.doctor import check_installation

    healthy, text = check_installation()
    print(text)
    return 0 if healthy else 1


def _show(folder: Path, stream: TextIOBase | None = None) -> int:
    from diffmbrl.report import summary_text

    print(f"\n{summary_text(folder)}\n\nreport: {(folder / 'report.html').resolve()}", file=stream)
    return 0


RUN: dict[str, Callable[..., int]] = {name: partial(_start, job) for name, job in JOBS.items()} | {
    "resume": _resume,
    "sweep": _sweep,
    "report": _report,
    "render": _render,
    "agents": _agents,
    "tasks": _tasks,
    "doctor": _doctor,
}
