"""The commands of the command line: the jobs of the table, and the commands that read their folders."""

from diffmbrl.cli.options import Command
from diffmbrl.jobs.configs import (
    DoctorConfig,
    RenderConfig,
    ReportConfig,
    ResumeConfig,
    RunOptions,
    SweepConfig,
)
from diffmbrl.jobs.table import JOBS

SUMMARIES = {
    "race": "Let several agents learn on one task, with the same budget of real steps. Ends with figures and a report.",
    "learn": "Let an agent learn from real steps, with a model of the system or without. Ends with figures and a report.",
}
ORDER = (
    "compare",
    "plan",
    "diagnose",
    "learn",
    "race",
    "resume",
    "sweep",
    "report",
    "render",
    "agents",
    "tasks",
    "doctor",
)


def _commands() -> dict[str, Command]:
    found = [
        Command(
            name,
            (job.config, RunOptions),
            SUMMARIES.get(name, ""),
            job.single,
            () if job.resumable else ("checkpoint_every", "track"),
        )
        for name, job in JOBS.items()
    ]
    found += [
        Command("resume", (ResumeConfig, RunOptions), left_out=("out",)),
        Command("sweep", (SweepConfig,)),
        Command("report", (ReportConfig,)),
        Command("render", (RenderConfig,)),
        Command("agents", summary="List the agents that learn, with their options."),
        Command("tasks", summary="List the tasks: dimensions, horizon, time step and kind of gradient."),
        Command("doctor", (DoctorConfig,)),
    ]
    return {command.name: command for command in sorted(found, key=lambda command: ORDER.index(command.name))}


COMMANDS = _commands()
