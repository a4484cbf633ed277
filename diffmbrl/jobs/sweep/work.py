"""A group of points as one program: lane p S + k is seed k of point p, with leaves of its own from hyperparameters to masses.

Each point has a folder, `points/<name>/`, like a run's: config.json, provenance.json, metrics.jsonl, status.json. Its records
are of the kind "eval": `update` (updates, or real steps), `seconds` of the group's clock, and for each seed the mean returns
`train` and `test`, `success` where the task says what that is, and `nonfinite`, the values met so far.
"""

import contextlib
import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffmbrl.agents.learn import learn
from diffmbrl.jobs.batch import NOISE, draw_starts
from diffmbrl.jobs.sweep.groups import AgentPoint, Group, MethodPoint
from diffmbrl.jobs.sweep.points import SweepFile, SweepPoint
from diffmbrl.policies import Neural
from diffmbrl.rollout import episode_returns, returns, rollout, rollouts
from diffmbrl.runs import Writer, running
from diffmbrl.runs.folder import set_status, write_json
from diffmbrl.solve.loop import CHUNK, iterate

HELD_OUT = 256
LOOKS = 20  # evaluations along a run


def run(sweep: SweepFile, group: Group, folder: Path, facts: dict[str, Any]) -> None:
    """Run the points of a group side by side, each into its folder under `folder`; `facts` are of their provenance."""
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(_recorded(sweep, point, folder, facts)) for point in group.points]

        def write(i: int, record: dict[str, Any]) -> None:
            writers[i].write({"kind": "eval", "lanes": len(writers) * group.seeds} | record)

        (_run_policies if sweep.job == "compare" else _run_agents)(group, write)


@contextlib.contextmanager
def _recorded(sweep: SweepFile, point: SweepPoint, folder: Path, facts: dict[str, Any]) -> Iterator[Writer]:
    """The point's folder, made anew: what a run that did not finish has left there is no part of this one."""
    path = folder / point.name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    write_json(path / "config.json", {"job": sweep.job, "x64": sweep.x64, "setting": point.setting})
    write_json(path / "provenance.json", facts)
    set_status(path, "running")
    with running(path), Writer(path / "metrics.jsonl") as writer:
        yield writer


# Agents.


def _run_agents(group: Group, write: Any) -> None:
    first: AgentPoint = group.members[0]
    setting, seeds = first.setting, group.seeds
    agent, system = (_lanes([getattr(member, what) for member in group.members], seeds) for what in ("agent", "system"))
    keys = jnp.concatenate([jax.random.split(jax.random.key(m.setting.key), seeds) for m in group.members])
    shape, earned = (len(group.members), seeds), np.full(len(keys), np.nan)

    def on_record(record: dict[str, Any], _: Any) -> None:
        ended = record["ended"].sum(axis=1)
        mean = np.nansum(record["returns"], axis=1) / np.maximum(ended, 1)
        # A return that is not finite is NaN: of an episode that ended, it is no number to leave out.
        broken = (record["ended"] & ~np.isfinite(record["returns"])).any(axis=1)
        earned[:] = np.where(ended > 0, np.where(broken, -np.inf, mean), earned)
        if "evaluation" not in record:
            return
        test = np.mean(record["evaluation"], axis=1).reshape(shape)
        for i in range(shape[0]):
            lane = {"train": earned.reshape(shape)[i], "test": test[i]}
            write(i, {"update": record["real_steps"], "seconds": record["seconds"], **lane})

    looks = max(1, -(-(first.real_steps - first.agent.warmup) // (first.agent.every * LOOKS)))
    learn(
        agent,
        system,
        keys,
        real_steps=first.real_steps,
        seconds=setting.budget,
        evaluations=first.evaluations,
        evaluate_every=looks,
        on_record=on_record,
        in_axes=(0, 0),
    )


# Methods.


class _Lane(NamedTuple):
    """One seed of one point; all of them with a leading axis. Of a planner, policy, carry and key have one more, of starts."""

    solver: Any
    task: Any
    policy: Any
    carry: Any
    s0: Any
    key: Any


def _run_policies(group: Group, write: Any) -> None:
    first: MethodPoint = group.members[0]
    lanes, tasks, test = _begun(group)
    shape, plans = (len(group.members), group.seeds), first.method.kind == "plan"
    advance = partial(_advance, one_by_one=first.method.sequential, plans=plans)
    jax.block_until_ready(advance(lanes, jnp.int32(0), jnp.int32(0)))
    done, spent, broken = 0, 0.0, np.zeros(shape, np.int64)
    every = max(1, min(CHUNK, -(-first.steps // LOOKS)))
    while True:
        found = _evaluate_plans(lanes, tasks) if plans else _evaluate(lanes, tasks, test)
        found = {name: np.asarray(x).reshape(shape) for name, x in found.items()}
        for i in range(shape[0]):
            said = {name: x[i] for name, x in found.items()}
            write(i, {"update": done, "seconds": spent, "nonfinite": broken[i], **said})
        if done >= first.steps or spent >= first.setting.budget:
            return
        begun, count = time.perf_counter(), min(every, first.steps - done)
        policies, carries, nonfinite = jax.block_until_ready(advance(lanes, jnp.int32(done), jnp.int32(count)))
        spent, done = spent + time.perf_counter() - begun, done + count
        lanes = lanes._replace(policy=policies, carry=carries)
        broken = broken + np.asarray(nonfinite).reshape(shape)


def _begun(group: Group) -> tuple[_Lane, Any, Any]:
    """The lanes before the first update, their tasks, and held-out starts; as `compare` has them."""
    first: MethodPoint = group.members[0]
    hidden, starts, seeds = first.setting.hidden, first.setting.starts, group.seeds
    policies, carries, drawn, keys = [], [], [], []
    for member in group.members:
        train, test, own = draw_starts(member.task, seeds, starts, HELD_OUT, member.setting.key)
        if first.method.kind == "plan":
            plan = member.solver.first_plan(member.plant)
            policy = jax.tree.map(lambda x: jnp.broadcast_to(x, (seeds, starts, *x.shape)), plan)
            start = jax.vmap(jax.vmap(lambda p, m=member: m.solver.init(p, m.plant)))
            key = jax.vmap(lambda k: jax.vmap(partial(jax.random.fold_in, k))(jnp.arange(starts)))(own)
        else:
            policy = jax.vmap(lambda k, m=member: Neural.init(m.task, hidden=hidden, key=k))(own)
            start = jax.vmap(lambda p, m=member: m.solver.init(p, m.task))
            key = jax.vmap(lambda k: jax.random.fold_in(k, NOISE))(own) if first.method.draws else None
        policies.append(policy)
        carries.append(start(policy))
        drawn.append((train, jax.tree.map(lambda x: jnp.broadcast_to(x, (seeds, *x.shape)), test)))
        keys.append(key)
    solver, plant, task = (
        _lanes([getattr(m, what) for m in group.members], seeds) for what in ("solver", "plant", "task")
    )
    train, test = _joined(drawn)
    return _Lane(solver, plant, _joined(policies), _joined(carries), train, _joined(keys)), task, test


def _lanes(trees: list[Any], seeds: int) -> Any:
    """Each point's tree for each of its seeds, along one axis."""
    return jax.tree.map(lambda *x: jnp.repeat(jnp.stack(x), seeds, axis=0), *trees)


def _joined(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *x: jnp.concatenate(x), *trees)


@partial(jax.jit, static_argnames=("one_by_one", "plans"))
def _advance(lanes: _Lane, done: jax.Array, updates: jax.Array, *, one_by_one: bool, plans: bool) -> Any:
    """Policies, carries and non-finite values after so many updates more."""

    def update(lane: _Lane) -> Any:
        zero = jnp.zeros((), lane.task.weights.dtype)
        policy, carry, info, _ = iterate(
            lane.solver, lane.policy, lane.carry, task=lane.task, s0=lane.s0, key=lane.key, first=done, count=updates,
            tolerance=zero,
        )  # fmt: skip
        return policy, carry, jnp.sum(info.nonfinite)

    def each_start(lane: _Lane) -> Any:
        along = _Lane(None, None, 0, 0, 0, 0)  # type: ignore[arg-type]
        policy, carry, nonfinite = jax.vmap(update, in_axes=(along,))(lane)
        return policy, carry, jnp.sum(nonfinite)

    one = each_start if plans else update
    # A line search branches, and `vmap` would run both branches for all.
    return jax.lax.map(one, lanes) if one_by_one else jax.vmap(one)(lanes)


@jax.jit
def _evaluate(lanes: _Lane, tasks: Any, test: Any) -> dict[str, jax.Array]:
    def one(policy, task, train, test):
        trajectories = rollouts(policy, task, test)
        held_out = jax.vmap(lambda tau: returns(tau, task))(trajectories)
        found = {"train": jnp.mean(episode_returns(policy, task, train)), "test": jnp.mean(held_out)}
        return found | _success(task, trajectories.s_T)

    return jax.vmap(one)(lanes.policy, tasks, lanes.s0, test)


@jax.jit
def _evaluate_plans(lanes: _Lane, tasks: Any) -> dict[str, jax.Array]:
    """Of the starts that were planned from: a planner plans held-out ones no other way."""

    def one(plans, plant, s0):
        trajectories = jax.vmap(lambda plan, s: rollout(plan, plant, s))(plans, s0)
        J = jax.vmap(lambda tau: returns(tau, plant))(trajectories)
        return {"train": jnp.mean(J)} | _success(plant, trajectories.s_T)

    return jax.vmap(one)(lanes.policy, lanes.task, lanes.s0)


def _success(task: Any, s_T: Any) -> dict[str, jax.Array]:
    return {} if task.success is None else {"success": jnp.mean(jax.vmap(task.success)(s_T))}
