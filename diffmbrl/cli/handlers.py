"""What each command of the command line does: read its options, run, and say where the report is.

What they need is imported when they run: `diffmbrl --help` waits for no one.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

from diffmbrl.cli.commands import Agents, Compare, Diagnose, Doctor, Learn, Plan, Render, Report, Resume, Sweep, Tasks
from diffmbrl.cli.options import parse_numbers, parse_pairs
from diffmbrl.jobs.configure import configure


def _compare(command: Compare) -> int:
    if command.learned:
        return _race(command)
    if command.real_steps is not None:
        raise ValueError("--real-steps is for agents that learn: give --learned too")
    configure(command.x64, command.devices)
    from diffmbrl.choices import validate_choice
    from diffmbrl.devices import primary_only
    from diffmbrl.jobs.compare import CompareConfig, compare
    from diffmbrl.methods import METHODS
    from diffmbrl.tasks import TASKS, make

    row = TASKS[validate_choice("task", command.task, TASKS)]
    parameters = parse_numbers(command.param)
    task = make(command.task, horizon=command.horizon, **parameters)
    # A line search takes no estimator: by default it is left out when one is asked for.
    fitting = (name for name, row in METHODS.items() if row.default and not (command.estimator and row.sequential))
    names = command.methods or list(fitting)
    setting = CompareConfig(
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
        devices=command.devices,
    )
    with primary_only(command.out) as (out, stream):
        return _compared(compare(setting, out=out, stream=stream, **_kept(command)), stream)


def _compared(folder: Path, stream: Any = None) -> int:
    from diffmbrl.report import summary_text

    return _shown(folder, summary_text(folder), stream)


def _plan(command: Plan) -> int:
    configure(command.x64, command.devices)
    from diffmbrl.devices import primary_only
    from diffmbrl.jobs.plan import PlanConfig, plan

    setting = PlanConfig(
        task=command.task,
        planner=command.planner,
        mpc=command.mpc,
        horizon=command.horizon,
        steps=command.steps,
        iterations=command.iterations,
        parameters=parse_numbers(command.param),
        mismatch=parse_numbers(command.model_mismatch, "--model-mismatch", "mass=1.2"),
        noise=command.noise,
        delay=command.delay,
        starts=command.starts,
        key=command.key,
        x64=command.x64,
        devices=command.devices,
    )
    with primary_only(command.out) as (out, stream):
        return _planned(plan(setting, out=out, stream=stream, **_kept(command)), stream)


def _planned(folder: Path, stream: Any = None) -> int:
    from diffmbrl.report import summary_text

    return _shown(folder, summary_text(folder), stream)


def _diagnose(command: Diagnose) -> int:
    configure(True)
    from diffmbrl.choices import validate_choice
    from diffmbrl.jobs.diagnose import DiagnoseConfig, diagnose
    from diffmbrl.report import summary_text
    from diffmbrl.tasks import TASKS

    row = TASKS[validate_choice("task", command.task, TASKS)]
    if command.policy is not None and command.hidden:
        raise ValueError("--hidden is of a random first policy and --policy names a trained one: give one of them")
    setting = DiagnoseConfig(
        task=command.task,
        horizons=tuple(command.horizons),
        policy=command.policy,
        scale=command.scale,
        hidden=tuple(command.hidden or row.hidden),
        parameters=parse_numbers(command.param),
        starts=command.starts,
        std=command.std,
        key=command.key,
    )
    folder = diagnose(setting, out=command.out)
    return _shown(folder, summary_text(folder))


def _learn(command: Learn) -> int:
    configure(command.x64, command.devices)
    from diffmbrl.devices import primary_only
    from diffmbrl.jobs.learn import LearnConfig, learn_agents

    setting = LearnConfig(
        task=command.task,
        agents=(command.agent,),
        options=parse_pairs(command.option, "--option", "name=value, such as warmup=500"),
        real_steps=command.real_steps,
        budget=command.budget,
        seeds=command.seeds,
        evaluations=command.evaluations,
        horizon=command.horizon,
        parameters=parse_numbers(command.param),
        noise=command.noise,
        sensor_noise=command.sensor_noise,
        key=command.key,
        x64=command.x64,
        given=tuple(command.given),
        devices=command.devices,
        nonfinite=command.nonfinite,
    )
    with primary_only(command.out) as (out, stream):
        return _learned(learn_agents(setting, out=out, stream=stream, **_kept(command)), stream)


def _race(command: Compare) -> int:
    """Agents side by side; what is of methods alone is refused."""
    takes = {
        "task",
        "methods",
        "learned",
        "real_steps",
        "horizon",
        "seeds",
        "budget",
        "param",
        "key",
        "x64",
        "track",
        "devices",
        "out",
        "checkpoint_every",
    }
    asked = command.__dict__ | {"task": ""}
    blank = Compare("").__dict__
    for option in fields(Compare):
        if option.name not in takes and asked[option.name] != blank[option.name]:
            raise ValueError(f"--{option.name} is of methods that know the dynamics: --learned does not take it")
    configure(command.x64, command.devices)
    from diffmbrl.agents.registry import AGENTS
    from diffmbrl.devices import primary_only
    from diffmbrl.jobs.learn import LearnConfig, learn_agents

    setting = LearnConfig(
        task=command.task,
        agents=tuple(command.methods or [name for name, row in AGENTS.items() if row.default]),
        options={},
        real_steps=command.real_steps,
        budget=command.budget,
        seeds=command.seeds,
        evaluations=None,
        horizon=command.horizon,
        parameters=parse_numbers(command.param),
        noise=0.0,
        sensor_noise=0.0,
        key=command.key,
        x64=command.x64,
        devices=command.devices,
    )
    with primary_only(command.out) as (out, stream):
        return _learned(learn_agents(setting, out=out, stream=stream, **_kept(command)), stream)


def _learned(folder: Path, stream: Any = None) -> int:
    from diffmbrl.report import summary_text

    return _shown(folder, summary_text(folder), stream)


def _resume(command: Resume) -> int:
    from diffmbrl.runs import read_config

    config = read_config(command.run)
    devices = config.get("devices", 1)
    configure(config.get("x64") is True, devices if isinstance(devices, int) else 1)
    from diffmbrl.devices import resume_copies
    from diffmbrl.jobs.resume import is_finished, resume

    if is_finished(command.run):
        print(f"'{command.run}' is finished: there is nothing to resume")
        return 0
    with resume_copies(command.run) as (place, stream):
        folder = resume(place, stream=stream, **_kept(command))
        return {"compare": _compared, "learn": _learned, "plan": _planned}[config["job"]](folder, stream)


def _shown(folder: Path, text: str, stream: Any = None) -> int:
    print(f"\n{text}\n\nreport: {(folder / 'report.html').resolve()}", file=stream)
    return 0


def _kept(command: Compare | Plan | Learn | Resume) -> dict[str, Any]:
    """What is kept of a run on its way. Raises: `ValueError` if there is no such time between two checkpoints."""
    if not 0 <= command.checkpoint_every < float("inf"):
        raise ValueError(
            f"checkpoint-every must be a number of seconds of at least 0, got {command.checkpoint_every:g}"
        )
    return {"every": command.checkpoint_every, "track": command.track}


def _sweep(command: Sweep) -> int:
    from diffmbrl.jobs.sweep.points import read_sweep

    asked = read_sweep(command.file)
    configure(asked.x64)
    from diffmbrl.jobs.sweep import sweep
    from diffmbrl.report import summary_text

    given = (
        None if command.slurm is None else parse_pairs(command.slurm, "--slurm", "name=value, such as timeout_min=60")
    )
    slurm = None if given is None else {name: int(x) if x.isdecimal() else x for name, x in given.items()}
    folder, complete = sweep(asked, out=command.out, processes=command.processes, slurm=slurm)
    _shown(folder, summary_text(folder))
    return 0 if complete or slurm is not None else 1


def _report(command: Report) -> int:
    from diffmbrl.report import rebuild

    print(f"report: {rebuild(command.run).resolve()}")
    return 0


def _render(command: Render) -> int:
    from diffmbrl.jobs.render import config_of, render

    configure(bool(config_of(command.run).get("x64")))
    path = render(
        command.run,
        out=command.out,
        as_gif=command.gif,
        method=command.method,
        seed=command.seed,
        start=command.start,
    )
    print(f"animation: {path.resolve()}")
    return 0


def _agents(command: Agents) -> int:
    from diffmbrl.agents.registry import agents_listing

    print(agents_listing())
    return 0


def _tasks(command: Tasks) -> int:
    from diffmbrl.tasks.listing import tasks_listing

    print(tasks_listing())
    return 0


def _doctor(command: Doctor) -> int:
    configure(command.x64)
    from diffmbrl.jobs.doctor import diagnose

    healthy, text = diagnose()
    print(text)
    return 0 if healthy else 1


RUN = {
    Compare: _compare,
    Plan: _plan,
    Diagnose: _diagnose,
    Learn: _learn,
    Resume: _resume,
    Sweep: _sweep,
    Report: _report,
    Render: _render,
    Agents: _agents,
    Tasks: _tasks,
    Doctor: _doctor,
}
