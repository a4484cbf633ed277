"""Planning and control from a few starts: what `diffmbrl plan` runs."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffmbrl.core import State, Task, keeps_limits
from diffmbrl.devices import broadcast, copied, replicate_like, shard, shard_like, to_local
from diffmbrl.jobs.plan.records import ended, write_result, write_scene, write_trajectory
from diffmbrl.jobs.plan.setting import FIRST, PlanConfig, ResolvedPlan, keys_of, planner_name, prepare, start_states
from diffmbrl.methods import METHODS
from diffmbrl.planners import MPC, Predicted, Sampling
from diffmbrl.planners.episode import ControlledEpisode, finish, proceed, start
from diffmbrl.policies import Affine, first_plan, resting_action
from diffmbrl.report import rebuild
from diffmbrl.rollout import returns, rollout
from diffmbrl.runs import EVERY, Session, check_out, check_sinks, config_from_json, create, underway
from diffmbrl.solve.loop import solve
from diffmbrl.tasks import squashed
from diffmbrl.tasks.transforms.plant import Delayed

LOOK = 0.5  # seconds between two looks at an MPC's episodes, at least


def plan(
    setting: PlanConfig, *, out: Path | None = None, stream: Any = None, every: float = EVERY, track: Sequence[str] = ()
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
    setting = config_from_json(PlanConfig, config, besides={"differs"})
    setting = setting if setting.mpc else setting._replace(steps=None)  # written for the reader
    return _run(setting, prepare(setting), folder, stream=stream, every=every, track=track, resumed=True)


def _run(setting: PlanConfig, prepared: ResolvedPlan, folder: Path, **options: Any) -> Path:
    with underway(folder, 1 if setting.mpc else setting.starts, report=rebuild, **options) as run:
        if run.begins:
            write_scene(setting, prepared, run.write)
        (_control if setting.mpc else _plans)(setting, prepared, run)
    return folder


def _plans(setting: PlanConfig, prepared: ResolvedPlan, run: Session) -> None:
    """Each start planned on its own, and the plan with its feedback followed on the plant."""
    write, progress = run.write, run.progress
    model, plant, made, _, iterations, mesh = prepared
    keeps = keeps_limits(made)
    inside, outside = (task if keeps else squashed(task) for task in (model, plant))
    draws, noise = keys_of(setting)
    for index, s0 in run.arms(enumerate(_each(start_states(setting, model), setting.starts))):
        progress.arm(f"start {index}", iterations)
        # Planners of gradients take no key: theirs would draw the model's noise, which has none.
        key = jax.random.fold_in(draws, index) if METHODS[planner_name(setting)].order == 0 else None
        if mesh.size > 1:
            s0, key = copied((s0, key), mesh)
        found, history = solve(made, first_plan(made, inside), inside, s0, key, iterations, checkpointer=run)
        found, s0 = to_local((found, s0))
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
        write_result(write, index, model, outside, trajectory, last)
        gains = None if not isinstance(found, Affine) else found.K
        write_trajectory(write, index, model, trajectory, keeps, gains)


def _control(setting: PlanConfig, prepared: ResolvedPlan, run: Session) -> None:
    """All starts at once, the planner in the loop on the plant."""
    write, progress = run.write, run.progress
    model, plant, made, horizon, iterations, mesh = prepared
    starts, (draws, noise) = start_states(setting, model), keys_of(setting)
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
        key=draws if METHODS[planner_name(setting)].order == 0 else None,
    )
    lay = replicate_like if isinstance(made, Sampling) else shard_like
    given = (mpc, plant)
    if mesh.size > 1:
        given = copied(given, mesh)
        batch = (starts, noise)
        starts, noise = copied(batch, mesh) if lay is replicate_like else shard(batch, mesh, what="starts")
    progress.arm(f"mpc of {planner_name(setting)}", plant.horizon)
    progress.update(0, "compiling")
    begun = time.perf_counter()
    t, seconds, count = 0, 0.0, 1
    if (kept := run.restored) is None:
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
        episodes, took = lay(starts, episodes), broadcast(time.perf_counter() - started)
        t, seconds = t + count, seconds + took
        run.save(episodes, t=t, seconds=seconds)
        progress.update(t, f"{seconds:.2f} s")
        count = count * 2 if took < LOOK else count
    trajectories, infos = jax.vmap(finish)(to_local(episodes))
    for index in range(setting.starts):
        trajectory, info = (jax.tree.map(lambda x: x[index], tree) for tree in (trajectories, infos))  # noqa: B023
        norms = info.gradient_norm
        write({"kind": "updates", "start": index, "J": info.J, "gradient_norm": norms})
        last = {"stop": ended(trajectory, info), "seconds": seconds}
        last |= {
            "compile_seconds": compile_seconds,
            "iterations": (plant.horizon - 1) * iterations + max(iterations, FIRST),
        }
        last |= {"gradient_norm": None if norms is None else float(np.median(np.asarray(norms)))}
        last |= {"nonfinite": int(np.sum(np.asarray(info.nonfinite))), "model_return": None}
        write_result(write, index, model, plant, trajectory, last)
        write_trajectory(write, index, model, trajectory, True, None)


@jax.jit
def _begin(mpc: MPC, plant: Task, starts: State) -> ControlledEpisode:
    return jax.vmap(lambda s: start(mpc, plant, s))(starts)


@jax.jit
def _proceed(
    mpc: MPC, plant: Task, starts: State, episodes: ControlledEpisode, keys: Any, first: Any, count: Any
) -> ControlledEpisode:
    """All starts, some steps on."""
    return jax.vmap(lambda s, e, k: proceed(mpc, plant, s, e, k, first=first, count=count))(starts, episodes, keys)


@jax.jit
def _follow(found: Any, task: Task, s0: State, key: Any) -> Any:
    return rollout(found, task, s0, key)


def _each(tree: Any, count: int) -> list[Any]:
    return [jax.tree.map(lambda x: x[i], tree) for i in range(count)]  # noqa: B023
