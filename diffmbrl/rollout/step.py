"""One step of a rollout: its keys, reward and next state, the end of the episode and the terminal reward."""

from collections.abc import Callable
from typing import Any, cast, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from diffmbrl.core import Policy, State, Stateful, Task, is_plan, is_stateful, where

# (t, dJ/ds_t) -> the adjoint that the reverse pass continues with to step t - 1; a module, such as `gradients.Truncated`.
AdjointRule = Callable[[Int[Array, ""], State], State]
# The state, whether the episode has not ended, and the policy's memory (None for a policy without).
StepCarry = tuple[State, Bool[Array, ""], PyTree]


@overload
def step_keys(key: PRNGKeyArray, t: int | Int[Array, ""], count: int = 2) -> tuple[PRNGKeyArray, ...]: ...


@overload
def step_keys(key: PRNGKeyArray | None, t: int | Int[Array, ""], count: int = 2) -> tuple[PRNGKeyArray | None, ...]: ...


def step_keys(key: PRNGKeyArray | None, t: int | Int[Array, ""], count: int = 2) -> tuple[PRNGKeyArray | None, ...]:
    """Random keys of step t: first the policy's, then the dynamics'.

    Args:
        key: Key of the whole rollout; None for a rollout without noise.
        t: Number of the step.
        count: Number of keys; those after the first two are for draws that only some loops make, such as a sensor's noise.

    Returns:
        `count` keys, `split(fold_in(key, t), count)`; all None without a key.

    >>> key_a, key_s = step_keys(jax.random.key(0), 3)
    >>> step_keys(None, 3)
    (None, None)
    """
    return (None,) * count if key is None else tuple(jax.random.split(jax.random.fold_in(key, t), count))


def transition(
    task: Task, s: State, a: Float[Array, "*batch m"], key: PRNGKeyArray | None
) -> tuple[Float[Array, "*batch"], State]:
    """Reward and next state of one action, with matrix products in full precision on every device.

    Args:
        task: Its reward and dynamics are evaluated.
        s: One state; a batch for a task whose reward and dynamics take a batch.
        a: One action, shape [m], or a batch.
        key: Key of the dynamics' noise, `step_keys(key, t)[1]`; None for no noise.

    Returns:
        The reward r(s, a), not weighted, and the next state f(s, a).

    >>> from diffmbrl import tasks
    >>> r, s_next = transition(tasks.lqr(), jnp.zeros(2), jnp.zeros(1), None)
    >>> s_next.tolist()
    [0.0, 0.0]
    """
    with jax.default_matmul_precision("highest"):
        return task.reward(s, a), task.dynamics(s, a, key=key)


def is_done(task: Task, s: State) -> Bool[Array, ""]:
    """Whether the episode has ended at a state; always False if the task's episodes end at the horizon alone.

    Args:
        task: Its `done` is evaluated.
        s: One state.

    Returns:
        A boolean scalar.
    """
    return jnp.zeros((), bool) if task.done is None else task.done(s)


def terminal_reward(
    phi: Callable[[State], Float[Array, ""]], s: State, earned: Bool[Array, ""], substitute: State
) -> Float[Array, ""]:
    """The terminal reward phi(s) if it is earned, else 0, with a gradient of 0 even if phi is undefined at s.

    Args:
        phi: The terminal reward as a function of the state, `task.terminal`.
        s: The last state.
        earned: Whether the terminal reward counts: the episode has lasted to the horizon.
        substitute: State at which phi is evaluated, and the result discarded, if it does not count.

    Returns:
        phi(s) or 0.
    """
    value = phi(where(earned, s, jax.lax.stop_gradient(substitute)))
    return jnp.where(earned, value, jnp.zeros_like(value))


def rollout_start(policy: Policy | Stateful, task: Task, s0: State) -> StepCarry:
    """The values that a rollout carries from step to step, at its start.

    Args:
        policy: A policy, a plan or a policy with a memory.
        task: The task.
        s0: One start state.

    Returns:
        The state, whether the episode has not ended there already, and the policy's memory (None for a policy without).
    """
    alive = jnp.array(True) if task.done is None else ~task.done(s0)
    return s0, alive, cast(Stateful, policy).start(task) if is_stateful(policy) else None


def stepping(
    policy: Policy | Stateful,
    task: Task,
    s0: State,
    key: PRNGKeyArray | None,
    record: Callable[..., PyTree],
    adjoint: AdjointRule | None = None,
) -> Callable[[StepCarry, tuple[Any, Any, Any]], tuple[StepCarry, PyTree]]:
    """One step of a rollout from `s0`, as a function for `lax.scan`.

    The function maps a carry of `rollout_start` and the step's inputs (t, the plan's slice t or None, a perturbation of the
    action or None) to the next carry and the record of the step.

    Args:
        policy: A policy, a plan or a policy with a memory.
        task: The task.
        s0: The start state, at which functions are evaluated after the end of the episode.
        key: Key of the rollout's noise; None for no noise.
        record: Function of (s, a, r, alive, memory) that returns the record of a step.
        adjoint: Rule that the reverse pass applies to each dJ/ds_t; None for the exact derivative.

    Returns:
        The step function.
    """
    stateful, is_planned = is_stateful(policy), is_plan(policy)

    def step(carry, x):
        s, alive, memory = carry
        t, plan_t, w_t = x
        pi: Any = plan_t if is_planned else policy
        s = s if adjoint is None else _with_adjoint(adjoint, t, s)
        key_a, key_s = step_keys(key, t)
        held = s
        if task.done is not None:
            s = where(alive, s, s0)
        if stateful:
            a, memory = pi.step(memory, s, key=key_a)
            check_action(a, task)
        else:
            a = pi(s, key=key_a)
        if w_t is not None:
            a = a + w_t
        r, s_next = transition(task, s, a, key_s)
        if task.done is None:
            return (s_next, alive, memory), record(s, a, r, alive, memory)
        s_next = where(alive, s_next, held)
        out = record(held, a, jnp.where(alive, r, jnp.zeros_like(r)), alive, memory)
        return (s_next, alive & ~task.done(s_next), memory), out

    return step


@jax.custom_vjp
def _with_adjoint(adjoint: Any, t: Array, s: State) -> State:
    """s itself, whose cotangent passes through `adjoint`."""
    return s


def _with_adjoint_backward(residuals: Any, cotangent: State) -> tuple[None, None, State]:
    adjoint, t = residuals
    return None, None, adjoint(t, cotangent)


_with_adjoint.defvjp(lambda adjoint, t, s: (s, (adjoint, t)), _with_adjoint_backward)


def check_shapes(policy: Policy | Stateful, task: Task, s0: State) -> None:
    """Raise an error if the policy, the task and the start do not fit together; once per trace.

    A wrong shape would otherwise broadcast its way through the scan.
    """
    if is_plan(policy):
        lengths = {leaf.shape[0] for leaf in jax.tree.leaves(policy)}
        if lengths != {task.horizon}:
            raise ValueError(
                f"the plan has {sorted(lengths)} time steps; task '{task.name}' has a horizon of {task.horizon}"
            )
        policy = jax.tree.map(lambda x: x[0], policy)
    # A policy with a memory may be expensive to trace; its action is checked when the scan traces it.
    a = task.a_low if is_stateful(policy) else jax.eval_shape(lambda s: cast(Policy, policy)(s), s0)
    check_action(a, task)
    r, s_next = jax.eval_shape(lambda s, a: (task.reward(s, a), task.dynamics(s, a)), s0, a)
    if r.shape != ():
        raise ValueError(f"the reward of task '{task.name}' has shape {list(r.shape)}; expected a scalar")
    given, made = describe(s0), describe(s_next)
    if given != made:
        raise ValueError(f"the dynamics of task '{task.name}' map a state {given} to {made}; expected the same")


def check_action(a: Any, task: Task) -> None:
    """Raise `ValueError` if an action is not of shape [m]."""
    if a.shape != (task.m,):
        raise ValueError(
            f"the policy returned an action of shape {list(a.shape)}; task '{task.name}' takes [m] = [{task.m}]"
        )


def describe(s: State) -> str:
    """Describe the structure, shapes and dtypes of a state, for comparisons and error messages.

    Args:
        s: A state, or the shapes of one.

    Returns:
        A short text such as `float32[4]`.
    """
    leaves, tree = jax.tree.flatten(s)
    shapes = ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves)
    return shapes if len(leaves) == 1 else f"{tree} of {shapes}"
