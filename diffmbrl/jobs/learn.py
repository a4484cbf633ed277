"""Let agents learn from a real system: one (`diffmbrl learn`), or several in turn (`diffmbrl race`)."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Key, PyTree

from diffmbrl.agents.collect import NoisySensor, Real, System
from diffmbrl.agents.host import HostSystem
from diffmbrl.agents.learn import Learned, check_sizes, learn
from diffmbrl.agents.learned_reward import learnable, with_learned_reward
from diffmbrl.agents.protocol import Agent
from diffmbrl.agents.registry import AGENTS, make_agent
from diffmbrl.agents.rollout_error import model_rollout_error
from diffmbrl.choices import validate_choice
from diffmbrl.devices import mesh_of, shard, to_local
from diffmbrl.jobs.configs import LearnConfig, RunOptions
from diffmbrl.jobs.job import JobFunctions, restored_config, start_job
from diffmbrl.jobs.table import JOBS
from diffmbrl.report import words
from diffmbrl.runs import Session, interquartile_mean, read_config
from diffmbrl.runs.arrays import fill, read_arrays, save_arrays
from diffmbrl.tasks import TASKS, make, noisy
from diffmbrl.tasks.adapters import gymnasium
from diffmbrl.tasks.registry import state_names

EVALUATIONS = 20  # along a run
REAL_STEPS = 3000  # of several agents, by default
NONFINITE = ("reject", "stop")
SHOWN = ("model_error", "disagreement")  # metrics of an agent that the progress shows


class ResolvedLearn(NamedTuple):
    """A learning job whose defaults are fill in and whose values are checked.

    Args:
        config: The config without open defaults.
        system: The real system.
        agents: The agents by name.
        keys: One key for each seed.
        real_steps: Steps of the real system for each seed.
        evaluations: Episodes of each evaluation, by agent.
    """

    config: LearnConfig
    system: Real
    agents: dict[str, Agent]
    keys: Key[Array, " S"]
    real_steps: int
    evaluations: dict[str, int]

    @property
    def notes(self) -> dict[str, Any]:
        """Further entries of `config.json`: none."""
        return {}


class Restored(NamedTuple):
    """An agent as a run left it.

    Args:
        agent: The agent.
        carry: Its state, leaves [S, ...].
        system: The system that it learned on.
        keys: The keys of the seeds.
    """

    agent: Agent
    carry: PyTree
    system: Real
    keys: Key[Array, " S"]


def race_agents(config: LearnConfig, options: RunOptions | None = None) -> Path:
    """Let agents learn, one after another, and write a run folder with figures and report.

    Seed k of each agent has the same key, so all agents share the starts of evaluations and the warm-up by random actions. If
    the run is interrupted, the agents learned so far are saved and reported.

    Args:
        config: The options of the agents.
        options: The folder, the checkpoints and the trackers.

    Returns:
        The run folder.

    Raises:
        ValueError: If a value of the config or the folder is wrong, before anything is compiled or written.
    """
    return start_job(JOBS["race"], config, options)


def learn_agent(config: LearnConfig, options: RunOptions | None = None) -> Path:
    """Let one agent learn: `race_agents` with a single agent.

    Args:
        config: The options, with one agent.
        options: The folder, the checkpoints and the trackers.

    Returns:
        The run folder.

    Raises:
        ValueError: If there is not exactly one agent, or as `race_agents`.
    """
    if len(config.agents) != 1:
        raise ValueError(f"expected one agent, got {' '.join(config.agents) or 'none'}: race_agents takes several")
    return start_job(JOBS["learn"], config, options)


def resolve(config: LearnConfig) -> ResolvedLearn:
    """Fill in the defaults of a learning job and check its values.

    Args:
        config: The options of the agents.

    Returns:
        The config without open defaults, the system and the agents.

    Raises:
        ValueError: If a value is wrong; the text names it.
        ModuleNotFoundError: If a package is missing that a system of Gymnasium needs.
    """
    if not config.task.startswith(gymnasium.PREFIX):
        validate_choice("task", config.task, TASKS)
    asked = config.agents or tuple(name for name, row in AGENTS.items() if row.default)
    names = [validate_choice("agent", name.replace("_", "-"), AGENTS) for name in asked]
    if len(set(names)) != len(names):
        raise ValueError(f"each agent can be named once, got {' '.join(asked)}")
    if config.seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {config.seeds}")
    if config.real_steps is not None and config.real_steps < 1:
        raise ValueError(f"real-steps must be at least 1, got {config.real_steps}")
    starts = _evaluations(config, names)
    if min(starts.values()) < 0:
        raise ValueError(f"evaluations must be at least 0 starts, got {min(starts.values())}")
    if not config.budget > 0:
        raise ValueError(f"budget must be a positive number of seconds, got {config.budget:g}")
    if not 0 <= config.key < 2**32:
        raise ValueError(f"key must be a whole number from 0 to {2**32 - 1}, got {config.key}")
    validate_choice("choice of --nonfinite", config.nonfinite, NONFINITE)
    system = _system(config)
    agents = {name: with_learned_reward(make_agent(name, system.view, config.options), system.view) for name in names}
    steps = config.real_steps or (AGENTS[names[0]].real_steps if len(names) == 1 else REAL_STEPS)
    keys = jax.random.split(jax.random.key(config.key), config.seeds)
    mesh = mesh_of(config.devices)
    if mesh.size > 1 and not isinstance(system, System):
        raise ValueError(f"'{config.task}' is stepped on the host, by one device; got {config.devices} devices")
    keys = keys if mesh.size == 1 else shard(keys, mesh, what="seeds")
    for name, agent in agents.items():
        try:
            check_sizes(agent, keys, steps, starts[name], 1)
        except ValueError as error:
            raise ValueError(f"agent '{name}': {error}") from None
    config = replace(config, agents=asked, horizon=system.horizon, real_steps=steps, evaluations=starts)
    return ResolvedLearn(config, system, agents, keys, steps, starts)


def _run(resolved: ResolvedLearn, run: Session) -> None:
    if run.begins:
        view = resolved.system.view
        names = state_names(view) if resolved.config.task in TASKS else gymnasium.names(view)
        run.write({"kind": "scene", "dt": view.dt, "state_names": names})
    for name in run.arms(resolved.agents):
        _run_agent(name, resolved, run)


def _evaluations(config: LearnConfig, names: list[str]) -> dict[str, int]:
    """The number of evaluation episodes of each agent."""
    asked = config.evaluations
    if isinstance(asked, dict):
        if set(asked) != set(names):
            raise ValueError(
                f"evaluations must be given for the agents {' '.join(names)}, got {' '.join(asked) or 'none'}"
            )
        return asked
    return {name: AGENTS[name].evaluations if asked is None else asked for name in names}


def _system(config: LearnConfig) -> Real:
    """The system of a task, or of an environment of Gymnasium with the prefix `gym:`."""
    if config.task.startswith(gymnasium.PREFIX):
        for option, std in (("--noise", config.noise), ("--sensor-noise", config.sensor_noise)):
            if std:
                raise ValueError(f"{option} is for tasks whose states are known; '{config.task}' is a real system")
        name = config.task.removeprefix(gymnasium.PREFIX)
        asked = {"given": config.given, "parameters": config.parameters}
        found = gymnasium.environment(name, horizon=config.horizon, **asked)
        return HostSystem(found.make, learnable(found.task))
    if config.given:
        raise ValueError(f"--given is for systems of Gymnasium's: of task '{config.task}' reward and end are given")
    task = make(config.task, horizon=config.horizon, **config.parameters)
    sensor = None if config.sensor_noise == 0 else NoisySensor(config.sensor_noise)
    return System(noisy(task, std=config.noise), view=task, sensor=sensor)


def restore_agent(folder: Path, name: str | None = None) -> Restored:
    """Restore an agent from a run; `agent.best(carry of one seed, system.view)` is its policy.

    Args:
        folder: The run folder.
        name: The agent; by default the run's first.

    Returns:
        The agent with its state and the system that it learned on.

    Raises:
        ValueError: If there is none, if its files are damaged, or if the run has another precision than the present one.
    """
    config = read_config(folder)
    saved = sorted(path.stem for path in (Path(folder) / "agents").glob("*.json"))
    if not saved:
        raise ValueError(f"'{folder}' has no agents: only `learn` and `race` leave them")
    x64 = bool(jax.config.jax_enable_x64)  # pyright: ignore[reportAttributeAccessIssue]
    if config["x64"] != x64:
        raise ValueError(
            f"the agents of '{folder}' are in {'float64' if config['x64'] else 'float32'}: set jax_enable_x64"
        )
    first = next(name for name in (*config["agents"], *saved) if name in saved)
    name = validate_choice("agent of the run", first if name is None else name, saved)
    resolved = resolve(restored_config(JOBS["race"], config))
    agent, view = resolved.agents[name], resolved.system.view
    blank = jax.eval_shape(jax.vmap(lambda key: agent.init(view, key)), resolved.keys)
    leaves = read_arrays(Path(folder) / "agents", name)[1]
    return Restored(agent, fill(blank, leaves, f"agent '{name}' of '{folder}'"), resolved.system, resolved.keys)


def _run_agent(name: str, resolved: ResolvedLearn, run: Session) -> None:
    """Run all seeds of one agent; record its iterations, its end and its model's error, and save its state and its buffer."""
    config, system, agents, keys, real_steps, _ = resolved
    agent = agents[name]
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
        numbers = [f"{name} {number}" for name, number in shown.items()]
        if config.nonfinite == "stop" and (found := record.get("nonfinite_in")):
            raise FloatingPointError(f"agent '{name}' met a non-finite value: {'; '.join(found)}")
        spent = f"{record['seconds']:.1f} s" if record["seconds"] else "compiling the update"
        progress.update(record["real_steps"], ", ".join([*numbers, spent]))

    def done() -> str:
        return "" if latest is None else f" after {latest.real_steps:,} of {real_steps:,} real steps"

    def save_learned(stop: str) -> None:
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
            seconds=config.budget,
            evaluations=resolved.evaluations[name],
            evaluate_every=max(1, -(-(real_steps - agent.warmup) // (agent.every * EVALUATIONS))),
            on_record=on_record,
            checkpointer=run if isinstance(system, System) else None,  # the state of a host system cannot be saved
        )
    except BaseException as error:
        with contextlib.suppress(OSError):  # a full disk may be why the run stopped
            save_learned(("interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {error}") + done())
        raise
    reached = latest.real_steps
    whole = reached + agent.every > real_steps
    save_learned(f"{reached:,} real steps" if whole else f"budget of {config.budget:g} s{done()}")
    if (found := model_rollout_error(agent, system, *to_local((latest._replace(records=[]), keys)))) is not None:
        write({"kind": "foresight", "method": name} | found)


def _line(record: dict[str, Any]) -> dict[str, Any]:
    """The record of an iteration as written: returns of finished episodes only, and the agent's metrics as one entry."""
    counts = ("rejected", "refused", "nonfinite_in")
    own = ("real_steps", "seconds", "cpu_seconds", "ended", "returns", *counts, "evaluation")
    line = {name: record[name] for name in own if name in record and name not in ("ended", "returns")}
    episodes = [J[ended].tolist() for J, ended in zip(record["returns"], record["ended"], strict=True)]
    return line | {"episodes": episodes, "said": {name: x for name, x in record.items() if name not in own}}


def _shown(line: dict[str, Any]) -> dict[str, str]:
    """The numbers that the progress shows: interquartile means over seeds."""
    values: dict[str, Any] = {"episode": [np.mean(J) for J in line["episodes"] if J] or np.nan}
    if "evaluation" in line:
        values["return"] = np.mean(line["evaluation"], axis=1)
    values |= {name: line["said"][name] for name in SHOWN if name in line["said"]}
    columns = {name.replace("_", " "): np.atleast_1d(np.asarray(x, float)) for name, x in values.items()}
    means = {name: float(interquartile_mean(column)) for name, column in columns.items()}
    return {name: words.format_number(x) for name, x in means.items() if np.isfinite(x)}


FUNCTIONS = JobFunctions(resolve, lambda resolved: len(resolved.agents), _run)
