"""Agents that learn from a real system, side by side on one task: what `diffmbrl learn` and `compare --learned` run."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Key

from diffmbrl.agents.collect import NoisySensor, Real, System
from diffmbrl.agents.host import HostSystem
from diffmbrl.agents.learn import Agent, Learned, check_sizes, learn
from diffmbrl.agents.learned_reward import learnable, with_learned_reward
from diffmbrl.agents.registry import AGENTS
from diffmbrl.agents.registry import make_agent as make_agent
from diffmbrl.agents.rollout_error import model_rollout_error
from diffmbrl.choices import validate_choice
from diffmbrl.devices import mesh_of, shard, to_local
from diffmbrl.report import rebuild, words
from diffmbrl.runs import (
    EVERY,
    Session,
    check_out,
    check_sinks,
    config_from_json,
    create,
    interquartile_mean,
    read_config,
    underway,
)
from diffmbrl.runs.arrays import fill, read_arrays, save_arrays
from diffmbrl.tasks import TASKS, make, noisy
from diffmbrl.tasks.adapters import gymnasium
from diffmbrl.tasks.registry import state_names

LOOKS = 20  # evaluations along a run
RACE = 3000  # real steps of several agents, by default
NONFINITE = ("reject", "stop")
SHOWN = ("model_error", "disagreement")  # of what an agent says, shown live


class LearnConfig(NamedTuple):
    """Everything that a run depends on: its config."""

    task: str
    agents: tuple[str, ...]
    options: dict[str, Any]  # of the agents, other than their defaults
    real_steps: int | None
    budget: float  # seconds of each agent's updates and steps
    seeds: int
    evaluations: int | dict[str, int] | None  # starts of each, of all agents or of each
    horizon: int | None
    parameters: dict[str, float | str]  # numbers, and words such as a backend
    noise: float  # of the process
    sensor_noise: float
    key: int
    x64: bool
    given: tuple[str, ...] = ()  # of a system whose reward and end would be learned
    devices: int = 1  # that the seeds are shared out among
    nonfinite: str = "reject"  # or "stop": what comes of a step or an update that is not finite


class ResolvedLearn(NamedTuple):
    """What a setting means."""

    system: Real
    agents: dict[str, Agent]
    keys: Key[Array, " S"]
    real_steps: int
    evaluations: dict[str, int]


class Restored(NamedTuple):
    """An agent as a run left it."""

    agent: Agent
    carry: Any  # leaves [S, ...]
    system: Real
    keys: Key[Array, " S"]


def learn_agents(
    setting: LearnConfig,
    *,
    out: Path | None = None,
    stream: Any = None,
    every: float = EVERY,
    track: Sequence[str] = (),
) -> Path:
    """Let the agents learn, one after another, and return the run folder, with figures and report.

    Seed k of each begins with the same key, so evaluations have the same starts, and warm-ups by random actions are the same.
    What an agent has learned is kept when the run is interrupted, and the report shows what there is. A checkpoint is written
    `every` so many seconds and at the end.
    Raises: `ValueError` for anything wrong in the setting or the folder, before anything is compiled or written.
    """
    check_sinks(track)
    prepared = prepare(setting)
    check_out(out)
    resolved = {"horizon": prepared.system.horizon, "real_steps": prepared.real_steps}
    config = setting._asdict() | resolved | {"evaluations": prepared.evaluations}
    return _run(setting, prepared, create(out, setting.task, "learn", config), stream=stream, every=every, track=track)


def resume(
    folder: Path,
    config: dict[str, Any],
    *,
    stream: Any = None,
    every: float = EVERY,
    track: Sequence[str] = (),
) -> Path:
    """Go on with a race from its newest checkpoint, to the same numbers.

    Raises: `ValueError` if its config or its checkpoints do not fit.
    """
    setting = config_from_json(LearnConfig, config)
    return _run(setting, prepare(setting), folder, stream=stream, every=every, track=track, resumed=True)


def _run(setting: LearnConfig, prepared: ResolvedLearn, folder: Path, **options: Any) -> Path:
    with underway(folder, len(prepared.agents), report=rebuild, **options) as run:
        if run.begins:
            view = prepared.system.view
            names = state_names(view) if setting.task in TASKS else gymnasium.names(view)
            run.write({"kind": "scene", "dt": view.dt, "state_names": names})
        for name in run.arms(prepared.agents):
            _run_agent(name, prepared, setting, run)
    return folder


def prepare(setting: LearnConfig) -> ResolvedLearn:
    """System and agents, everything checked.

    Raises: `ValueError` naming the value that is wrong; `ModuleNotFoundError` for what a system of Gymnasium's needs.
    """
    if not setting.task.startswith(gymnasium.PREFIX):
        validate_choice("task", setting.task, TASKS)
    names = [validate_choice("agent", name.replace("_", "-"), AGENTS) for name in setting.agents]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"agents must be named, each once; got {' '.join(setting.agents) or 'none'}")
    if setting.seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {setting.seeds}")
    if setting.real_steps is not None and setting.real_steps < 1:
        raise ValueError(f"real-steps must be at least 1, got {setting.real_steps}")
    starts = _evaluations(setting, names)
    if min(starts.values()) < 0:
        raise ValueError(f"evaluations must be at least 0 starts, got {min(starts.values())}")
    if not setting.budget > 0:
        raise ValueError(f"budget must be a positive number of seconds, got {setting.budget:g}")
    if not 0 <= setting.key < 2**32:
        raise ValueError(f"key must be a whole number from 0 to {2**32 - 1}, got {setting.key}")
    validate_choice("way with what is not finite", setting.nonfinite, NONFINITE)
    system = _system(setting)
    agents = {name: with_learned_reward(make_agent(name, system.view, setting.options), system.view) for name in names}
    steps = setting.real_steps or (AGENTS[names[0]].real_steps if len(names) == 1 else RACE)
    keys = jax.random.split(jax.random.key(setting.key), setting.seeds)
    mesh = mesh_of(setting.devices)
    if mesh.size > 1 and not isinstance(system, System):
        raise ValueError(f"'{setting.task}' is stepped on the host, by one device; got {setting.devices} devices")
    keys = keys if mesh.size == 1 else shard(keys, mesh, what="seeds")
    for name, agent in agents.items():
        try:
            check_sizes(agent, keys, steps, starts[name], 1)
        except ValueError as error:
            raise ValueError(f"agent '{name}': {error}") from None
    return ResolvedLearn(system, agents, keys, steps, starts)


def _evaluations(setting: LearnConfig, names: list[str]) -> dict[str, int]:
    """The number of starts for each agent."""
    asked = setting.evaluations
    if isinstance(asked, dict):
        if set(asked) != set(names):
            raise ValueError(
                f"evaluations must be given for the agents {' '.join(names)}, got {' '.join(asked) or 'none'}"
            )
        return asked
    return {name: AGENTS[name].evaluations if asked is None else asked for name in names}


def _system(setting: LearnConfig) -> Real:
    """A task, or with the prefix `gym:` an environment of Gymnasium's."""
    if setting.task.startswith(gymnasium.PREFIX):
        for option, std in (("--noise", setting.noise), ("--sensor-noise", setting.sensor_noise)):
            if std:
                raise ValueError(f"{option} is for tasks whose states are known; '{setting.task}' is as it is")
        name = setting.task.removeprefix(gymnasium.PREFIX)
        asked = {"given": setting.given, "parameters": setting.parameters}
        found = gymnasium.environment(name, horizon=setting.horizon, **asked)
        return HostSystem(found.make, learnable(found.task))
    if setting.given:
        raise ValueError(f"--given is for systems of Gymnasium's: of task '{setting.task}' reward and end are given")
    task = make(setting.task, horizon=setting.horizon, **setting.parameters)
    sensor = None if setting.sensor_noise == 0 else NoisySensor(setting.sensor_noise)
    return System(noisy(task, std=setting.noise), view=task, sensor=sensor)


def restore_agent(folder: Path, name: str | None = None) -> Restored:
    """An agent that a run has left, by default the run's first, with the system it learned on.

    `agent.best(carry of one seed, system.view)` is its policy. Raises: `ValueError` if there is none, if its files are not what
    was written, or if the run's precision is another than the one in force.
    """
    config = read_config(folder)
    kept = sorted(path.stem for path in (Path(folder) / "agents").glob("*.json"))
    if not kept:
        raise ValueError(f"'{folder}' has no agents: only `learn` and `compare --learned` leave them")
    x64 = bool(jax.config.jax_enable_x64)  # pyright: ignore[reportAttributeAccessIssue]
    if config["x64"] != x64:
        raise ValueError(
            f"the agents of '{folder}' are in {'float64' if config['x64'] else 'float32'}: set jax_enable_x64"
        )
    first = next(name for name in (*config["agents"], *kept) if name in kept)
    name = validate_choice("agent of the run", first if name is None else name, kept)
    prepared = prepare(config_from_json(LearnConfig, config))
    agent, view = prepared.agents[name], prepared.system.view
    blank = jax.eval_shape(jax.vmap(lambda key: agent.init(view, key)), prepared.keys)
    leaves = read_arrays(Path(folder) / "agents", name)[1]
    return Restored(agent, fill(blank, leaves, f"agent '{name}' of '{folder}'"), prepared.system, prepared.keys)


def _run_agent(name: str, prepared: ResolvedLearn, setting: LearnConfig, run: Session) -> None:
    """One agent, all its seeds: a record of each iteration, why it ended, what it foresees; what it learned and saw."""
    agent, system, keys, real_steps = prepared.agents[name], prepared.system, prepared.keys, prepared.real_steps
    write, progress = run.write, run.progress
    if run.restored is None:
        sizes = {"warmup": agent.warmup, "every": agent.every, "environments": agent.environments}
        write({"kind": "agent", "method": name, "label": name, "text": AGENTS[name].description} | sizes)
    progress.arm(name, real_steps)
    progress.update(0, "compiling")
    latest: Learned | None = None
    shown: dict[str, str] = {}

    def on_record(record: dict[str, Any], learned: Learned) -> None:
        nonlocal latest
        latest = learned
        line = _line(record)
        write({"kind": "iteration", "method": name, "wall": run.seconds} | line)
        shown.update(_shown(line))
        said = [f"{what} {number}" for what, number in shown.items()]
        if setting.nonfinite == "stop" and (found := record.get("nonfinite_in")):
            raise FloatingPointError(f"agent '{name}' met a value that is not finite: {'; '.join(found)}")
        spent = f"{record['seconds']:.1f} s" if record["seconds"] else "compiling the update"
        progress.update(record["real_steps"], ", ".join([*said, spent]))

    def done() -> str:
        return "" if latest is None else f" after {latest.real_steps:,} of {real_steps:,} real steps"

    def keep(stop: str) -> None:
        if latest is not None:
            carry, buffer = to_local((latest.carry, latest.buffer))
            save_arrays(run.folder / "agents", name, carry, seeds=len(keys))
            save_arrays(run.folder / "buffers", name, buffer, seeds=len(keys))
        write({"kind": "stop", "method": name, "reason": stop})

    try:
        latest = learn(
            agent,
            system,
            keys,
            real_steps=real_steps,
            seconds=setting.budget,
            evaluations=prepared.evaluations[name],
            evaluate_every=max(1, -(-(real_steps - agent.warmup) // (agent.every * LOOKS))),
            on_record=on_record,
            checkpointer=run
            if isinstance(system, System)
            else None,  # what steps on the host cannot be kept: begin anew
        )
    except BaseException as error:
        with contextlib.suppress(OSError):  # of a full disk, which is what stopped the run
            keep(("interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {error}") + done())
        raise
    reached = latest.real_steps
    whole = reached + agent.every > real_steps
    keep(f"{reached:,} real steps" if whole else f"budget of {setting.budget:g} s{done()}")
    if (found := model_rollout_error(agent, system, *to_local((latest._replace(records=[]), keys)))) is not None:
        write({"kind": "foresight", "method": name} | found)


def _line(record: dict[str, Any]) -> dict[str, Any]:
    """An iteration's record as it is written: only returns of episodes that ended, what the agent says under one name."""
    counts = ("rejected", "refused", "nonfinite_in")
    own = ("real_steps", "seconds", "cpu_seconds", "ended", "returns", *counts, "evaluation")
    line = {name: record[name] for name in own if name in record and name not in ("ended", "returns")}
    episodes = [J[ended].tolist() for J, ended in zip(record["returns"], record["ended"], strict=True)]
    return line | {"episodes": episodes, "said": {name: x for name, x in record.items() if name not in own}}


def _shown(line: dict[str, Any]) -> dict[str, str]:
    """What is shown live, of what the record has: interquartile means over seeds."""
    values: dict[str, Any] = {"episode": [np.mean(J) for J in line["episodes"] if J] or np.nan}
    if "evaluation" in line:
        values["return"] = np.mean(line["evaluation"], axis=1)
    values |= {name: line["said"][name] for name in SHOWN if name in line["said"]}
    columns = {name.replace("_", " "): np.atleast_1d(np.asarray(x, float)) for name, x in values.items()}
    means = {name: float(interquartile_mean(column)) for name, column in columns.items()}
    return {name: words.format_number(x) for name, x in means.items() if np.isfinite(x)}
