"""The one loop that every solver runs in."""

import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from diffmbrl.core import Solver, State, Task, is_plan
from diffmbrl.devices import broadcast, replicate_like, to_local
from diffmbrl.info import Info, in_last_stage, is_finite
from diffmbrl.solve.checkpointer import Checkpointer, NoCheckpoints
from diffmbrl.solve.gradient_reach import refuse_without_gradient
from diffmbrl.solve.nonfinite import locate, nonfinite_leaf

CHUNK = 64  # updates made between two looks from the host, at most


class History(NamedTuple):
    """What happened: `Info` of every update, with a leading axis of updates, as numpy arrays."""

    info: Info
    updates: int
    stop: str  # why it ended, in words
    seconds: float  # in the updates, compile time apart
    compile_seconds: float


def solve(
    solver: Solver,
    policy: Any,
    task: Task,
    s0: State,
    key: PRNGKeyArray | None,
    steps: int,
    *,
    tolerance: float = 0.0,
    relative: float = 0.0,
    seconds: float = float("inf"),
    checkpointer: Checkpointer | None = None,
) -> tuple[Any, History]:
    """Run `solver` from `policy` on `task`: up to `steps` updates, or `seconds` of them, or until it has converged.

    It has when |dJ/dtheta| is at most `tolerance`, or when an accepted update changed J by at most `relative` |J| (0: never);
    under a schedule, `Continuation`, in its last stage.

    A policy solver takes `s0` [B, ...] and improves the mean return; a plan solver takes one start state. `key` drives the
    noise of policy and dynamics, update i using `fold_in(key, i)`; None means no noise. A return or gradient that is not finite
    ends the run: the last policy without one is returned and `History.stop` names the tensor and the step. Dozens of updates
    run between two looks from the host, so a small problem is not slowed by Python; the budget is checked at each look.
    `looks` sees the state at each of them, and has the one to go on from.

    Raises: `ValueError` if `s0` does not have the task's state shape (with or without batch axis, as the solver takes it), if
    `steps` is below 1, if a parameter of the task is not finite, or if no reward depends on an action.

    >>> import jax, optax
    >>> from diffmbrl import Neural, tasks
    >>> from diffmbrl.optimizers import OptaxSolver
    >>> task = tasks.pendulum_swingup(horizon=20)
    >>> key = jax.random.key(0)
    >>> policy = Neural.init(task, key=key)
    >>> policy, history = solve(OptaxSolver(optax.lbfgs), policy, task, task.starts(key, 4), key, steps=3)
    >>> history.updates, history.stop
    (3, '3 updates')
    """
    check_problem(solver, policy, task, s0, steps)
    policy, carry = replicate_like(s0, (policy, solver.init(policy, task)))
    bounds = {
        name: jnp.asarray(x, task.weights.dtype) for name, x in [("tolerance", tolerance), ("relative", relative)]
    }
    run = partial(iterate, solver, task=task, s0=s0, key=key, **bounds)
    checkpointer = NoCheckpoints() if checkpointer is None else checkpointer
    begun = time.perf_counter()
    before = jnp.full((), jnp.nan, task.weights.dtype)  # J before the last accepted update: there is none yet
    jax.block_until_ready(run(policy, carry, first=jnp.int32(0), count=jnp.int32(0), before=before))
    compiled = time.perf_counter()
    chunks, starts, done, count, spent = [], [], 0, 1, 0.0
    if (kept := checkpointer.restored) is not None:
        done, spent = kept["done"], kept["spent"]
        one = jax.eval_shape(partial(run, first=jnp.int32(0), count=jnp.int32(1), before=before), policy, carry)
        infos = [jax.tree.map(lambda x, n=n: np.zeros((n, *x.shape[1:]), x.dtype), one[2]) for n in kept["rows"]]
        state = checkpointer.restore({"now": one[:2], "last": one[:2], "before": before, "infos": infos})
        policy, carry = replicate_like(s0, state["now"])
        before, chunks = state["before"], state["infos"]
        starts = [(*replicate_like(s0, state["last"]), kept["last"])]
    stop = f"{steps} updates"
    while done < steps:
        started = time.perf_counter()
        count = min(count, steps - done, CHUNK)
        starts = [*starts[-1:], (policy, carry, done)]
        policy, carry, info, made = jax.block_until_ready(
            run(policy, carry, first=jnp.int32(done), count=jnp.int32(count), before=before)
        )
        (policy, carry), (info, made) = replicate_like(s0, (policy, carry)), to_local((info, made))
        took = broadcast(time.perf_counter() - started, s0)
        spent += took
        made = int(made)
        chunks.append(jax.tree.map(lambda x, made=made: np.asarray(x)[:made], info))
        done += made
        last = jax.tree.map(lambda x: x[-1], chunks[-1])
        norm = np.inf if last.gradient_norm is None else last.gradient_norm
        change = _relative_change(chunks[-1], before)
        final = last.final is None or bool(last.final)
        before = jnp.where(last.accepted & final, last.J, jnp.nan).astype(before.dtype)
        if done == made and norm == 0:
            refuse_without_gradient(task)
        if not (np.isfinite(last.J) and (np.isfinite(norm) or last.gradient_norm is None)):
            stop = f"nonfinite: {locate(policy, task, s0, _key(key, done - 1))} (update {done})"
            policy = _rewind(run, starts, done - 2)
            break
        if norm <= tolerance and final:
            stop = f"converged: gradient norm {norm:.3g} is at most {tolerance:g}"
            break
        if change <= relative and relative > 0 and final:
            stop = f"converged: relative change of J {change:.3g} is at most {relative:g}"
            break
        if spent >= seconds:
            stop = f"budget of {seconds:g} s after {done} updates"
            break
        chunks = _merged(chunks)
        state = {"now": (policy, carry), "last": starts[-1][:2], "before": before, "infos": chunks}
        checkpointer.save(state, done=done, spent=spent, last=starts[-1][2], rows=[len(chunk.J) for chunk in chunks])
        # About five looks a second, whatever the problem's size.
        count = count * 2 if took < 0.1 else max(1, count // 2) if took > 0.4 else count
    info = jax.tree.map(lambda *xs: np.concatenate(xs), *chunks)
    return policy, History(info, done, stop, spent, compiled - begun)


@jax.jit
def iterate(
    solver: Any,
    policy: Any,
    carry: Any,
    *,
    task: Task,
    s0: State,
    key: PRNGKeyArray | None,
    first: Int[Array, ""],
    count: Int[Array, ""],
    tolerance: Float[Array, ""],
    relative: Float[Array, ""] | None = None,
    before: Float[Array, ""] | None = None,
) -> tuple[Any, Any, Info, Int[Array, ""]]:
    """Up to `count` (at most CHUNK) updates on the device, number `first` and on; ends early as `solve` does.

    `before` is J of the update before the first, if that was accepted, else NaN; None for both leaves the change of J alone.
    Returns policy, carry, `Info` with CHUNK rows, and the number of rows filled. `count` is traced, so one compile serves every
    length; `vmap` it over policies, carries, starts or hyperparameters for many runs at once.
    """

    def update(policy, carry, index):
        return solver.update(policy, carry, task, s0, key=_key(key, index))

    empty = jax.tree.map(
        lambda x: jnp.zeros((CHUNK, *x.shape), x.dtype), jax.eval_shape(update, policy, carry, first)[2]
    )

    def ended(row, before):
        converged = jnp.zeros(row.J.shape, bool)
        if row.gradient_norm is not None:
            converged = converged | (row.gradient_norm <= tolerance)
        if before is not None and relative is not None:
            small = jnp.abs(row.J - before) <= relative.astype(row.J.dtype) * jnp.abs(row.J)
            converged = converged | (small & (relative > 0))
        return ~is_finite(row) | (converged & in_last_stage(row))

    def going(state):
        *_, i, over = state
        return (i < jnp.minimum(count, CHUNK)) & ~over

    def body(state):
        policy, carry, info, before, i, _ = state
        policy, carry, row = update(policy, carry, first + i)
        # Not `rows.at[i].set`: a scatter takes longer than an iteration of a small planner.
        info = jax.tree.map(lambda rows, x: jax.lax.dynamic_update_index_in_dim(rows, x, i, 0), info, row)
        over = ended(row, before)
        if before is not None:
            before = jnp.where(row.accepted & in_last_stage(row), row.J, jnp.nan).astype(before.dtype)
        return policy, carry, info, before, i + 1, over

    start = (policy, carry, empty, before, jnp.zeros((), jnp.int32), jnp.array(False))
    policy, carry, info, _, made, _ = jax.lax.while_loop(going, body, start)
    return policy, carry, info, made


def check_problem(solver: Any, policy: Any, task: Task, s0: State, steps: int) -> None:
    """Everything that can be wrong with the arguments and seen before compiling."""
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1, got {steps!r}")
    batched = solver.kind == "policy"
    shapes, given = jax.tree.leaves(task.state_shape), jax.tree.leaves(s0)
    axes = 1 if batched else 0
    fits = jax.tree.structure(task.state_shape) == jax.tree.structure(s0) and all(
        x.ndim == y.ndim + axes and x.shape[axes:] == y.shape for x, y in zip(given, shapes, strict=True)
    )
    if not fits or (batched and len({x.shape[0] for x in given}) != 1):
        wanted = ", ".join(str(["B", *y.shape] if batched else list(y.shape)).replace("'", "") for y in shapes)
        got = ", ".join(str(list(x.shape)) for x in given)
        raise ValueError(
            f"s0 has shape {got}; {type(solver).__name__} on task '{task.name}' takes {wanted}"
            + (" (task.starts(key, B))" if batched else " (one start; vmap for many)")
        )
    if not batched and not is_plan(policy):
        raise TypeError(
            f"{type(solver).__name__} improves a plan, such as Affine.zeros(task); got {type(policy).__name__}"
        )
    for what, tree in [("task", task), ("policy", policy), ("s0", s0)]:
        name = nonfinite_leaf(tree, allow_infinite=what == "task")
        if name is not None:
            raise ValueError(f"{what}{name} is not finite; every parameter must be a finite number")


def _relative_change(info: Info, before: Any) -> float:
    """|J - J before| / |J| after an accepted update of the same objective, else NaN; `before` is as for `iterate`."""
    J = info.J[-1]
    if len(info.J) > 1:
        comparable = info.accepted[-2] and (info.final is None or info.final[-2])
        before = info.J[-2] if comparable else np.nan
    return float(np.abs(J - before) / np.abs(J)) if J != 0 else np.nan


def _merged(chunks: list[Info]) -> list[Info]:
    """The same rows in few chunks, each of more rows than the next: no row is copied more often than there are chunks."""
    chunks = list(chunks)
    while len(chunks) > 1 and len(chunks[-2].J) <= len(chunks[-1].J):
        last = chunks.pop()
        chunks[-1] = jax.tree.map(lambda x, y: np.concatenate([x, y]), chunks[-1], last)
    return chunks


def _rewind(run: Any, starts: list, updates: int) -> Any:
    """The policy after so many updates, made again from the start of one of the last two chunks."""
    for policy, carry, done in reversed(starts):
        if done <= updates:
            return run(policy, carry, first=jnp.int32(done), count=jnp.int32(updates - done))[0]
    return starts[0][0]


def _key(key: PRNGKeyArray | None, index: Any) -> PRNGKeyArray | None:
    return None if key is None else jax.random.fold_in(key, index)
