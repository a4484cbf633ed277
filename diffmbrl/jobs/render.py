"""Animate the best policy of a run, or its plan, in one self-contained file (`diffmbrl render`)."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffmbrl.agents.collect import Acting
from diffmbrl.core import State, Task
from diffmbrl.jobs.configs import RenderConfig
from diffmbrl.jobs.learn import restore_agent
from diffmbrl.jobs.policies import load_policy
from diffmbrl.render.animated_gif import gif
from diffmbrl.render.html import animate, animation_page
from diffmbrl.render.page import escape, prose
from diffmbrl.render.registry import frames
from diffmbrl.report import learning_curves, words
from diffmbrl.report.skeleton import of_kind
from diffmbrl.rollout import returns, rollout
from diffmbrl.runs import read_config
from diffmbrl.runs.folder import write_atomic
from diffmbrl.runs.metrics import read_metrics
from diffmbrl.tasks import TASKS, make


class Film(NamedTuple):
    """A trajectory to be drawn.

    Args:
        task: The task.
        s: States, shape [T+1, n].
        a: Actions, shape [T, m].
        title: The policy, the start and the return, in words.
    """

    task: Task
    s: np.ndarray
    a: np.ndarray
    title: str


def config_of(run: Path) -> dict[str, Any]:
    """Read the config of a run that can be animated.

    Args:
        run: The run folder.

    Returns:
        The entries of its `config.json`.

    Raises:
        ValueError: If it is no run, or of a job that leaves nothing to draw.
    """
    config = read_config(run)
    if config.get("job") not in FILMS:
        raise ValueError(
            f"'{run}' is a run of '{config.get('job')}': only {', '.join(FILMS)} leave something that moves"
        )
    return config


def render_run(config: RenderConfig) -> Path:
    """Animate the best policy of a run, or its plan.

    A comparison or agents show the policy with the highest return, unless `method` names another; a plan shows its trajectory
    from the start. The animation ends with the episode, or before the first non-finite state.

    Args:
        config: The run folder, the policy, the start and the file.

    Returns:
        The path of the file.

    Raises:
        ValueError: If the folder is no such run, if it lacks what is asked for, or if it has another precision than the present
            one.
    """
    run = Path(config.run)
    written = config_of(run)
    if config.start < 0:
        raise ValueError(f"start must be at least 0, got {config.start}")
    try:
        film = FILMS[written["job"]](run, written, config.method, config.seed, config.start)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"'{run}' does not hold what a run of {written['job']!r} writes ({what})") from error
    path = run / f"animation.{'gif' if config.gif else 'html'}" if config.out is None else Path(config.out)
    length = int(np.argmin(np.append(np.isfinite(film.s).all(1), False)))  # states before the first that is not finite
    if length < 2:
        raise ValueError(f"{film.title}: the first step is not finite, so there is nothing to draw")
    shapes = frames(film.task, film.s[:length])
    low, high = (np.asarray(limit, float) for limit in (film.task.a_low, film.task.a_high))
    row = TASKS.get(film.task.name)
    layout = {"dt": film.task.dt, "a_low": low, "a_high": high, "action_names": None if row is None else row.actions}
    a = film.a[: length - 1]
    if config.gif:
        gif(path, shapes, a, title=f"{written['task']}: {film.title}", **layout)
    else:
        note = f'<p class="note">{prose(film.title)}</p>'
        heading = f'<p class="kicker">diffmbrl {escape(written["job"])}</p>\n<h1>{escape(written["task"])}</h1>\n{note}'
        write_atomic(
            path, animation_page(f"{written['task']} \u00b7 {film.title}", f"{heading}\n{animate(shapes, a, **layout)}")
        )
    return path


def _of_plan(run: Path, config: dict[str, Any], method: str | None, seed: int | None, start: int) -> Film:
    if method is not None or seed is not None:
        raise ValueError("a run of `plan` has one planner and no seeds: it takes --start alone")
    records = read_metrics(run / "metrics.jsonl")[0]
    kept = {record["start"]: record for record in of_kind(records, "trajectory")}
    if start not in kept:
        raise ValueError(f"the run has starts {', '.join(map(str, kept)) or '(none)'}, got {start}")
    task = make(config["task"], horizon=len(kept[start]["a"]), **config["parameters"])
    earned = [record["return"] for record in of_kind(records, "result") if record["start"] == start]
    who = f"{config['planner']}{' in the loop' if config['mpc'] else ''}"
    s, a = (np.asarray(kept[start][name], float) for name in ("s", "a"))
    return Film(task, s, a, f"{who}, start {start}{_earned(*earned)}")


def _of_comparison(run: Path, config: dict[str, Any], method: str | None, seed: int | None, start: int) -> Film:
    if not list((run / "policies").glob("*.json")):
        raise ValueError(
            f"'{run}' compares planners, whose plans are not kept: `diffmbrl plan {config['task']}` draws them"
        )
    task = make(config["task"], horizon=config["horizon"], **config["parameters"])
    place = str(run) if method is None and seed is None else f"{run}:{_named(run, task, method)}:{seed or 0}"
    saved = load_policy(place, task)
    s0 = task.initial(_key(config, start))
    trajectory = jax.jit(rollout)(saved.policy, task, s0)
    rate = "" if saved.rate is None else f" at rate {saved.rate:g}"
    length = int(np.sum(np.asarray(trajectory.alive)[:-1]))
    states = jax.tree.map(lambda x, last: jnp.concatenate([x, last[None]])[: length + 1], trajectory.s, trajectory.s_T)
    title = f"{saved.method}{rate}, seed {saved.seed}, start {start}{_earned(float(returns(trajectory, task)))}"
    return Film(task, _flat(states), np.asarray(trajectory.a)[:length], title)


def _of_agents(run: Path, config: dict[str, Any], method: str | None, seed: int | None, start: int) -> Film:
    found = [
        agent for agent in learning_curves.collect_curves(read_metrics(run / "metrics.jsonl")[0]) if agent.measured
    ]
    leader = learning_curves.leader(found)
    name = method or (config["agents"][0] if leader is None else leader.method)
    restored = restore_agent(run, name)
    if seed is None:
        ends = [agent.curve[1][-1] for agent in found if agent.method == name]
        seed = int(np.argmax(np.nan_to_num(ends[0], nan=-np.inf))) if ends else 0
    if not 0 <= seed < len(restored.keys):
        raise ValueError(f"the run has seeds 0 to {len(restored.keys) - 1}, got {seed}")
    system, carry = restored.system, jax.tree.map(lambda x: x[seed : seed + 1], restored.carry)
    who, key = Acting(restored.agent, system.view, "best"), _key(config, start)[None]
    places = system.begin(who, carry, key, 1, jnp.zeros(1, jnp.int32))
    _, steps = system.collect(who, carry, places, key, steps=system.horizon)
    length = 1 + int(np.argmax(np.asarray(steps.steps.last)[0, 0]))
    states = jax.tree.map(
        lambda x, y: jnp.concatenate([x[0, 0, :length], y[0, 0, length - 1 : length]]),
        steps.steps.s,
        steps.steps.s_next,
    )
    title = f"{name}, seed {seed}, start {start}{_earned(float(steps.J[0, 0, length - 1]))}"
    return Film(system.view, _flat(states), np.asarray(steps.steps.a)[0, 0, :length], title)


FILMS = {"plan": _of_plan, "compare": _of_comparison, "learn": _of_agents}


def _named(run: Path, task: Task, method: str | None) -> str:
    return load_policy(str(run), task).method if method is None else method


def _key(config: dict[str, Any], start: int) -> Any:
    """The key of a start state outside the training set."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(config["key"]), 2**31 - 2), start)


def _earned(J: float = math.nan) -> str:
    return "" if math.isnan(J) else f": return {words.format_number(J)}"


def _flat(states: State) -> np.ndarray:
    leaves = [np.asarray(x) for x in jax.tree.leaves(states)]
    return np.concatenate([x.reshape(len(x), -1) for x in leaves], axis=1)
