"""Plans from many starts, each with an end of its own."""

import time
from enum import IntEnum
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from diffmbrl.core import Solver, State, Task, is_plan, is_planner
from diffmbrl.info import in_last_stage
from diffmbrl.planners.quadratic_models import Expansion, expansion
from diffmbrl.rollout import episode_return, split_keys
from diffmbrl.solve.loop import check_problem


class Status(IntEnum):
    """Why planning from one start ended."""

    RUNNING = 0  # it has not: only inside a run
    GRADIENT = 1  # the gradient norm is at most `tolerance`; under a schedule, in its last stage
    RELATIVE = 2  # an accepted update changed J by at most `relative` |J|; likewise
    BUDGET = 3  # all updates were made
    STALLED = 4  # an update changed neither plan nor damping: no step helps, however short
    NONFINITE = 5  # J or its gradient is not finite; the plan is the last one of which they were


class Plans(NamedTuple):
    """What `plans` found, for each of B starts."""

    plan: Any  # leaves [B, T, ...]
    J: Float[Array, " B"]
    gradient_norm: Float[Array, " B"] | None  # of the plan, or where the budget ended it, of the plan one update before
    status: Int[np.ndarray, " B"]  # a `Status` each
    iterations: Int[np.ndarray, " B"]
    useful: float  # share of the iterations run that some start still had a use for
    expansion: Expansion | None  # of the return to go along each plan, leaves [B, T+1, ...]
    seconds: float  # compile time included

    def ends(self) -> dict[str, int]:
        """How many starts ended in which way."""
        return {s.name.lower(): int(n) for s in Status if (n := np.sum(self.status == s))}


class OneByOne(eqx.Module):
    """One start after another, each to its own end: nothing ever waits.

    The faster on a CPU, where XLA makes one function of each loop of a small problem and a vector of starts is slower than a
    loop over them: 64 starts, T = 100, float64, solves per CPU second of one core against `Together`'s: pendulum 1177 and 670,
    cart-pole 150 and 83, acrobot 277 and 146, quadrotor 202 and 18.
    """

    def run(self, advance: Any, lanes: Any, limit: Int[Array, ""]) -> tuple[Any, float]:
        return _sequentially(advance, _padded(lanes, _power(_size(lanes))), limit), 1.0


class Together(eqx.Module):
    """All starts at once, `chunk` iterations between two looks: then those still running go on in the next smaller batch.

    Batches are powers of two, `smallest` at least, so that few are compiled; what fills them up has ended already. For a GPU.
    """

    chunk: int = eqx.field(static=True, default=16)
    smallest: int = eqx.field(static=True, default=8)

    def run(self, advance: Any, lanes: Any, limit: Int[Array, ""]) -> tuple[Any, float]:
        running, made, run = np.arange(_size(lanes)), 0, 0
        while running.size:
            size = max(_power(running.size), self.smallest)
            index = jnp.asarray(running)
            before = jax.tree.map(lambda x, index=index: x[index], lanes)
            most = jnp.minimum(jnp.asarray(self.chunk, jnp.int32), limit)
            after = _first(_abreast(advance, _padded(before, size), limit, most), running.size)
            lanes = jax.tree.map(lambda x, y, index=index: x.at[index].set(y), lanes, after)
            each = np.asarray(after.iterations - before.iterations)
            made, run = made + each.sum(), run + size * each.max()
            running = running[np.asarray(after.status) == Status.RUNNING]
        return lanes, float(made / max(run, 1))


def plans(
    planner: Solver,
    task: Task,
    s0: State,
    key: PRNGKeyArray | None = None,
    *,
    steps: int,
    start: Any = None,
    tolerance: float = 0.0,
    relative: float | None = None,
    schedule: Any = None,
    values: bool = False,
) -> Plans:
    r"""Plan from each of many starts: up to `steps` updates of `planner` each, or until it has converged or cannot go on.

    `start` is a plan for all or, with a leading batch axis, one for each; without it `planner.first_plan(task)`. Start i draws
    from `split_keys(key, B)[i]`, update j of it from `fold_in` of that by j. `schedule` is `OneByOne()` or `Together()`, by
    default the first on a CPU and the second elsewhere. `values` adds the expansion of the return to go along each plan. A plan
    whose gradient norm (`tolerance`) or last relative change of J (`relative`, by default ten roundings) is small enough is
    returned as it was measured.

    Shapes: `s0` [B, ...]; the plan's leaves [B, T, ...]. Cost: each start's updates, and a rollout each at the end.
    Raises: `ValueError` if `s0` has no batch axis, `start` is not of B plans or `steps` is below 1; `TypeError` for a solver of
    policies.

    >>> import jax
    >>> from diffmbrl import ILQR, tasks
    >>> task = tasks.lqr(horizon=20)
    >>> found = plans(ILQR(), task, task.starts(jax.random.key(0), 4), steps=10, tolerance=1e-3)
    >>> found.ends(), found.plan.K.shape
    ({'gradient': 4}, (4, 20, 1, 2))
    """
    if not is_planner(planner):
        raise TypeError(f"plans takes a planner, such as ILQR(); {type(planner).__name__} improves policies: use solve")
    begun = time.perf_counter()
    if start is None:
        start = planner.first_plan(task)
    batch = _batch(task, s0)
    check_problem(planner, _one(start), task, jax.tree.map(lambda x: x[0], s0), steps)
    start = _repeated(start, task, batch)
    carry = jax.vmap(lambda plan: planner.init(plan, task))(start)
    dtype = task.weights.dtype
    unknown, zero = jnp.full(batch, jnp.nan, dtype), jnp.zeros(batch, jnp.int32)
    lanes = _Lane(start, carry, s0, split_keys(key, s0), unknown, unknown, unknown, zero, zero)
    if schedule is None:
        schedule = OneByOne() if jax.default_backend() == "cpu" else Together()
    relative = 10 * float(jnp.finfo(dtype).eps) if relative is None else relative
    bounds = jnp.asarray([tolerance, relative], dtype)
    lanes, useful = schedule.run((planner, task, bounds), lanes, jnp.asarray(steps, jnp.int32))
    lanes = _first(lanes, batch)
    J, expansions = _measure(lanes.plan, task, s0, lanes.key, values=values)
    return Plans(
        plan=lanes.plan,
        J=J,
        gradient_norm=None if bool(jnp.all(jnp.isinf(lanes.norm))) else lanes.norm,
        status=np.asarray(lanes.status),
        iterations=np.asarray(lanes.iterations),
        useful=useful,
        expansion=expansions,
        seconds=time.perf_counter() - begun,
    )


class _Lane(NamedTuple):
    """One start on its way; with a leading batch axis, all."""

    plan: Any
    carry: Any
    s0: State
    key: Key[Array, "*B"] | None
    J: Float[Array, "*B"]
    norm: Float[Array, "*B"]  # infinite of a planner that takes no gradient
    before: Float[Array, "*B"]  # J before the last update if that was accepted, else NaN
    status: Int[Array, "*B"]
    iterations: Int[Array, "*B"]


def _advance(what: Any, lane: _Lane, limit: Int[Array, ""], most: Int[Array, ""]) -> _Lane:
    """Up to `most` updates of one start, `limit` in all."""
    planner, task, (tolerance, relative) = what
    first = lane.iterations

    def going(lane):
        return (lane.status == Status.RUNNING) & (lane.iterations - first < most)

    def update(lane):
        key = None if lane.key is None else jax.random.fold_in(lane.key, lane.iterations)
        plan, carry, info = planner.update(lane.plan, lane.carry, task, lane.s0, key=key)
        norm = jnp.full_like(info.J, jnp.inf) if info.gradient_norm is None else info.gradient_norm
        finite = jnp.isfinite(info.J) & (True if info.gradient_norm is None else jnp.isfinite(norm))
        final = in_last_stage(info)
        converged = final & (norm <= tolerance)
        still = final & (jnp.abs(info.J - lane.before) <= relative * jnp.abs(info.J)) & (relative > 0)
        # With noise the next update has another.
        stuck = ~info.accepted & _equal(carry, lane.carry) & (key is None)
        over = lane.iterations + 1 >= limit
        status = jnp.select(
            [~finite, converged, still, stuck, over],
            [jnp.int32(s) for s in (Status.NONFINITE, Status.GRADIENT, Status.RELATIVE, Status.STALLED, Status.BUDGET)],
            jnp.int32(Status.RUNNING),
        )
        # What ends a run because of what was measured ends it with the plan that was measured.
        keep = ~finite | converged | still
        plan, carry = jax.tree.map(lambda new, old: jnp.where(keep, old, new), (plan, carry), (lane.plan, lane.carry))
        before = jnp.where(info.accepted & final, info.J, jnp.nan).astype(info.J.dtype)
        return _Lane(plan, carry, lane.s0, lane.key, info.J, norm, before, status, lane.iterations + 1)

    return jax.lax.while_loop(going, update, lane)


@jax.jit
def _sequentially(what: Any, lanes: _Lane, limit: Int[Array, ""]) -> _Lane:
    return jax.lax.map(lambda lane: _advance(what, lane, limit, limit), lanes)


@jax.jit
def _abreast(what: Any, lanes: _Lane, limit: Int[Array, ""], most: Int[Array, ""]) -> _Lane:
    return jax.vmap(lambda lane: _advance(what, lane, limit, most))(lanes)


@partial(jax.jit, static_argnames="values")
def _measure(plan: Any, task: Task, s0: State, key: Any, *, values: bool) -> tuple[Array, Expansion | None]:
    def one(plan, s, k):
        return episode_return(plan, task, s, k), expansion(plan, task, s, k) if values else None

    return jax.vmap(one)(plan, s0, key)


def _equal(one: Any, other: Any) -> Array:
    same = [jnp.all(x == y) for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)]
    return jnp.all(jnp.stack(same)) if same else jnp.array(True)


def _first(lanes: _Lane, count: int) -> _Lane:
    return jax.tree.map(lambda x: x[:count], lanes)


def _size(lanes: _Lane) -> int:
    return lanes.status.shape[0]


def _power(size: int) -> int:
    """The next power of two."""
    return 1 << max(size - 1, 0).bit_length()


def _padded(lanes: _Lane, size: int) -> _Lane:
    """Filled up with copies of the last lane that have ended."""
    last, index = _size(lanes) - 1, np.arange(size)
    filled = jax.tree.map(lambda x: x[np.minimum(index, last)], lanes)
    ended = jnp.where(index <= last, filled.status, jnp.int32(Status.BUDGET))
    return filled._replace(status=ended)


def _batch(task: Task, s0: State) -> int:
    given, shapes = jax.tree.leaves(s0), jax.tree.leaves(task.state_shape)
    sizes = {x.shape[:1] for x in given}
    if len(sizes) != 1 or any(x.ndim != y.ndim + 1 for x, y in zip(given, shapes, strict=True)):
        got = ", ".join(str(list(x.shape)) for x in given)
        raise ValueError(
            f"s0 has shape {got}; plans on task '{task.name}' takes a batch of starts, as of task.starts(key, B);"
            " for one start use solve"
        )
    return given[0].shape[0]


def _one(start: Any) -> Any:
    """The plan, or the first of several."""
    return jax.tree.map(lambda x: x[0], start) if _is_batch(start) else start


def _is_batch(start: Any) -> bool:
    """Every plan has actions `a`, [T, m]."""
    return is_plan(start) and start.a.ndim == 3


def _repeated(start: Any, task: Task, batch: int) -> Any:
    if not _is_batch(start):
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape)), start)
    sizes = {x.shape[0] for x in jax.tree.leaves(start)}
    if sizes != {batch}:
        raise ValueError(f"start has {sorted(sizes)} plans for {batch} starts; expected one for all, or one for each")
    return start
