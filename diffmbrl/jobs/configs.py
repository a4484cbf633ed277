"""The options of every job, each in one place: a frozen dataclass.

Its fields and types are the options of the command line, the entries of `config.json` and the keys of a sweep; its defaults and
the `Args:` of its docstring are theirs too. None or an empty tuple stands for the task's or the method's own value, which the
job's `resolve` fills in. Nothing here imports JAX, so `diffmbrl --help` does not wait for the jobs.
"""

from dataclasses import dataclass, field, fields
from io import TextIOBase
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

from diffmbrl.runs.session import EVERY

Group = Literal["task", "method", "planner", "agent", "policy", "budget", "output", "precision"]


class Option(NamedTuple):
    """The place of a field on the command line and in a sweep.

    Args:
        group: The group of the command's help that shows it.
        flag: Its name on the command line, if it is another than the field's; an empty one leaves it out.
        single: The name of one element of a tuple, where only one is given: a point of a sweep, or `learn --agent`.
        single_help: Its help.
        swept: Whether a sweep may set it.
        added: Whether a `config.json` of an earlier version may lack it, so that the default holds.
        metavar: The placeholder of its value in the help. A path, a task and a run without a default are positional.
    """

    group: Group
    flag: str | None = None
    single: str | None = None
    single_help: str | None = None
    swept: bool = True
    added: bool = False
    metavar: str | None = None


AGENT_HELP = "The agent; `diffmbrl agents` lists them."
TaskName = Annotated[str, Option("task", metavar="TASK")]
Horizon = Annotated[int | None, Option("task")]
Parameters = Annotated[dict[str, float | str], Option("task", "param", metavar="NAME=VALUE ...")]
Key = Annotated[int, Option("budget")]
X64 = Annotated[bool, Option("precision", swept=False)]
Devices = Annotated[int, Option("precision", swept=False, added=True)]
Out = Annotated[Path | None, Option("output", metavar="PATH")]
Run = Annotated[Path, Option("task", metavar="RUN")]


@dataclass(frozen=True)
class CompareConfig:
    """Compare methods on one task, with the same starts, seeds and cost axes. Ends with a table, figures and a report.

    Args:
        task: Name of a task; `diffmbrl tasks` lists them.
        methods: Methods to compare; by default all that fit the task.
        horizon: Time steps T of an episode; by default the task's own.
        parameters: Physical parameters of the task, such as mass=2.
        hidden: Units of each hidden layer of the policy network; by default the task's own.
        seeds: Seeds, run in parallel.
        starts: Training start states of each seed. With 32, a policy overfits them.
        steps: Updates of each method; by default the method's own number.
        budget: Seconds of updates for each method, without compilation and evaluation.
        rates: Learning rates, for the methods that have one; by default the method's own list.
        continuation: `default`: the method's own; for all methods, `discounts`: .8 .9 .95 .98 1; `trust`: from the measured
            sensitivity of each start; `measured`: discounts from the closed loop's growth; `none`: no continuation.
        x64: Compute in float64 instead of float32.
        key: Seed of all random numbers.
        estimators: Gradient estimators, each used in every first-order method: `bptt` (the default), `truncated`,
            `clipped-adjoint`, `likelihood-ratio` ...; an unknown name is answered with the list.
        devices: Devices that share the starts of each seed; on a CPU, parts of the host.
    """

    task: TaskName
    methods: Annotated[tuple[str, ...], Option("method", single="method")] = ()
    horizon: Horizon = None
    parameters: Parameters = field(default_factory=dict)
    hidden: Annotated[tuple[int, ...], Option("method")] = ()
    seeds: Annotated[int, Option("budget")] = 3
    starts: Annotated[int, Option("budget")] = 128
    steps: Annotated[int | None, Option("budget")] = None
    budget: Annotated[float, Option("budget")] = 90.0
    rates: Annotated[tuple[float, ...], Option("method", "lr", single="lr")] = ()
    continuation: Annotated[str, Option("method")] = "default"
    x64: X64 = False
    key: Key = 0
    estimators: Annotated[tuple[str, ...], Option("method", "estimator", single="estimator", added=True)] = ()
    devices: Devices = 1


@dataclass(frozen=True)
class LearnConfig:
    """Let agents learn from real steps, with a model of the system or without. Ends with a table, figures and a report.

    Args:
        task: Name of a task; `diffmbrl tasks` lists them. `gym:ID` is Gymnasium's environment ID, as a real system.
        agents: Agents, run one after another; by default all except `model-reinforce`. `diffmbrl agents` lists them.
        options: Options of the agents; `diffmbrl agents` lists them.
        real_steps: Steps of the real system for each seed; by default the agent's own number, or 3000 for several agents.
        budget: Seconds of updates and real steps for each agent, without compilation and evaluation.
        seeds: Seeds, run in parallel.
        evaluations: Episodes of each evaluation without exploration, 0 for no evaluation; by default the agent's own number.
        horizon: Time steps T of an episode; by default the task's own.
        parameters: Physical parameters of the task, such as mass=2.
        noise: Standard deviation of the noise added to every state of the system at each step, in the state's units.
        sensor_noise: Standard deviation of the noise on every state that the agent observes, in the state's units.
        key: Seed of all random numbers.
        x64: Compute in float64 instead of float32.
        given: Known parts of a system `gym:ID`, which are not learned: `reward`, `end`.
        devices: Devices that share the seeds; on a CPU, parts of the host.
        nonfinite: On a non-finite step or update: `reject` it, name it in the report and continue, or `stop`.
    """

    task: TaskName
    agents: Annotated[tuple[str, ...], Option("agent", single="agent", single_help=AGENT_HELP)] = ()
    options: Annotated[dict[str, Any], Option("agent", "option", metavar="NAME=VALUE ...")] = field(
        default_factory=dict
    )
    real_steps: Annotated[int | None, Option("budget")] = None
    budget: Annotated[float, Option("budget")] = 300.0
    seeds: Annotated[int, Option("budget")] = 3
    evaluations: Annotated[int | dict[str, int] | None, Option("budget")] = None
    horizon: Horizon = None
    parameters: Parameters = field(default_factory=dict)
    noise: Annotated[float, Option("task")] = 0.0
    sensor_noise: Annotated[float, Option("task")] = 0.0
    key: Key = 0
    x64: X64 = False
    given: Annotated[tuple[str, ...], Option("task", swept=False, added=True)] = ()
    devices: Devices = 1
    nonfinite: Annotated[Literal["reject", "stop"], Option("precision", swept=False, added=True)] = "reject"


@dataclass(frozen=True)
class PlanConfig:
    """Plan from start states, or control with the planner in the loop. Ends with a table, an animation and a report.

    Args:
        task: Name of a task; `diffmbrl tasks` lists them.
        planner: A planning method of `diffmbrl compare`.
        mpc: Model-predictive control: plan again from the present state at each step, and apply the first action.
        horizon: Time steps of the plan; by default the task's own, with --mpc a window of at most 50.
        steps: Time steps of an episode with --mpc; by default the task's own horizon.
        iterations: Updates of the plan; by default the planner's own number, with --mpc 1 in each step.
        parameters: Physical parameters of the task, such as mass=2.
        mismatch: Parameters of the plant, as factors on those of the planner's model.
        noise: Standard deviation of the noise added to every state of the plant at each step, in the state's units.
        delay: Steps by which the actions arrive late, with --mpc; the controller predicts through them.
        starts: Start states, drawn from the task's distribution.
        key: Seed of all random numbers, start states included.
        x64: Compute in float64 instead of float32.
        devices: Devices that share the samples of a sampling planner, or with --mpc the starts; on a CPU, parts of the host.
    """

    task: TaskName
    planner: Annotated[str, Option("planner")] = "ilqr"
    mpc: Annotated[bool, Option("planner")] = False
    horizon: Annotated[int | None, Option("planner")] = None
    steps: Annotated[int | None, Option("budget")] = None
    iterations: Annotated[int | None, Option("budget")] = None
    parameters: Parameters = field(default_factory=dict)
    mismatch: Annotated[dict[str, float], Option("task", "model-mismatch", metavar="NAME=FACTOR ...")] = field(
        default_factory=dict
    )
    noise: Annotated[float, Option("task")] = 0.0
    delay: Annotated[int, Option("task")] = 0
    starts: Annotated[int, Option("budget")] = 1
    key: Key = 0
    x64: X64 = False
    devices: Devices = 1


@dataclass(frozen=True)
class DiagnoseConfig:
    """Find out why backpropagation through time fails, from which horizon on, and which estimator to use instead.

    Measures in float64 and float32, whatever the precision in which the policy was trained. Ends with a verdict, figures and a
    report.

    Args:
        task: Name of a task; `diffmbrl tasks` lists them.
        horizons: Time steps T at which the gradient is measured, increasing.
        policy: A trained policy, RUN, RUN:method or RUN:method:seed, with the folder of a run of `compare`, `learn` or
            `race`; by default a random initial policy.
        scale: Factor on the last layer of the random initial policy; by default 1.
        hidden: Units of each hidden layer of the random initial policy; by default the task's own.
        parameters: Physical parameters of the task, such as mass=2.
        starts: Start states, one sample of the gradient each.
        std: Standard deviation of the smoothed estimators' noise, in half widths of the action limits.
        key: Seed of all random numbers.
    """

    task: TaskName
    horizons: Annotated[tuple[int, ...], Option("task")] = (10, 50, 100, 200, 400)
    policy: Annotated[str | None, Option("policy")] = None
    scale: Annotated[float | None, Option("policy")] = None
    hidden: Annotated[tuple[int, ...], Option("policy")] = ()
    parameters: Parameters = field(default_factory=dict)
    starts: Annotated[int, Option("budget")] = 512
    std: Annotated[float, Option("budget")] = 0.1
    key: Key = 0


@dataclass(frozen=True)
class RunOptions:
    """Options of a run that do not change its numbers, so `config.json` does not hold them.

    Args:
        out: Run folder; by default runs/<task>-<job>-<hash>, where a race is a job `learn` too.
        checkpoint_every: Seconds between two checkpoints, from which `diffmbrl resume` continues; 0: after every evaluation.
        track: Trackers that receive the records of metrics.jsonl too: `tensorboard`, `wandb` (offline).
        stream: Where progress is shown; None for standard output.

    Raises:
        ValueError: If `checkpoint_every` is not a number of seconds of at least 0.
    """

    out: Out = None
    checkpoint_every: Annotated[float, Option("output")] = EVERY
    track: Annotated[tuple[str, ...], Option("output")] = ()
    stream: Annotated[TextIOBase | None, Option("output", "")] = None

    def __post_init__(self):
        if not 0 <= self.checkpoint_every < float("inf"):
            raise ValueError(
                f"checkpoint-every must be a number of seconds of at least 0, got {self.checkpoint_every:g}"
            )


@dataclass(frozen=True)
class ResumeConfig:
    """Resume an interrupted run of compare, learn, race or plan from its newest checkpoint, to the same numbers.

    Args:
        run: Run folder.
    """

    run: Run


@dataclass(frozen=True)
class SweepConfig:
    """Run many settings of `compare` or `learn` from a file; settings that compile together run as one program.

    Ends with a table, a figure and a report. The same command again runs only the missing points.

    Args:
        file: A TOML file with [setting], [grid] and [random]; see the README.
        processes: Programs that run at the same time, each in its own process if more than 1; 0 only collects results.
        slurm: Submit the programs to a cluster instead, with these parameters of submitit: partition=gpu timeout_min=60.
        out: Folder; by default runs/<name>-sweep.
    """

    file: Annotated[Path, Option("task", metavar="FILE")]
    processes: Annotated[int, Option("budget")] = 1
    slurm: Annotated[dict[str, str] | None, Option("budget", metavar="NAME=VALUE ...")] = None
    out: Out = None


@dataclass(frozen=True)
class ReportConfig:
    """Rebuild the figures and the report of a run from its records.

    Args:
        run: Run folder.
    """

    run: Run


@dataclass(frozen=True)
class RenderConfig:
    """Animate the best policy of a run, or its plan, in one self-contained HTML file or a GIF.

    Args:
        run: Run folder of `compare`, `learn`, `race` or `plan`.
        gif: Write a GIF instead of HTML.
        method: Method or agent; by default the one with the highest return.
        seed: Seed of the method or agent; by default an agent's best, a method's first.
        start: Start state: of a plan, one of its own; otherwise any number, each a start state outside the training set.
        out: File; by default animation.html or animation.gif in the run's folder.
    """

    run: Run
    gif: Annotated[bool, Option("output")] = False
    method: Annotated[str | None, Option("policy")] = None
    seed: Annotated[int | None, Option("policy")] = None
    start: Annotated[int, Option("policy")] = 0
    out: Out = None


@dataclass(frozen=True)
class DoctorConfig:
    """Print versions, devices, precision and the compilation cache's state, and check a gradient.

    Args:
        x64: Check in float64 only.
    """

    x64: X64 = False


def options_of(config: type[Any]) -> dict[str, tuple[Option, Any]]:
    """List the options of a config class.

    Args:
        config: One of the dataclasses above.

    Returns:
        For each field, in order, its `Option` and its type.
    """
    hints = get_type_hints(config, include_extras=True)
    return {x.name: (hints[x.name].__metadata__[0], hints[x.name].__origin__) for x in fields(config)}
