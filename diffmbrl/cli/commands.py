"""What the commands of the command line are given: one dataclass each, whose docstrings are its help."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass
class Compare:
    """Compare methods on one task: same starts, seeds and cost axes. Ends with a table, figures and a report."""

    task: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TASK")]
    """Name of a task; `diffmbrl tasks` lists them."""
    methods: list[str] = field(default_factory=list)
    """Methods to run; by default all that fit the task. With --learned, agents of `diffmbrl learn`."""
    learned: bool = False
    """Race agents that do not know the dynamics and learn from real steps, instead of methods that know them."""
    real_steps: int | None = None
    """Real steps of each seed of an agent; for --learned."""
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
    checkpoint_every: float = 30.0
    """Seconds between two checkpoints, from which `diffmbrl resume` goes on; 0: at each look."""
    track: list[str] = field(default_factory=list)
    """Where the run is followed beside its metrics.jsonl: `tensorboard`, `wandb` (offline)."""
    devices: int = 1
    """Devices that each seed's starts are shared out among; with --learned, the seeds. On a CPU, parts of the host."""
    out: Path | None = None
    """Run folder; by default runs/<task>-compare-<hash>, or with --learned runs/<task>-learn-<hash>."""


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
    checkpoint_every: float = 30.0
    """Seconds between two checkpoints, from which `diffmbrl resume` goes on; 0: at each look."""
    track: list[str] = field(default_factory=list)
    """Where the run is followed beside its metrics.jsonl: `tensorboard`, `wandb` (offline)."""
    devices: int = 1
    """Devices that the samples of a planner that draws are shared out among; of another planner with --mpc, the starts. On a
    CPU, parts of the host."""
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
    """A trained policy: RUN, RUN:method or RUN:method:seed, RUN the folder of a comparison or of agents that learned; by
    default a random first policy."""
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
class Learn:
    """Let an agent learn from real steps, with a model of the system or without. Ends with a table, figures and a report."""

    task: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TASK")]
    """Name of a task; `diffmbrl tasks` lists them. `gym:ID` is the environment of that id of Gymnasium's, as a real system."""
    agent: str
    """The agent; `diffmbrl agents` lists them."""
    real_steps: int | None = None
    """Steps of the real system, of each seed; by default the agent's own number."""
    budget: float = 300.0
    """Seconds of updates and real steps, compile time and evaluation apart."""
    seeds: int = 3
    """Seeds, run side by side."""
    evaluations: int | None = None
    """Starts of each evaluation without exploration, 0 for none; by default the agent's own number."""
    option: list[str] = field(default_factory=list)
    """Options of the agent, as name=value; `diffmbrl agents` lists them."""
    horizon: int | None = None
    """Time steps of an episode; by default the task's own."""
    param: list[str] = field(default_factory=list)
    """Physical parameters of the task, as name=value."""
    noise: float = 0.0
    """Standard deviation of noise added to every state of the system at each step."""
    sensor_noise: float = 0.0
    """Standard deviation of noise on every state as the agent sees it."""
    given: list[str] = field(default_factory=list)
    """Of a system `gym:ID`, what is given and not learned: `reward`, `end`."""
    nonfinite: Literal["reject", "stop"] = "reject"
    """What comes of a step or an update that is not finite: `reject` it, name it in the report and go on, or `stop` there."""
    key: int = 0
    """Number from which every random draw follows."""
    x64: bool = False
    """Compute in float64."""
    checkpoint_every: float = 30.0
    """Seconds between two checkpoints, from which `diffmbrl resume` goes on; 0: at each look."""
    track: list[str] = field(default_factory=list)
    """Where the run is followed beside its metrics.jsonl: `tensorboard`, `wandb` (offline)."""
    devices: int = 1
    """Devices that the seeds are shared out among. On a CPU, parts of the host."""
    out: Path | None = None
    """Run folder; by default runs/<task>-learn-<hash>."""


@dataclass
class Resume:
    """Go on with a run of compare, learn or plan that was interrupted, from its newest checkpoint, to the same numbers."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    checkpoint_every: float = 30.0
    """Seconds between two checkpoints; 0: at each look."""
    track: list[str] = field(default_factory=list)
    """Where the rest of the run is followed beside its metrics.jsonl: `tensorboard`, `wandb` (offline)."""


@dataclass
class Sweep:
    """Run many settings of `compare` or `learn` from a file, those that compile together as one program. Ends with a table,
    a figure and a report; run again, it runs what is missing."""

    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """A TOML file with [setting], [grid] and [random]; see the README."""
    processes: int = 1
    """Programs run side by side, each in a process of its own if more than 1; 0 runs nothing and collects what there is."""
    slurm: list[str] | None = None
    """Submit the programs as jobs instead, with parameters of submitit as name=value: partition=gpu timeout_min=60."""
    out: Path | None = None
    """Folder; by default runs/<name>-sweep."""


@dataclass
class Report:
    """Rebuild the figures and the report of a run from its data alone."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder."""


@dataclass
class Render:
    """Draw the best policy of a run, or its plan, moving: one HTML file that needs nothing else, or a GIF."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder of `compare`, `learn` or `plan`."""
    gif: bool = False
    """A GIF instead."""
    method: str | None = None
    """The method or agent; by default the one with the best return."""
    seed: int | None = None
    """Its seed; by default an agent's best, a method's first."""
    start: int = 0
    """Which start: of a plan one of its own, else any number, of a start that nothing was trained on."""
    out: Path | None = None
    """The file; by default animation.html or animation.gif in the run's folder."""


@dataclass
class Agents:
    """List the agents that learn, with their options."""


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
    | Annotated[Learn, tyro.conf.subcommand("learn")]
    | Annotated[Resume, tyro.conf.subcommand("resume")]
    | Annotated[Sweep, tyro.conf.subcommand("sweep")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Render, tyro.conf.subcommand("render")]
    | Annotated[Agents, tyro.conf.subcommand("agents")]
    | Annotated[Tasks, tyro.conf.subcommand("tasks")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
)
