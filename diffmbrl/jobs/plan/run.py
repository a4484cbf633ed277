"""Plan from start states, or control with the planner in the loop (`diffmbrl plan`)."""

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffmbrl.core import State, Task
from diffmbrl.devices import broadcast, copied, replicate_like, shard, shard_like, to_local
from diffmbrl.jobs.configs import PlanConfig, RunOptions
from diffmbrl.jobs.job import JobFunctions, start_job
from diffmbrl.jobs.plan.records import ended, write_result, write_scene, write_trajectory
from diffmbrl.jobs.plan.setting import (
    FIRST,
    ResolvedPlan,
    keys_of,
    planner_name,
    read_plan_config,
    resolve,
    start_states,
)
from diffmbrl.jobs.table import JOBS
from diffmbrl.methods import METHODS
from diffmbrl.planners import MPC, Predicted, Sampling
from diffmbrl.planners.episode import ControlledEpisode, finish, proceed, start
from diffmbrl.policies import Affine, resting_action
from diffmbrl.rollout import returns, rollout
from diffmbrl.runs import Session
from diffmbrl.solve.loop import solve
from diffmbrl.tasks import squashed
from diffmbrl.tasks.transforms.plant import Delayed

CALL = 0.5  # seconds that a call of the compiled episode takes, at least


def make_plan(config: PlanConfig, options: RunOptions | None = None) -> Path:
    """Plan from each start state, or control with the planner in the loop, and write a run folder with figures and report.

    The result is followed on the plant: the model with other parameters, noise or delayed actions if the config says so.

    Args:
        config: The options of the plan.
        options: The folder, the checkpoints and the trackers.

    Returns:
        The run folder.

    Raises:
        ValueError: If a value of the config or the folder is wrong, before anything is written.
    """
    return start_job(JOBS["plan"], config, options)


def _run(resolved: ResolvedPlan, run: Session) -> None:
    if run.begins:
        write_scene(resolved, run.write)
    (_control if resolved.config.mpc else _plans)(resolved, run)


def _plans(resolved: ResolvedPlan, run: Session) -> None:
    """Plan from each start by itself, and follow the plan with its feedback on the plant."""
    write, progress = run.write, run.progress
    config, model, plant, made, _, iterations, mesh = resolved
    keeps = made.keeps_limits
    inside, outside = (task if keeps else squashed(task) for task in (model, plant))
    draws, noise = keys_of(config)
    for index, s0 in run.arms(enumerate(_each(start_states(config, model), config.starts))):
        progress.arm(f"start {index}", iterations)
        # A gradient-based planner takes no key: it would sample the noise of the model, which has none.
        key = jax.random.fold_in(draws, index) if METHODS[planner_name(config)].order == 0 else None
        if mesh.size > 1:
            s0, key = copied((s0, key), mesh)
        found, history = solve(made, made.first_plan(inside), inside, s0, key, iterations, checkpointer=run)
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


def _control(resolved: ResolvedPlan, run: Session) -> None:
    """Control from all starts at once, with the planner in the loop on the plant."""
    write, progress = run.write, run.progress
    config, model, plant, made, horizon, iterations, mesh = resolved
    starts, (draws, noise) = start_states(config, model), keys_of(config)
    if config.delay:
        queue = jnp.tile(resting_action(model), (config.starts, config.delay, 1))
        starts = Delayed(starts, queue)
    mpc = MPC.init(
        made,
        model,
        horizon=horizon,
        iterations=iterations,
        first=max(iterations, FIRST),
        seen=Predicted(model.dynamics) if config.delay else None,
        key=draws if METHODS[planner_name(config)].order == 0 else None,
    )
    lay = replicate_like if isinstance(made, Sampling) else shard_like
    given = (mpc, plant)
    if mesh.size > 1:
        given = copied(given, mesh)
        batch = (starts, noise)
        starts, noise = copied(batch, mesh) if lay is replicate_like else shard(batch, mesh, what="starts")
    progress.arm(f"mpc of {planner_name(config)}", plant.horizon)
    progress.update(0, "compiling")
    begun = time.perf_counter()
    t, seconds, count = 0, 0.0, 1
    if (restored := run.restored) is None:
        episodes = lay(starts, _begin(*given, starts))
    else:
        episodes = lay(starts, run.restore(jax.eval_shape(_begin, *given, starts)))
        t, seconds = restored["t"], restored["seconds"]
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
        count = count * 2 if took < CALL else count
    trajectories, infos = jax.vmap(finish)(to_local(episodes))
    for index in range(config.starts):
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
    """Advance the episodes of all starts by some steps."""
    return jax.vmap(lambda s, e, k: proceed(mpc, plant, s, e, k, first=first, count=count))(starts, episodes, keys)


@jax.jit
def _follow(found: Any, task: Task, s0: State, key: Any) -> Any:
    return rollout(found, task, s0, key)


def _each(tree: Any, count: int) -> list[Any]:
    return [jax.tree.map(lambda x: x[i], tree) for i in range(count)]  # noqa: B023


FUNCTIONS = JobFunctions(
    resolve,
    lambda resolved: 1 if resolved.config.mpc else resolved.config.starts,
    _run,
    read_plan_config,
)
