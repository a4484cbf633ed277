"""The loop that runs any solver."""

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

CHUNK = 64  # the most updates between two returns to the host


class History(NamedTuple):
    """The reports of a run of `solve`.

    Args:
        info: `Info` of every update, numpy arrays with a leading axis of updates.
        updates: Number of updates made.
        stop: Reason for which the run ended.
        seconds: Time of the updates, without compilation.
        compile_seconds: Time of compilation.
    """

    info: Info
    updates: int
    stop: str
    seconds: float
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
    """Run a solver until it has converged, its updates or its time are spent, or a value is not finite.

    Dozens of updates run in one program between two returns to the host, which checks the time and saves the state. A return
    or gradient that is not finite ends the run with the last policy before it, and `History.stop` names the tensor and step.

    Args:
        solver: A policy solver, which improves the mean return, or a planner.
        policy: The policy, or for a planner the plan, to start from.
        task: The task.
        s0: Start states [B, ...] for a policy solver, one start state for a planner.
        key: The key of the noise of policy and dynamics; update i uses `fold_in(key, i)`. None for no noise.
        steps: The most updates.
        tolerance: Converge when |dJ/dtheta| is at most this; under a `Continuation`, in its last stage.
        relative: Converge when an accepted update changes J by at most this share of |J|; 0 for never.
        seconds: The most time for updates, in seconds.
        checkpointer: Saves the state, and resumes from a saved one.

    Returns:
        policy: The improved policy.
        history: The reports of all updates.

    Raises:
        ValueError: If `s0` does not have the task's state shape (with or without a batch axis, as the solver takes it), `steps`
            is below 1, a parameter of the task is not finite, or no reward depends on an action.
        TypeError: If a planner is given a policy that is no plan.

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
    if (saved := checkpointer.restored) is not None:
        done, spent = saved["done"], saved["spent"]
        one = jax.eval_shape(partial(run, first=jnp.int32(0), count=jnp.int32(1), before=before), policy, carry)
        infos = [jax.tree.map(lambda x, n=n: np.zeros((n, *x.shape[1:]), x.dtype), one[2]) for n in saved["rows"]]
        state = checkpointer.restore({"now": one[:2], "last": one[:2], "before": before, "infos": infos})
        policy, carry = replicate_like(s0, state["now"])
        before, chunks = state["before"], state["infos"]
        starts = [(*replicate_like(s0, state["last"]), saved["last"])]
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
        # Return to the host about five times a second, whatever the problem's size.
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
    """Make up to `count` updates on the device, and end early as `solve` does.

    The count is traced, so one compile serves every length; `vmap` it over policies, carries, starts or hyperparameters.

    Args:
        solver: The solver.
        policy: The policy to improve.
        carry: The solver's carry.
        task: The task.
        s0: Start states, or one start state for a planner.
        key: The key of the noise; update i uses `fold_in(key, i)`.
        first: Number of the first update.
        count: Number of updates, at most CHUNK.
        tolerance: Bound on |dJ/dtheta| for convergence.
        relative: Bound on the change of J as a share of |J|, 0 for none; None together with `before` to ignore it.
        before: J of the update before the first if that was accepted, else NaN.

    Returns:
        The policy, the carry, `Info` with CHUNK rows, and the number of rows filled.
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


def check_problem(solver: Solver, policy: Any, task: Task, s0: State, steps: int) -> None:
    """Check the arguments of `solve` before compiling.

    Args:
        solver: The solver.
        policy: The policy or plan.
        task: The task.
        s0: The start states.
        steps: Number of updates.

    Raises:
        ValueError: If a shape does not fit, a parameter is not finite, or `steps` is below 1.
        TypeError: If a planner is given a policy that is no plan.
    """
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
    """The change |J - J before| / |J| after an accepted update of the same objective, else NaN; `before` as in `iterate`."""
    J = info.J[-1]
    if len(info.J) > 1:
        comparable = info.accepted[-2] and (info.final is None or info.final[-2])
        before = info.J[-2] if comparable else np.nan
    return float(np.abs(J - before) / np.abs(J)) if J != 0 else np.nan


def _merged(chunks: list[Info]) -> list[Info]:
    """Merge rows into few chunks, each longer than the next, so that a row is copied a logarithmic number of times."""
    chunks = list(chunks)
    while len(chunks) > 1 and len(chunks[-2].J) <= len(chunks[-1].J):
        last = chunks.pop()
        chunks[-1] = jax.tree.map(lambda x, y: np.concatenate([x, y]), chunks[-1], last)
    return chunks


def _rewind(run: Any, starts: list, updates: int) -> Any:
    """The policy after some number of updates, recomputed from the start of one of the last two chunks."""
    for policy, carry, done in reversed(starts):
        if done <= updates:
            return run(policy, carry, first=jnp.int32(done), count=jnp.int32(updates - done))[0]
    return starts[0][0]


def _key(key: PRNGKeyArray | None, index: Any) -> PRNGKeyArray | None:
    return None if key is None else jax.random.fold_in(key, index)
