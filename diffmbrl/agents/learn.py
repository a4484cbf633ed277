"""The loop of model-based (and model-free) reinforcement learning: collect, update, collect again.

    first: `warmup` steps of the agent's first policy, mostly random actions
    then:  the agent updates itself from the buffer (fits a model, plans, improves a policy), and acts for `every` steps

On a `System` one iteration is one compiled call for all seeds; only stopping, recording and evaluating are left to Python. On
a system that is no JAX (`host.py`) the same lines run as they stand, and what is the agent's in them is compiled.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PRNGKeyArray

from diffmbrl.agents.collect import Acting, Axes, Collected, Real, System
from diffmbrl.agents.nonfinite import spoilt, steps_named, update_named
from diffmbrl.core import Dynamics, Task
from diffmbrl.devices import broadcast, shard_like, to_local
from diffmbrl.models.buffer import Buffer, Transition, flat
from diffmbrl.solve.checkpointer import Checkpointer, NoCheckpoints

SPOILT = "spoilt leaves"  # beside what an agent says


@runtime_checkable
class Agent(Protocol):
    """A module whose leaves are hyperparameters; what it learns is in the carry, a pytree of arrays.

    `task` has dynamics that raise when called: reward, end, features, limits and starts are given, the dynamics are not.
    """

    @property
    def warmup(self) -> int:
        """Real steps before the first update, at least `every`."""
        ...

    @property
    def every(self) -> int:
        """Real steps between two updates."""
        ...

    @property
    def environments(self) -> int:
        """Real systems side by side; both numbers of steps are shared among them."""
        ...

    def init(self, task: Task, key: PRNGKeyArray) -> Any: ...

    def first(self, carry: Any, task: Task) -> Any:
        """What acts during the warm-up: `RandomActions(task)`, or the policy itself where only its own steps are of use."""
        ...

    def policy(self, carry: Any, task: Task) -> Any:
        """What collects data: a policy, or one with a memory, whose noise is drawn from the key of the step."""
        ...

    def best(self, carry: Any, task: Task) -> Any:
        """What is evaluated: the same without exploration."""
        ...

    def model(self, carry: Any, task: Task) -> Dynamics | None:
        """The learned dynamics, which reports compare with the true ones; None for an agent that learns none."""
        ...

    def update(
        self, carry: Any, task: Task, buffer: Buffer, fresh: Transition, key: PRNGKeyArray
    ) -> tuple[Any, dict[str, Array]]:
        """Learn from the buffer, or from the latest `every` steps [N, every / N]; numbers worth a record beside the carry."""
        ...


class Lane(NamedTuple):
    """One seed between two iterations."""

    carry: Any
    buffer: Buffer
    places: Any  # the system's
    fresh: Collected


class Learned(NamedTuple):
    """What `learn` returns; every leaf has a leading axis of seeds."""

    carry: Any
    buffer: Buffer
    records: list[dict[str, Any]]  # of this process, if the loop goes on from another's
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
    r"""Let an agent learn on a real system for at most so many real steps, or until `seconds` of iterations are spent.

    The system is a task, or what shows a task to the agent: a `System`, a `HostSystem`. `keys` [S] are the seeds, side by side;
    shared out among devices (`devices.share`), so is all that they do. `in_axes` is of `agent` and `system`, as `vmap` has it:
    0 where every leaf has a leading axis of S, so that each lane has hyperparameters or physical parameters of its own, and a
    sweep is one program.

    Every iteration makes a record, each of its arrays with an axis of seeds: `real_steps`; `seconds` and the process's
    `cpu_seconds` so far (updates and collection, compile time and evaluation apart); `returns` [S, N k] of the episodes that
    ended in it, NaN elsewhere, and `ended`, which they are; `rejected` steps, not finite or of an episode that was over before
    it began; `refused` updates, in which something that was finite came out not finite (the carry of before is kept); if there
    were any, `nonfinite_in`, the names of the first such values of each seed; what the agent says; and every `evaluate_every`
    iterations, and at the end, `evaluation` [S, `evaluations`], the returns of `agent.best`, each from another start.
    `on_record` is given them all. `checkpointer` sees the state after each record, and has the one to go on from.

    Shapes: every leaf of the carry and the buffer gets a leading axis of S. Raises: `ValueError` for sizes that do not fit, and
    if the warm-up leaves nothing in the buffer; `TypeError` if the policy is a plan.

    >>> import jax
    >>> from diffmbrl import tasks
    >>> from diffmbrl.agents import RandomAgent
    >>> learned = learn(RandomAgent(every=50), tasks.pendulum(horizon=50), jax.random.split(jax.random.key(0), 2),
    real_steps=200)
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
            given = (agent, system, lanes.carry, keys)
            evaluate = evaluate or system.ready(_evaluate, *given, count=evaluations, in_axes=in_axes)
            record["evaluation"] = np.asarray(to_local(evaluate(*given)))
        records.append(record)
        if on_record is not None:
            on_record(record, Learned(lanes.carry, lanes.buffer, records, done))
        checkpointer.save(lanes, done=done, iteration=iteration, spent=spent, worked=worked)

    if (kept := checkpointer.restored) is None:
        warm = system.ready(_warm, agent, system, keys, capacity=capacity, in_axes=in_axes)
        lanes, fresh = warm(agent, system, keys)
        lanes = shard_like(keys, lanes)
        left = np.asarray(to_local(lanes.buffer.size))
        if left.min() < 1:
            why = "; ".join(steps_named(fresh)) or "every episode was over before its first step"
            raise ValueError(
                f"of {agent.warmup} first steps of '{system.view.name}' none could be kept (seeds "
                f"{np.flatnonzero(left < 1)}): {why}"
            )
        done, iteration, spent, worked = agent.warmup, 0, 0.0, 0.0
        recorded(_record(fresh, done, spent, worked))
    else:
        shapes = jax.eval_shape(lambda: _warm(agent, system, keys, capacity, in_axes)[0])
        lanes = shard_like(keys, checkpointer.restore(shapes))
        done, iteration, spent, worked = (kept[name] for name in ("done", "iteration", "spent", "worked"))
    while not over():
        number = jnp.int32(iteration)
        # Before the clock starts.
        run = run or system.ready(_iterate, agent, system, lanes, keys, number, in_axes=in_axes)
        begun, before = time.perf_counter(), time.process_time()
        lanes, said = jax.block_until_ready(run(agent, system, lanes, keys, number))
        lanes = shard_like(keys, lanes)
        spent, worked = broadcast(spent + time.perf_counter() - begun), worked + time.process_time() - before
        done, iteration = done + agent.every, iteration + 1
        said = {name: np.asarray(x) for name, x in to_local(said).items()}
        named = update_named(lanes.carry, said.pop(SPOILT), iteration)
        recorded(_record(lanes.fresh, done, spent, worked, named) | said)
    return Learned(lanes.carry, lanes.buffer, records, done)


@partial(jax.jit, static_argnames=("capacity", "in_axes"))
def _warm(agent: Agent, system: Real, keys: Key[Array, " S"], capacity: int, in_axes: Axes) -> tuple[Lane, Collected]:
    """Each seed's carry and its first steps; the episodes then begin anew, so that a memory begins with its episode."""
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
    return Lane(carries, buffer, places, latest), fresh


@partial(jax.jit, static_argnames="in_axes")
def _iterate(
    agent: Agent, system: Real, lanes: Lane, keys: Key[Array, " S"], number: Array, in_axes: Axes
) -> tuple[Lane, dict]:
    """An update, and `every` steps with what came of it."""
    view, before = system.view, (lanes.carry, lanes.buffer, lanes.fresh)
    carries, said, key_collect = _updated(agent, view, *before, keys, number, in_axes)
    who, steps = Acting(agent, view, "policy", in_axes), agent.every // agent.environments
    places, fresh = system.collect(who, carries, lanes.places, key_collect, steps=steps)
    return Lane(carries, _added(lanes.buffer, fresh), places, fresh), said


@partial(jax.jit, static_argnames=("count", "in_axes"))
def _evaluate(
    agent: Agent, system: Real, carries: Any, keys: Key[Array, " S"], count: int, in_axes: Axes
) -> Float[Array, "S count"]:
    """The return of the first episode from each of `count` starts: the same starts and noise at each evaluation."""
    who = Acting(agent, system.view, "best", in_axes)
    key_begin, key_collect = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, 2)))(keys).T
    places = system.begin(who, carries, key_begin, count, jnp.zeros(keys.shape, jnp.int32))
    _, found = system.collect(who, carries, places, key_collect, steps=system.horizon)
    return jnp.take_along_axis(found.J, jnp.argmax(found.steps.last, axis=2)[:, :, None], axis=2)[:, :, 0]


@partial(jax.jit, static_argnames="in_axes")
def _begun(agent: Agent, view: Task, keys: Key[Array, " S"], in_axes: Axes) -> tuple[Any, ...]:
    """Each seed's carry, and its keys of the warm-up."""
    split = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, 0), 4))(keys).T
    begun = jax.vmap(lambda agent, view, key: agent.init(view, key), in_axes=(*in_axes, 0))
    return begun(agent, view, split[0]), *split[1:]


@partial(jax.jit, static_argnames="in_axes")
def _updated(
    agent: Agent,
    view: Task,
    carries: Any,
    buffers: Buffer,
    fresh: Collected,
    keys: Key[Array, " S"],
    number: Array,
    in_axes: Axes,
) -> tuple[Any, dict, Key[Array, " S"]]:
    """The carries after an update, or as they were; what the agents say; the keys of the steps that follow."""

    def one(agent, view, carry, buffer, fresh, key):
        key_update, key_collect = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, 1), number))
        learned, said = agent.update(carry, view, buffer, fresh, key_update)
        leaves = spoilt(carry, learned)
        refused = jnp.any(leaves)
        kept = jax.tree.map(lambda x, y: jnp.where(refused, x, y), carry, learned)
        return kept, said | {"refused": refused.astype(jnp.int32), SPOILT: leaves}, key_collect

    return jax.vmap(one, in_axes=(*in_axes, 0, 0, 0, 0))(agent, view, carries, buffers, fresh.steps, keys)


@jax.jit
def _added(buffers: Buffer, fresh: Collected) -> Buffer:
    """Each seed's buffer with the steps of one environment after another."""

    def one(buffer, fresh):
        return buffer.add(*flat(fresh[:4]))

    return jax.vmap(one)(buffers, fresh)


def _record(
    fresh: Collected, real_steps: int, seconds: float, cpu_seconds: float, named: Sequence[str] = ()
) -> dict[str, Any]:
    """`named` are the updates' values that were not finite, to which those of the steps are added."""
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
    """What `learn` asks of its sizes. Raises: `ValueError` naming the one that is wrong."""
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
