"""Planning from many starts at once, each until it has converged or cannot continue."""

import time
from enum import IntEnum
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray, PyTree

from diffmbrl.core import Policy, Solver, State, Task, is_plan, is_planner
from diffmbrl.info import in_last_stage
from diffmbrl.planners.quadratic_models import Expansion, expansion
from diffmbrl.rollout import episode_return, split_keys
from diffmbrl.solve.loop import check_problem


class Status(IntEnum):
    """Why planning from one start ended.

    `RUNNING` occurs only inside a run. `GRADIENT`: the gradient norm is at most `tolerance`. `RELATIVE`: an accepted update
    changed J by at most `relative` |J|. Under a continuation, both are tested in its last stage alone. `BUDGET`: all updates
    were made. `STALLED`: an update changed neither plan nor damping, so no step length helps. `NONFINITE`: J or its gradient
    is not finite; the plan is the last one at which they were.
    """

    RUNNING = 0
    GRADIENT = 1
    RELATIVE = 2
    BUDGET = 3
    STALLED = 4
    NONFINITE = 5


class Plans(NamedTuple):
    """Result of `plans` for B starts.

    Args:
        plan: The plans, leaves [B, T, ...].
        J: Return of each plan, shape [B].
        gradient_norm: Norm of dJ/da of each plan, or, if the budget ended it, of the plan one update before, shape
            [B]; None for planners without gradients.
        status: Why planning ended, a `Status` for each start, shape [B].
        iterations: Number of updates of each start, shape [B].
        useful: Fraction of executed iterations that some unfinished start still needed.
        expansion: Second-order expansion of the return to go along each plan, leaves [B, T + 1, ...]; None unless
            asked for.
        seconds: Wall-clock time, compilation included.
    """

    plan: Policy
    J: Float[Array, " B"]
    gradient_norm: Float[Array, " B"] | None
    status: Int[np.ndarray, " B"]
    iterations: Int[np.ndarray, " B"]
    useful: float
    expansion: Expansion | None
    seconds: float

    def ends(self) -> dict[str, int]:
        """Count the starts by the status with which they ended, in lower case."""
        return {s.name.lower(): int(n) for s in Status if (n := np.sum(self.status == s))}


class OneByOne(eqx.Module):
    """Schedule that plans from one start after another, so that no start waits for another.

    It is the faster schedule on a CPU, where XLA fuses each loop of a small problem into one function, and a vector of
    starts runs slower than a loop over them: 64 starts, T = 100, float64, solves per CPU second of one core against
    `Together`'s: pendulum 1177 and 670, cart-pole 150 and 83, acrobot 277 and 146, quadrotor 202 and 18.
    """

    def run(self, advance: Any, starts: "_Start", limit: Int[Array, ""]) -> tuple["_Start", float]:
        """Run all starts to their ends; return them and the useful fraction of the iterations."""
        return _sequentially(advance, _padded(starts, _power(_size(starts))), limit), 1.0


class Together(eqx.Module):
    """Schedule for a GPU: plan from all starts at once, and repack those still running into smaller batches.

    Batch sizes are powers of two, so that few are compiled; starts that have ended pad the last batch.

    Args:
        chunk: Number of iterations between two repackings of the batch.
        smallest: Smallest size of a batch.
    """

    chunk: int = eqx.field(static=True, default=16)
    smallest: int = eqx.field(static=True, default=8)

    def run(self, advance: Any, starts: "_Start", limit: Int[Array, ""]) -> tuple["_Start", float]:
        """Run all starts to their ends; return them and the useful fraction of the iterations."""
        running, made, run = np.arange(_size(starts)), 0, 0
        while running.size:
            size = max(_power(running.size), self.smallest)
            index = jnp.asarray(running)
            before = jax.tree.map(lambda x, index=index: x[index], starts)
            most = jnp.minimum(jnp.asarray(self.chunk, jnp.int32), limit)
            after = _first(_abreast(advance, _padded(before, size), limit, most), running.size)
            starts = jax.tree.map(lambda x, y, index=index: x.at[index].set(y), starts, after)
            each = np.asarray(after.iterations - before.iterations)
            made, run = made + each.sum(), run + size * each.max()
            running = running[np.asarray(after.status) == Status.RUNNING]
        return starts, float(made / max(run, 1))


def plans(
    planner: Solver,
    task: Task,
    s0: State,
    key: PRNGKeyArray | None = None,
    *,
    steps: int,
    start: Policy | None = None,
    tolerance: float = 0.0,
    relative: float | None = None,
    schedule: OneByOne | Together | None = None,
    values: bool = False,
) -> Plans:
    r"""Plan from each of many starts, with up to `steps` updates each, or until it has converged or cannot continue.

    Args:
        planner: Solver of kind "plan", such as `ILQR()`.
        task: Task to plan for.
        s0: Start states, leaves [B, ...].
        key: Key for planners that draw; start i uses `split_keys(key, B)[i]`, and its update j that key folded with
            j.
        steps: Largest number of updates per start.
        start: First plan, one for all or with a leading axis of B; None for the planner's own first plan.
        tolerance: Gradient norm at which a plan has converged.
        relative: Relative change of J at which a plan has converged; None for ten times the rounding error.
        schedule: `OneByOne()` or `Together()`; None for the first on a CPU and the second elsewhere.
        values: Whether to compute the expansion of the return to go along each plan.

    Returns:
        The plans, with their returns and why each ended. A plan that has converged is returned as it was measured.

    Raises:
        ValueError: If `s0` has no batch axis, `start` has another number of plans than B, or `steps` is below 1.
        TypeError: If the solver improves policies.

    Cost: each start's updates, and one rollout each at the end.

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
    first = planner.first_plan(task) if start is None else start
    batch = _batch(task, s0)
    check_problem(planner, _one(first), task, jax.tree.map(lambda x: x[0], s0), steps)
    plan = _repeated(first, task, batch)
    carry = jax.vmap(lambda plan: planner.init(plan, task))(plan)
    dtype = task.weights.dtype
    unknown, zero = jnp.full(batch, jnp.nan, dtype), jnp.zeros(batch, jnp.int32)
    starts = _Start(plan, carry, s0, split_keys(key, s0), unknown, unknown, unknown, zero, zero)
    if schedule is None:
        schedule = OneByOne() if jax.default_backend() == "cpu" else Together()
    relative = 10 * float(jnp.finfo(dtype).eps) if relative is None else relative
    bounds = jnp.asarray([tolerance, relative], dtype)
    starts, useful = schedule.run((planner, task, bounds), starts, jnp.asarray(steps, jnp.int32))
    starts = _first(starts, batch)
    J, expansions = _measure(starts.plan, task, s0, starts.key, values=values)
    return Plans(
        plan=starts.plan,
        J=J,
        gradient_norm=None if bool(jnp.all(jnp.isinf(starts.norm))) else starts.norm,
        status=np.asarray(starts.status),
        iterations=np.asarray(starts.iterations),
        useful=useful,
        expansion=expansions,
        seconds=time.perf_counter() - begun,
    )


class _Start(NamedTuple):
    """The planning state of one start; with a leading batch axis, of all."""

    plan: Policy
    carry: PyTree
    s0: State
    key: Key[Array, "*B"] | None
    J: Float[Array, "*B"]
    norm: Float[Array, "*B"]  # infinite for a planner without gradients
    before: Float[Array, "*B"]  # J before the last update if that was accepted, else NaN
    status: Int[Array, "*B"]
    iterations: Int[Array, "*B"]


def _advance(what: Any, now: _Start, limit: Int[Array, ""], most: Int[Array, ""]) -> _Start:
    """Up to `most` updates of one start, `limit` in all."""
    planner, task, (tolerance, relative) = what
    first = now.iterations

    def going(now):
        return (now.status == Status.RUNNING) & (now.iterations - first < most)

    def update(now):
        key = None if now.key is None else jax.random.fold_in(now.key, now.iterations)
        plan, carry, info = planner.update(now.plan, now.carry, task, now.s0, key=key)
        norm = jnp.full_like(info.J, jnp.inf) if info.gradient_norm is None else info.gradient_norm
        finite = jnp.isfinite(info.J) & (True if info.gradient_norm is None else jnp.isfinite(norm))
        final = in_last_stage(info)
        converged = final & (norm <= tolerance)
        still = final & (jnp.abs(info.J - now.before) <= relative * jnp.abs(info.J)) & (relative > 0)
        # With a key the next update draws other samples.
        stuck = ~info.accepted & _equal(carry, now.carry) & (key is None)
        over = now.iterations + 1 >= limit
        status = jnp.select(
            [~finite, converged, still, stuck, over],
            [jnp.int32(s) for s in (Status.NONFINITE, Status.GRADIENT, Status.RELATIVE, Status.STALLED, Status.BUDGET)],
            jnp.int32(Status.RUNNING),
        )
        # A run that ends because of a measurement returns the plan that was measured.
        keep = ~finite | converged | still
        plan, carry = jax.tree.map(lambda new, old: jnp.where(keep, old, new), (plan, carry), (now.plan, now.carry))
        before = jnp.where(info.accepted & final, info.J, jnp.nan).astype(info.J.dtype)
        return _Start(plan, carry, now.s0, now.key, info.J, norm, before, status, now.iterations + 1)

    return jax.lax.while_loop(going, update, now)


@jax.jit
def _sequentially(what: Any, starts: _Start, limit: Int[Array, ""]) -> _Start:
    return jax.lax.map(lambda now: _advance(what, now, limit, limit), starts)


@jax.jit
def _abreast(what: Any, starts: _Start, limit: Int[Array, ""], most: Int[Array, ""]) -> _Start:
    return jax.vmap(lambda now: _advance(what, now, limit, most))(starts)


@partial(jax.jit, static_argnames="values")
def _measure(plan: Policy, task: Task, s0: State, key: Any, *, values: bool) -> tuple[Array, Expansion | None]:
    def one(plan, s, k):
        return episode_return(plan, task, s, k), expansion(plan, task, s, k) if values else None

    return jax.vmap(one)(plan, s0, key)


def _equal(one: Any, other: Any) -> Array:
    same = [jnp.all(x == y) for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)]
    return jnp.all(jnp.stack(same)) if same else jnp.array(True)


def _first(starts: _Start, count: int) -> _Start:
    return jax.tree.map(lambda x: x[:count], starts)


def _size(starts: _Start) -> int:
    return starts.status.shape[0]


def _power(size: int) -> int:
    """The next power of two."""
    return 1 << max(size - 1, 0).bit_length()


def _padded(starts: _Start, size: int) -> _Start:
    """Pad to `size` with copies of the last start, marked as ended."""
    last, index = _size(starts) - 1, np.arange(size)
    filled = jax.tree.map(lambda x: x[np.minimum(index, last)], starts)
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


def _one(start: Policy) -> Policy:
    """Return the plan, or the first of several."""
    return jax.tree.map(lambda x: x[0], start) if _is_batch(start) else start


def _is_batch(start: Any) -> bool:
    """Whether these are several plans: one plan has actions `a` of shape [T, m]."""
    return is_plan(start) and start.a.ndim == 3


def _repeated(start: Policy, task: Task, batch: int) -> Policy:
    if not _is_batch(start):
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape)), start)
    sizes = {x.shape[0] for x in jax.tree.leaves(start)}
    if sizes != {batch}:
        raise ValueError(f"start has {sorted(sizes)} plans for {batch} starts; expected one for all, or one for each")
    return start
