"""The command line: `diffmbrl compare`, `plan`, `diagnose`, `report`, `tasks`, `doctor`."""

import contextlib
import io
import itertools
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

DEFAULT_CACHE = Path("~/.cache/diffmbrl/xla")


@dataclass
class Compare:
    """Compare methods on one task: same starts, seeds and cost axes. Ends with a table, figures and a report."""

    task: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TASK")]
    """Name of a task; `diffmbrl tasks` lists them."""
    methods: list[str] = field(default_factory=list)
    """Methods to run; by default all that fit the task."""
    estimator: list[str] = field(default_factory=list)
    """Estimators of the gradient, each in every first-order method: `bptt` (the default), `truncated`, `clipped-adjoint`,
    `likelihood-ratio` ...; an unknown name is answered with the list."""
    horizon: int | None = None
    """Time steps T; by default the task's own."""
    seeds: int = 3
    """Seeds, run side by side."""
    starts: int = 128
    """Training starts of each seed; of 32 every method learns the starts rather than the task."""
    steps: int | None = None
    """Updates of each method; by default each method's own number."""
    budget: float = 90.0
    """Seconds of updates for each method, compile time and evaluation apart."""
    lr: list[float] = field(default_factory=list)
    """Learning rates swept by methods that have one; by default each method's own list."""
    continuation: str = "default"
    """`default`: each method's own; `discounts` (.8 .9 .95 .98 1), `trust` (in the measured sensitivity of each start) or
    `measured` (discounts as the closed loop's growth allows) for all; `none` to see why."""
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
class Plan:
    """Plan from a few starts, or control with the planner in the loop. Ends with a table, an animation and a report."""

    task: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TASK")]
    """Name of a task; `diffmbrl tasks` lists them."""
    planner: str = "ilqr"
    """The planner: a method of `compare` that plans."""
    mpc: bool = False
    """Plan anew at each step, from the state at hand, and apply the first action."""
    horizon: int | None = None
    """Time steps of the plan; by default the task's own, or a controller's window of 50."""
    steps: int | None = None
    """Time steps of a controller's episode; by default the task's own."""
    iterations: int | None = None
    """Updates of the plan, by default the planner's own number; or of a controller in each step, by default 1."""
    param: list[str] = field(default_factory=list)
    """Physical parameters of the task, as name=value."""
    model_mismatch: list[str] = field(default_factory=list)
    """The plant's parameters in multiples of the planner's model's, as name=factor."""
    noise: float = 0.0
    """Standard deviation of noise added to every state of the plant at each step."""
    delay: int = 0
    """Steps by which a controller's actions arrive late; it predicts through them with its model."""
    starts: int = 1
    """Start states, drawn from the task's."""
    key: int = 0
    """Number from which every random draw follows, the starts' first."""
    x64: bool = False
    """Compute in float64."""
    out: Path | None = None
    """Run folder; by default runs/<task>-plan-<hash>."""


@dataclass
class Diagnose:
    """See why backpropagation through time fails, from which horizon on, and which estimator to use instead.

    Measured in float64, and in float32 beside it, whatever the precision of the run that trained the policy. Ends with a
    verdict, figures and a report.
    """

    task: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TASK")]
    """Name of a task; `diffmbrl tasks` lists them."""
    policy: str | None = None
    """A trained policy: RUN, RUN:method or RUN:method:seed, RUN the folder of a comparison; by default a random first
    policy."""
    scale: float | None = None
    """Factor on the last layer of the random first policy."""
    horizons: list[int] = field(default_factory=lambda: [10, 50, 100, 200, 400])
    """Time steps T at which the gradient is examined, increasing."""
    starts: int = 512
    """Start states, one sample of the gradient each."""
    std: float = 0.1
    """Noise of the smoothed estimators, in half widths of the action limits."""
    hidden: list[int] = field(default_factory=list)
    """Hidden layers of the random first policy; by default the task's own."""
    param: list[str] = field(default_factory=list)
    """Physical parameters of the task, as name=value."""
    key: int = 0
    """Number from which every random draw follows."""
    out: Path | None = None
    """Run folder; by default runs/<task>-diagnose-<hash>."""


@dataclass
class Report:
    """Rebuild the figures and the report of a run from its data alone."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
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
    | Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Diagnose, tyro.conf.subcommand("diagnose")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Tasks, tyro.conf.subcommand("tasks")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; bad input gives one line on stderr and exit code 2."""
    try:
        command = _parse(sys.argv[1:] if arguments is None else arguments)
        return RUN[type(command)](command)
    except (ValueError, TypeError, OSError) as error:
        print(f"diffmbrl: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("diffmbrl: interrupted", file=sys.stderr)
        return 130


def _parse(arguments: list[str]) -> Compare | Plan | Diagnose | Report | Tasks | Doctor:
    """The command given. Raises: `ValueError` in one line where tyro draws a box."""
    names = [kind.__name__.lower() for kind in RUN]
    if not arguments:
        raise ValueError(f"expected a command: {', '.join(names)}; see diffmbrl --help")
    if not arguments[0].startswith("-") and arguments[0] not in names:
        from diffmbrl.tasks.registry import known

        known("command", arguments[0], names)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(
                Command,  # type: ignore[arg-type]
                prog="diffmbrl",
                description="First- and second-order policy optimisation and planning through differentiable dynamics.",
                args=arguments,
            )
    except SystemExit as end:
        if not end.code:
            raise
        raise ValueError(_one_line(printed.getvalue())) from None


def _one_line(box: str) -> str:
    """What tyro says in a box: its first paragraph, and the option that it thinks was meant."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip("│ ") for line in box.splitlines()]
    # After the title, paragraphs between rules, drawn with hyphens where the terminal knows no others.
    paragraphs = itertools.groupby(lines[1:], key=lambda line: bool(line.strip("─-╰╯ ")))
    message = next((" ".join(" ".join(paragraph).split()) for is_text, paragraph in paragraphs if is_text), "bad input")
    meant = re.search(r"Perhaps you meant:\s+(--[\w-]+)", "\n".join(lines))
    return message + (f"; did you mean '{meant[1]}'?" if meant else "")


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
    # A line search takes no estimator: by default it is left out when one is asked for.
    fitting = (name for name, row in METHODS.items() if row.default and not (command.estimator and row.sequential))
    names = command.methods or list(fitting)
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
        estimators=tuple(command.estimator),
    )
    folder = compare(setting, out=command.out)
    summary = summarise(folder)
    print(f"\n{table.text(summary)}\n\n" + "\n".join(verdict.sentences(summary)))
    print(f"\nreport: {(folder / 'report.html').resolve()}")
    return 0


def _plan(command: Plan) -> int:
    _configure(command.x64)
    from diffmbrl.plan import Setting, plan
    from diffmbrl.runs import plan_text

    setting = Setting(
        task=command.task,
        planner=command.planner,
        mpc=command.mpc,
        horizon=command.horizon,
        steps=command.steps,
        iterations=command.iterations,
        parameters=_parameters(command.param),
        mismatch=_parameters(command.model_mismatch, "--model-mismatch", "mass=1.2"),
        noise=command.noise,
        delay=command.delay,
        starts=command.starts,
        key=command.key,
        x64=command.x64,
    )
    folder = plan(setting, out=command.out)
    print(f"\n{plan_text(folder)}")
    print(f"\nreport: {(folder / 'report.html').resolve()}")
    return 0


def _diagnose(command: Diagnose) -> int:
    _configure(True)
    from diffmbrl.diagnose import Setting, diagnose
    from diffmbrl.runs import health_text
    from diffmbrl.tasks import TASKS
    from diffmbrl.tasks.registry import known

    row = TASKS[known("task", command.task, TASKS)]
    if command.policy is not None and command.hidden:
        raise ValueError("--hidden is of a random first policy and --policy names a trained one: give one of them")
    setting = Setting(
        task=command.task,
        horizons=tuple(command.horizons),
        policy=command.policy,
        scale=command.scale,
        hidden=tuple(command.hidden or row.hidden),
        parameters=_parameters(command.param),
        starts=command.starts,
        std=command.std,
        key=command.key,
    )
    folder = diagnose(setting, out=command.out)
    print(f"\n{health_text(folder)}")
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


def _parameters(pairs: list[str], option: str = "--param", example: str = "m_p=0.2") -> dict[str, float]:
    """name=value pairs. Raises: `ValueError` for one that is not."""
    parameters = {}
    for pair in pairs:
        name, equals, number = pair.partition("=")
        try:
            parameters[name] = float(number)
        except ValueError:
            equals = ""
        if not equals:
            raise ValueError(f"{option} takes name=value with a number, such as {example}; got '{pair}'")
        if [given.partition("=")[0] for given in pairs].count(name) > 1:
            raise ValueError(f"{option} {name} is given more than once: {' '.join(pairs)}")
    return parameters


def _configure(x64: bool) -> None:
    """Precision, and a compilation cache that outlives the process; before anything is computed."""
    import jax

    jax.config.update("jax_enable_x64", x64)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(DEFAULT_CACHE.expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


RUN = {Compare: _compare, Plan: _plan, Diagnose: _diagnose, Report: _report, Tasks: _tasks, Doctor: _doctor}


if __name__ == "__main__":
    sys.exit(main())
