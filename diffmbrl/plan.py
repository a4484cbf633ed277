"""Planning and control from a few starts: what `diffmbrl plan` runs."""

import dataclasses
import inspect
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffmbrl.core import State, Task, keeps_limits
from diffmbrl.devices import agreed, along, beside, check, copied, local, mesh_of, share
from diffmbrl.diagnostics.nonfinite import named
from diffmbrl.methods import METHODS, solver
from diffmbrl.planners import MPC, Predicted, Sampling
from diffmbrl.planners.episode import Episode, finish, proceed, start
from diffmbrl.policies import Affine, first_plan, resting_action, squash
from diffmbrl.rollout import returns, rollout
from diffmbrl.runs import EVERY, Session, check_out, check_sinks, create, settled, underway
from diffmbrl.runs.plan_report import shape_record
from diffmbrl.solve import solve
from diffmbrl.tasks import TASKS, delayed, make, noisy, squashed
from diffmbrl.tasks.drawing import frames
from diffmbrl.tasks.plant import Delayed
from diffmbrl.tasks.registry import known, state_names

WINDOW = 50  # steps that an MPC plans ahead by default
LOOK = 0.5  # seconds between two looks at an MPC's episodes, at least
FIRST = 50  # updates in the first step of its episodes


class Setting(NamedTuple):
    """Everything that a run depends on: its config."""

    task: str
    planner: str
    mpc: bool
    horizon: int | None  # of the plan: the task's own, or for an MPC its window
    steps: int | None  # of an MPC's episode
    iterations: int | None  # updates of the plan, or in each step of an MPC
    parameters: dict[str, float | str]  # numbers, and words such as a backend
    mismatch: dict[str, float]  # factors on the plant's parameters
    noise: float
    delay: int
    starts: int
    key: int
    x64: bool
    devices: int = 1  # that a population's samples are shared out among, or else a controller's starts


class Prepared(NamedTuple):
    """What a setting means."""

    model: Task
    plant: Task
    solver: Any
    horizon: int
    iterations: int
    mesh: Mesh


def plan(
    setting: Setting, *, out: Path | None = None, stream: Any = None, every: float = EVERY, track: Sequence[str] = ()
) -> Path:
    """Plan from each start, or control with the planner in the loop; returns the run folder, with figures and report.

    Either way the result is followed on the plant, which is the model with other parameters, noise or late actions if the
    setting says so. A checkpoint is written `every` so many seconds and at the end.
    Raises: `ValueError` for anything wrong in the setting or the folder, before anything is written.
    """
    check_sinks(track)
    prepared = prepare(setting)
    check_out(out)
    chosen = {"horizon": prepared.horizon, "steps": prepared.plant.horizon, "iterations": prepared.iterations}
    chosen["differs"] = bool(setting.mismatch or setting.noise or setting.delay)
    folder = create(out, setting.task, "plan", setting._asdict() | chosen)
    return _run(setting, prepared, folder, stream=stream, every=every, track=track)


def resume(
    folder: Path,
    config: dict[str, Any],
    *,
    stream: Any = None,
    every: float = EVERY,
    track: Sequence[str] = (),
) -> Path:
    """Go on with a plan from its newest checkpoint, to the same numbers.

    Raises: `ValueError` if its config or its checkpoints do not fit.
    """
    setting = settled(Setting, config, besides={"differs"})
    setting = setting if setting.mpc else setting._replace(steps=None)  # written for the reader
    return _run(setting, prepare(setting), folder, stream=stream, every=every, track=track, resumed=True)


def _run(setting: Setting, prepared: Prepared, folder: Path, **options: Any) -> Path:
    with underway(folder, 1 if setting.mpc else setting.starts, **options) as run:
        if run.begins:
            _write_scene(setting, prepared, run.write)
        (_control if setting.mpc else _plans)(setting, prepared, run)
    return folder


def prepare(setting: Setting) -> Prepared:
    """Model, plant and planner, everything checked.

    Raises: `ValueError` naming the value that is wrong.
    """
    planners = {name: row for name, row in METHODS.items() if row.kind == "plan"}
    row = planners[known("planner", setting.planner.replace("_", "-"), planners)]
    for name, number in [("starts", setting.starts), ("iterations", setting.iterations), ("steps", setting.steps)]:
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if not 0 <= setting.key < 2**32:
        raise ValueError(f"key must be a whole number from 0 to {2**32 - 1}, got {setting.key}")
    if not setting.mpc:
        for name, given in [("steps", setting.steps is not None), ("delay", setting.delay != 0)]:
            if given:
                raise ValueError(f"--{name} is for a controller: give --mpc too")
    if setting.delay < 0:
        raise ValueError(f"delay must be at least 0 steps, got {setting.delay}")
    mesh, length = mesh_of(setting.devices), setting.steps if setting.mpc else setting.horizon
    model = make(setting.task, horizon=length, **setting.parameters)
    plant = noisy(_plant(setting, model), std=setting.noise)
    if setting.delay:
        plant = delayed(plant, steps=setting.delay)
    if not setting.mpc:
        iterations = row.steps if setting.iterations is None else setting.iterations
        made = solver(row, model, rate=None, steps=iterations, continuation="default")
        return Prepared(model, plant, _divided(made, setting, mesh), model.horizon, iterations, mesh)
    # Of the window's horizon: a continuation grows to that, within the first step, and then stays.
    H = min(WINDOW, model.horizon) if setting.horizon is None else setting.horizon
    window = make(setting.task, horizon=H, **setting.parameters)
    made = solver(row, window, rate=None, steps=FIRST, continuation="default")
    iterations = 1 if setting.iterations is None else setting.iterations
    return Prepared(model, plant, _divided(made, setting, mesh), H, iterations, mesh)


def _divided(made: Any, setting: Setting, mesh: Mesh) -> Any:
    """The planner, whose samples the devices share if it draws any; of another they share a controller's starts."""
    if mesh.size == 1:
        return made
    if isinstance(made, Sampling):
        return dataclasses.replace(made, mesh=mesh)
    if not setting.mpc:
        drawing = ", ".join(name for name, row in METHODS.items() if row.kind == "plan" and row.order == 0)
        raise ValueError(
            f"{_name(setting)} plans from one start after another, on one device, got {mesh.size}: devices share the samples "
            f"of {drawing}, the starts of a controller (--mpc), or those of `diffmbrl compare {setting.task} --methods "
            f"{_name(setting)}`"
        )
    check(setting.starts, mesh.size, "starts")
    return made


def _plant(setting: Setting, model: Task) -> Task:
    """The same task with dynamics whose parameters are so many times the model's."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(TASKS[setting.task].make).parameters.items()
        if name != "horizon" and isinstance(parameter.default, (int, float))
    }
    values: dict[str, Any] = defaults | setting.parameters
    if setting.mismatch and not defaults:
        raise ValueError(f"task '{setting.task}' has no physical parameters to mismatch")
    for name, factor in setting.mismatch.items():
        known(f"parameter of task '{setting.task}'", name, defaults)
        if not (np.isfinite(factor) and factor > 0):
            raise ValueError(f"the mismatch of {name} must be a finite positive factor, got {factor:g}")
        values[name] *= factor
    other = make(setting.task, horizon=model.horizon, **values)
    return eqx.tree_at(lambda t: t.dynamics, model, other.dynamics)


def _starts(setting: Setting, model: Task) -> State:
    return model.starts(jax.random.fold_in(jax.random.key(setting.key), 0), setting.starts)


def _keys(setting: Setting) -> Any:
    """One for the planner's draws, one for the plant's noise of each start."""
    root = jax.random.key(setting.key)
    return jax.random.fold_in(root, 1), jax.random.split(jax.random.fold_in(root, 2), setting.starts)


def _plans(setting: Setting, prepared: Prepared, run: Session) -> None:
    """Each start planned on its own, and the plan with its feedback followed on the plant."""
    write, progress = run.write, run.progress
    model, plant, made, _, iterations, mesh = prepared
    keeps = keeps_limits(made)
    inside, outside = (task if keeps else squashed(task) for task in (model, plant))
    draws, noise = _keys(setting)
    for index, s0 in run.arms(enumerate(_each(_starts(setting, model), setting.starts))):
        progress.arm(f"start {index}", iterations)
        # Planners of gradients take no key: theirs would draw the model's noise, which has none.
        key = jax.random.fold_in(draws, index) if METHODS[_name(setting)].order == 0 else None
        if mesh.size > 1:
            s0, key = copied((s0, key), mesh)
        found, history = solve(made, first_plan(made, inside), inside, s0, key, iterations, looks=run)
        found, s0 = local((found, s0))
        inner = _follow(found, inside, s0, None)
        trajectory = _follow(found, outside, s0, noise[index])
        info = history.info
        shown = f"return {float(returns(inner, inside)):.4g}, {history.seconds:.2f} s, {history.stop}"
        progress.update(iterations, shown)
        norms = None if info.gradient_norm is None else info.gradient_norm
        write({"kind": "updates", "start": index, "J": info.J, "gradient_norm": norms})
        last = {"stop": history.stop, "seconds": history.seconds, "compile_seconds": history.compile_seconds}
        last |= {"iterations": history.updates, "gradient_norm": None if norms is None else norms[-1]}
        last |= {"nonfinite": int(np.sum(info.nonfinite)), "model_return": float(returns(inner, inside))}
        _write_result(write, index, model, outside, trajectory, last)
        gains = None if not isinstance(found, Affine) else found.K
        _write_trajectory(write, index, model, trajectory, keeps, gains)


def _control(setting: Setting, prepared: Prepared, run: Session) -> None:
    """All starts at once, the planner in the loop on the plant."""
    write, progress = run.write, run.progress
    model, plant, made, horizon, iterations, mesh = prepared
    starts, (draws, noise) = _starts(setting, model), _keys(setting)
    if setting.delay:
        queue = jnp.tile(resting_action(model), (setting.starts, setting.delay, 1))
        starts = Delayed(starts, queue)
    mpc = MPC.init(
        made,
        model,
        horizon=horizon,
        iterations=iterations,
        first=max(iterations, FIRST),
        seen=Predicted(model.dynamics) if setting.delay else None,
        key=draws if METHODS[_name(setting)].order == 0 else None,
    )
    lay = beside if isinstance(made, Sampling) else along
    given = (mpc, plant)
    if mesh.size > 1:
        given = copied(given, mesh)
        batch = (starts, noise)
        starts, noise = copied(batch, mesh) if lay is beside else share(batch, mesh, what="starts")
    progress.arm(f"mpc of {_name(setting)}", plant.horizon)
    progress.update(0, "compiling")
    begun = time.perf_counter()
    t, seconds, count = 0, 0.0, 1
    if (kept := run.kept) is None:
        episodes = lay(starts, _begin(*given, starts))
    else:
        episodes = lay(starts, run.restore(jax.eval_shape(_begin, *given, starts)))
        t, seconds = kept["t"], kept["seconds"]
    compiled = _proceed.lower(*given, starts, episodes, noise, jnp.int32(t), jnp.int32(count)).compile()
    compile_seconds = time.perf_counter() - begun
    while t < plant.horizon:
        started = time.perf_counter()
        count = min(count, plant.horizon - t)
        episodes = jax.block_until_ready(compiled(*given, starts, episodes, noise, jnp.int32(t), jnp.int32(count)))
        episodes, took = lay(starts, episodes), agreed(time.perf_counter() - started)
        t, seconds = t + count, seconds + took
        run.look(local(episodes), t=t, seconds=seconds)
        progress.update(t, f"{seconds:.2f} s")
        count = count * 2 if took < LOOK else count
    trajectories, infos = jax.vmap(finish)(local(episodes))
    for index in range(setting.starts):
        trajectory, info = (jax.tree.map(lambda x: x[index], tree) for tree in (trajectories, infos))  # noqa: B023
        norms = info.gradient_norm
        write({"kind": "updates", "start": index, "J": info.J, "gradient_norm": norms})
        last = {"stop": _ended(trajectory, info), "seconds": seconds}
        last |= {
            "compile_seconds": compile_seconds,
            "iterations": (plant.horizon - 1) * iterations + max(iterations, FIRST),
        }
        last |= {"gradient_norm": None if norms is None else float(np.median(np.asarray(norms)))}
        last |= {"nonfinite": int(np.sum(np.asarray(info.nonfinite))), "model_return": None}
        _write_result(write, index, model, plant, trajectory, last)
        _write_trajectory(write, index, model, trajectory, True, None)


def _ended(trajectory: Any, info: Any) -> str:
    """How an episode ended, and what was not finite on its way: on the plant, and in the model's rollouts."""
    said = [f"{len(trajectory.r)} steps, {float(np.mean(np.asarray(info.accepted))):.0%} of last updates accepted"]
    if (found := named(jax.tree.map(lambda x: x[None], trajectory))) is not None:
        said.insert(0, f"nonfinite: {found[0]}[{found[1]}] of the plant")
    if (met := np.flatnonzero(np.asarray(info.nonfinite))).size:
        said.append(f"nonfinite: rollouts of the model at {met.size} steps, the first of them {met[0]}, were rejected")
    return "; ".join(said)


@jax.jit
def _begin(mpc: MPC, plant: Task, starts: State) -> Episode:
    return jax.vmap(lambda s: start(mpc, plant, s))(starts)


@jax.jit
def _proceed(mpc: MPC, plant: Task, starts: State, episodes: Episode, keys: Any, first: Any, count: Any) -> Episode:
    """All starts, some steps on."""
    return jax.vmap(lambda s, e, k: proceed(mpc, plant, s, e, k, first=first, count=count))(starts, episodes, keys)


@jax.jit
def _follow(found: Any, task: Task, s0: State, key: Any) -> Any:
    return rollout(found, task, s0, key)


def _write_result(write: Callable[[dict], None], index: int, model: Task, plant: Task, trajectory: Any, last: dict):
    """One row of the table."""
    success = None if plant.success is None else bool(plant.success(trajectory.s_T))
    write({"kind": "result", "start": index, "return": float(returns(trajectory, plant)), "success": success} | last)


def _write_trajectory(
    write: Callable[[dict], None], index: int, model: Task, trajectory: Any, real: bool, gains: Any
) -> None:
    """States [T+1, n], the actions that the plant felt [T, m], a plan's gains da/ds [T, m, n]; the first start is drawn."""
    states, last = trajectory.s, trajectory.s_T
    late = isinstance(states, Delayed)
    a = np.asarray(states.queue[:, 0] if late else trajectory.a)
    states, last = (states.s, last.s) if late else (states, last)
    s = np.concatenate([np.asarray(_flat(states)), np.asarray(_flat(jax.tree.map(lambda x: x[None], last)))])
    if not real:
        low, high = np.asarray(model.a_low), np.asarray(model.a_high)
        slope = jax.vmap(jax.jacfwd(lambda z: squash(z, low, high)))(jnp.asarray(a))
        a = np.asarray(jax.vmap(lambda z: squash(z, low, high))(jnp.asarray(a)))
        gains = None if gains is None else np.einsum("tij,tjn->tin", slope, gains)
    write({"kind": "trajectory", "start": index, "s": s, "a": a, "gains": gains})
    seen = int(np.argmin(np.append(np.isfinite(s).all(1), False)))  # states before the first that is not finite
    if index == 0 and seen > 1:
        drawn = [[shape_record(shape) for shape in shapes] for shapes in frames(model, s[:seen])]
        write({"kind": "frames", "start": index, "frames": drawn})


def _flat(states: State) -> Any:
    leaves = jax.tree.leaves(states)
    return jnp.concatenate([x.reshape(x.shape[0], -1) for x in leaves], axis=1)


def _write_scene(setting: Setting, prepared: Prepared, write: Callable[[dict], None]) -> None:
    """What the figures need to know of the task."""
    row, model = TASKS[setting.task], prepared.model
    write(
        {
            "kind": "scene",
            "dt": model.dt,
            "a_low": model.a_low,
            "a_high": model.a_high,
            "state_names": state_names(model),
            "action_names": list(row.actions),
        }
    )


def _each(tree: Any, count: int) -> list[Any]:
    return [jax.tree.map(lambda x: x[i], tree) for i in range(count)]  # noqa: B023


def _name(setting: Setting) -> str:
    return setting.planner.replace("_", "-")
