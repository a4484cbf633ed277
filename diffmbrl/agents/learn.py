"""The loop of reinforcement learning, with a model or without: collect, update, collect again.

    first: `warmup` steps of the agent's first policy, usually random actions
    then:  the agent updates itself from the buffer (fits a model, plans, improves a policy), and acts for `every` steps

On a `System` one iteration is one compiled call for all seeds; Python only stops, records and evaluates. On a system that is
not written in JAX (`host.py`) the same functions run uncompiled, except for the agent's own.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from diffmbrl.agents.collect import Acting, Axes, Collected, Real, System
from diffmbrl.agents.nonfinite import became_nonfinite, steps_named, update_named
from diffmbrl.agents.protocol import Agent
from diffmbrl.core import Task
from diffmbrl.devices import broadcast, shard_like, to_local
from diffmbrl.models.buffer import Buffer, flat
from diffmbrl.solve.checkpointer import Checkpointer, NoCheckpoints

NONFINITE = "nonfinite leaves"  # among the metrics of a compiled update, removed before they are recorded


class Replica(NamedTuple):
    """One seed between two iterations.

    Args:
        carry: The agent's carry.
        buffer: All real steps.
        places: Where the system's environments are.
        fresh: The latest steps.
    """

    carry: PyTree
    buffer: Buffer
    places: PyTree
    fresh: Collected


class Learned(NamedTuple):
    """The result of `learn`; every leaf of carry and buffer has a leading axis of seeds.

    Args:
        carry: The agent's carry.
        buffer: All real steps.
        records: The records of the iterations that this process made.
        real_steps: The number of real steps of each seed.
    """

    carry: PyTree
    buffer: Buffer
    records: list[dict[str, Any]]
    real_steps: int


def learn(
    agent: Agent,
    system: Real | Task,
    keys: Key[Array, "..."],
    *,
    real_steps: int,
    seconds: float = float("inf"),
    evaluations: int = 0,
    evaluate_every: int = 1,
    capacity: int | None = None,
    on_record: Callable[[dict[str, Any], "Learned"], None] | None = None,
    checkpointer: Checkpointer | None = None,
    in_axes: Axes = (None, None),
) -> Learned:
    r"""Let an agent learn on a real system, from several seeds in parallel.

    Every iteration makes a record, whose arrays have a leading axis of seeds: `real_steps`; `seconds` and the process's
    `cpu_seconds` of updates and collection so far; `returns` [S, N k] of the episodes that ended, NaN elsewhere, and `ended`;
    the number of `rejected` steps, non-finite or of an episode that was over before it began; `refused` updates, which would
    have made a finite leaf of the carry non-finite; `nonfinite_in`, the names of such values, if any; and the agent's metrics.

    Args:
        agent: The agent.
        system: A task, a `System` or a `HostSystem`.
        keys: A random key for each seed, shape [S]; sharded over devices (`devices.shard`), they shard all the work.
        real_steps: The number of real steps of each seed at most.
        seconds: Seconds of iterations after which to stop, without compiling and evaluating.
        evaluations: The number of episodes of `agent.best` in each evaluation, each from another start; 0 for none.
        evaluate_every: Iterations between two evaluations; the last iteration is always evaluated, as the record's
            `evaluation` [S, `evaluations`].
        capacity: The number of steps that the buffer holds; by default all.
        on_record: Called with each record and the state of the run.
        checkpointer: Saves the state after each record, and holds the one to resume from.
        in_axes: The axes of agent and system, as of `vmap`: 0 if every leaf has a leading axis of S, so that a sweep over
            hyperparameters or physical parameters is one program.

    Returns:
        The carry, the buffer and the records.

    Raises:
        ValueError: If a size does not fit the others, or the warm-up leaves nothing in the buffer.
        TypeError: If the agent's policy is a plan.

    >>> import jax
    >>> from diffmbrl import tasks
    >>> from diffmbrl.agents import RandomAgent
    >>> keys = jax.random.split(jax.random.key(0), 2)
    >>> learned = learn(RandomAgent(every=50), tasks.pendulum(horizon=50), keys, real_steps=200)
    >>> [int(x) for x in learned.buffer.size], len(learned.records)
    ([200, 200], 3)
    """
    system = System(system) if isinstance(system, Task) else system
    check_sizes(agent, keys, real_steps, evaluations, evaluate_every)
    capacity = max(real_steps, agent.warmup + agent.every) if capacity is None else capacity
    checkpointer = NoCheckpoints() if checkpointer is None else checkpointer
    records: list[dict[str, Any]] = []
    run, evaluate = None, None

    def over() -> bool:
        return done + agent.every > real_steps or spent >= seconds

    def recorded(record: dict[str, Any]) -> None:
        nonlocal evaluate
        if evaluations and (over() or iteration % evaluate_every == 0):
            given = (agent, system, replicas.carry, keys)
            evaluate = evaluate or system.ready(_evaluate, *given, count=evaluations, in_axes=in_axes)
            record["evaluation"] = np.asarray(to_local(evaluate(*given)))
        records.append(record)
        if on_record is not None:
            on_record(record, Learned(replicas.carry, replicas.buffer, records, done))
        checkpointer.save(replicas, done=done, iteration=iteration, spent=spent, worked=worked)

    if (restored := checkpointer.restored) is None:
        warm = system.ready(_warm, agent, system, keys, capacity=capacity, in_axes=in_axes)
        replicas, fresh = warm(agent, system, keys)
        replicas = shard_like(keys, replicas)
        left = np.asarray(to_local(replicas.buffer.size))
        if left.min() < 1:
            why = "; ".join(steps_named(fresh)) or "every episode was over before its first step"
            raise ValueError(
                f"of {agent.warmup} first steps of '{system.view.name}' none is usable (seeds "
                f"{np.flatnonzero(left < 1)}): {why}"
            )
        done, iteration, spent, worked = agent.warmup, 0, 0.0, 0.0
        recorded(_record(fresh, done, spent, worked))
    else:
        shapes = jax.eval_shape(lambda: _warm(agent, system, keys, capacity, in_axes)[0])
        replicas = shard_like(keys, checkpointer.restore(shapes))
        done, iteration, spent, worked = (restored[name] for name in ("done", "iteration", "spent", "worked"))
    while not over():
        number = jnp.int32(iteration)
        # Compile before the clock starts.
        run = run or system.ready(_iterate, agent, system, replicas, keys, number, in_axes=in_axes)
        begun, before = time.perf_counter(), time.process_time()
        replicas, metrics = jax.block_until_ready(run(agent, system, replicas, keys, number))
        replicas = shard_like(keys, replicas)
        spent, worked = broadcast(spent + time.perf_counter() - begun), worked + time.process_time() - before
        done, iteration = done + agent.every, iteration + 1
        metrics = {name: np.asarray(x) for name, x in to_local(metrics).items()}
        named = update_named(replicas.carry, metrics.pop(NONFINITE), iteration)
        recorded(_record(replicas.fresh, done, spent, worked, named) | metrics)
    return Learned(replicas.carry, replicas.buffer, records, done)


@partial(jax.jit, static_argnames=("capacity", "in_axes"))
def _warm(
    agent: Agent, system: Real, keys: Key[Array, " S"], capacity: int, in_axes: Axes
) -> tuple[Replica, Collected]:
    """Each seed's carry and first steps. New episodes begin after them, since a policy's memory begins with an episode."""
    count, view = agent.environments, system.view
    carries, key_begin, key_collect, key_again = _begun(agent, view, keys, in_axes)
    who = Acting(agent, view, "first", in_axes)
    places = system.begin(who, carries, key_begin, count, jnp.zeros(keys.shape, jnp.int32))
    places, fresh = system.collect(who, carries, places, key_collect, steps=agent.warmup // count)
    empty = jax.vmap(lambda view, _: Buffer.empty(view, capacity), in_axes=(in_axes[1], 0))(view, keys)
    buffer = _added(empty, fresh)
    after = jnp.max(jnp.asarray(places.episode), axis=1) + 1
    places = system.begin(Acting(agent, view, "policy", in_axes), carries, key_again, count, after)
    latest = jax.tree.map(lambda x: x[:, :, -(agent.every // count) :], fresh)
    return Replica(carries, buffer, places, latest), fresh


@partial(jax.jit, static_argnames="in_axes")
def _iterate(
    agent: Agent, system: Real, replicas: Replica, keys: Key[Array, " S"], number: Array, in_axes: Axes
) -> tuple[Replica, dict]:
    """Update the agent, and collect `every` steps with it."""
    view, before = system.view, (replicas.carry, replicas.buffer, replicas.fresh)
    carries, metrics, key_collect = _updated(agent, view, *before, keys, number, in_axes)
    who, steps = Acting(agent, view, "policy", in_axes), agent.every // agent.environments
    places, fresh = system.collect(who, carries, replicas.places, key_collect, steps=steps)
    return Replica(carries, _added(replicas.buffer, fresh), places, fresh), metrics


@partial(jax.jit, static_argnames=("count", "in_axes"))
def _evaluate(
    agent: Agent, system: Real, carries: PyTree, keys: Key[Array, " S"], count: int, in_axes: Axes
) -> Float[Array, "S count"]:
    """The return of one episode from each of `count` starts, with the same starts and noise at each evaluation."""
    who = Acting(agent, system.view, "best", in_axes)
    key_begin, key_collect = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, 2)))(keys).T
    places = system.begin(who, carries, key_begin, count, jnp.zeros(keys.shape, jnp.int32))
    _, found = system.collect(who, carries, places, key_collect, steps=system.horizon)
    return jnp.take_along_axis(found.J, jnp.argmax(found.steps.last, axis=2)[:, :, None], axis=2)[:, :, 0]


@partial(jax.jit, static_argnames="in_axes")
def _begun(agent: Agent, view: Task, keys: Key[Array, " S"], in_axes: Axes) -> tuple[Any, ...]:
    """Each seed's carry, and its keys for the warm-up."""
    split = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, 0), 4))(keys).T
    begun = jax.vmap(lambda agent, view, key: agent.init(view, key), in_axes=(*in_axes, 0))
    return begun(agent, view, split[0]), *split[1:]


@partial(jax.jit, static_argnames="in_axes")
def _updated(
    agent: Agent,
    view: Task,
    carries: PyTree,
    buffers: Buffer,
    fresh: Collected,
    keys: Key[Array, " S"],
    number: Array,
    in_axes: Axes,
) -> tuple[PyTree, dict, Key[Array, " S"]]:
    """The carries after an update, or before it if it is refused; the metrics; and the keys of the steps that follow."""

    def one(agent, view, carry, buffer, fresh, key):
        key_update, key_collect = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, 1), number))
        learned, metrics = agent.update(carry, view, buffer, fresh, key_update)
        leaves = became_nonfinite(carry, learned)
        refused = jnp.any(leaves)
        after = jax.tree.map(lambda x, y: jnp.where(refused, x, y), carry, learned)
        return after, metrics | {"refused": refused.astype(jnp.int32), NONFINITE: leaves}, key_collect

    return jax.vmap(one, in_axes=(*in_axes, 0, 0, 0, 0))(agent, view, carries, buffers, fresh.steps, keys)


@jax.jit
def _added(buffers: Buffer, fresh: Collected) -> Buffer:
    """Each seed's buffer with its latest steps added, one environment after another."""

    def one(buffer, fresh):
        return buffer.add(*flat(fresh[:4]))

    return jax.vmap(one)(buffers, fresh)


def _record(
    fresh: Collected, real_steps: int, seconds: float, cpu_seconds: float, named: Sequence[str] = ()
) -> dict[str, Any]:
    """The record of an iteration; `named` are the names of the update's non-finite values."""
    ended, J, keep, doubts = to_local((fresh.steps.last, fresh.J, fresh.keep, fresh.met))
    ended, J = (np.asarray(x).reshape(x.shape[0], -1) for x in (ended, J))
    if not np.all(keep) or np.any(doubts):
        named = [*named, *steps_named(fresh)]
    return {
        "real_steps": real_steps,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "ended": ended,
        "returns": np.where(ended, J, np.nan),
        "rejected": np.sum(~np.asarray(keep), axis=(1, 2)),
    } | ({"nonfinite_in": list(named)} if named else {})


def check_sizes(agent: Agent, keys: Key[Array, "..."], real_steps: int, evaluations: int, evaluate_every: int) -> None:
    """Check the sizes that `learn` is given, and raise a `ValueError` that names a wrong one."""
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) or keys.ndim != 1 or keys.shape[0] < 1:
        raise ValueError(
            f"keys must be an array [S] of random keys, jax.random.split(key, S); got {keys.dtype} {list(keys.shape)}"
        )
    sizes = {"warmup": agent.warmup, "every": agent.every, "environments": agent.environments, "real_steps": real_steps}
    for name, size in {**sizes, "evaluate_every": evaluate_every}.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {size!r}")
    for name in ("warmup", "every"):
        if sizes[name] % agent.environments:
            raise ValueError(f"{name} ({sizes[name]} steps) must be a multiple of environments ({agent.environments})")
    if agent.warmup < agent.every:
        raise ValueError(f"warmup ({agent.warmup} steps) must be at least every ({agent.every} steps)")
    if real_steps < agent.warmup:
        raise ValueError(f"real_steps ({real_steps}) must be at least the warm-up's {agent.warmup} steps")
    if not isinstance(evaluations, int) or evaluations < 0:
        raise ValueError(f"evaluations must be a whole number of starts, 0 for none; got {evaluations!r}")
