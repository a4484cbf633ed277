"""The command line: `diffmbrl compare`, `report`, `tasks`, `doctor`."""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

DEFAULT_CACHE = Path("~/.cache/diffmbrl/xla")


@dataclass
class Compare:
    """Compare methods on one task: same starts, seeds and cost axes. Ends with a table, figures and a report."""

    task: Annotated[str, tyro.conf.Positional]
    """Name of a task; `diffmbrl tasks` lists them."""
    methods: list[str] = field(default_factory=list)
    """Methods to run; by default all that fit the task."""
    horizon: int | None = None
    """Time steps T; by default the task's own."""
    seeds: int = 5
    """Seeds, run side by side."""
    starts: int = 32
    """Training starts of each seed."""
    steps: int | None = None
    """Updates of each method; by default each method's own number."""
    budget: float = 45.0
    """Seconds of updates for each method, compile time and evaluation apart."""
    lr: list[float] = field(default_factory=list)
    """Learning rates swept by methods that have one; by default each method's own list."""
    continuation: str = "default"
    """`default`: discounts .8 .9 .95 .98 1 (growing horizons for plans); `none` to see why."""
    hidden: list[int] = field(default_factory=list)
    """Hidden layers of the policy network; by default the task's own."""
    param: list[str] = field(default_factory=list)
    """Physical parameters of the task, as name=value."""
    key: int = 0
    """Number from which every random draw follows."""
    x64: bool = False
    """Compute in float64."""
    out: Path | None = None
    """Run folder; by default runs/<task>-compare-<hash>."""


@dataclass
class Report:
    """Rebuild the figures and the report of a run from its data alone."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""


@dataclass
class Tasks:
    """List the tasks: dimensions, horizon, gradient contract."""


@dataclass
class Doctor:
    """Print versions, devices, precision and cache state, and test a gradient."""

    x64: bool = False
    """Test in float64."""


Command = (
    Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Tasks, tyro.conf.subcommand("tasks")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; bad input gives one line on stderr and exit code 2."""
    command = tyro.cli(
        Command,  # type: ignore[arg-type]
        prog="diffmbrl",
        description="First- and second-order policy optimisation and planning through differentiable dynamics.",
        args=arguments,
    )
    try:
        return RUN[type(command)](command)
    except (ValueError, TypeError, OSError) as error:
        print(f"diffmbrl: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("diffmbrl: interrupted", file=sys.stderr)
        return 130


def _compare(command: Compare) -> int:
    _configure(command.x64)
    from diffmbrl.compare import Setting, compare
    from diffmbrl.methods import METHODS
    from diffmbrl.runs import summarise, table, verdict
    from diffmbrl.tasks import TASKS, make
    from diffmbrl.tasks.registry import known

    row = TASKS[known("task", command.task, TASKS)]
    parameters = _parameters(command.param)
    task = make(command.task, horizon=command.horizon, **parameters)
    names = command.methods or [name for name, method in METHODS.items() if method.default]
    setting = Setting(
        task=command.task,
        methods=tuple(names),
        horizon=task.horizon,
        parameters=parameters,
        hidden=tuple(command.hidden or row.hidden),
        seeds=command.seeds,
        starts=command.starts,
        steps=command.steps,
        budget=command.budget,
        rates=tuple(command.lr),
        continuation=command.continuation,
        x64=command.x64,
        key=command.key,
    )
    folder = compare(setting, out=command.out)
    summary = summarise(folder)
    print(f"\n{table.text(summary)}\n\n" + "\n".join(verdict.sentences(summary)))
    print(f"\nreport: {(folder / 'report.html').resolve()}")
    return 0


def _report(command: Report) -> int:
    from diffmbrl.runs import rebuild

    print(f"report: {rebuild(command.run).resolve()}")
    return 0


def _tasks(command: Tasks) -> int:
    from diffmbrl.tasks.listing import listing

    print(listing())
    return 0


def _doctor(command: Doctor) -> int:
    _configure(command.x64)
    from diffmbrl.doctor import diagnose

    healthy, text = diagnose()
    print(text)
    return 0 if healthy else 1


def _parameters(pairs: list[str]) -> dict[str, float]:
    """name=value pairs. Raises: `ValueError` for one that is not."""
    parameters = {}
    for pair in pairs:
        name, equals, number = pair.partition("=")
        try:
            parameters[name] = float(number)
        except ValueError:
            equals = ""
        if not equals:
            raise ValueError(f"--param takes name=value with a number, such as m_p=0.2; got '{pair}'")
    return parameters


def _configure(x64: bool) -> None:
    """Precision, and a compilation cache that outlives the process; before anything is computed."""
    import jax

    jax.config.update("jax_enable_x64", x64)
    if jax.config.jax_compilation_cache_dir is None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(DEFAULT_CACHE.expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


RUN = {Compare: _compare, Report: _report, Tasks: _tasks, Doctor: _doctor}


if __name__ == "__main__":
    sys.exit(main())
