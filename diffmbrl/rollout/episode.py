"""One rollout from one start state: its trajectory, or its return alone."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from diffmbrl.core import Policy, State, Stateful, Task, Trajectory, is_plan
from diffmbrl.rollout.step import AdjointRule, check_shapes, rollout_start, stepping, terminal_reward

Carry = TypeVar("Carry")


def rollout(
    policy: Policy | Stateful,
    task: Task,
    s0: State,
    key: PRNGKeyArray | None = None,
    *,
    w: Float[Array, "T m"] | None = None,
    remat: int | None = 1,
) -> Trajectory:
    r"""Follow a policy for T steps from one start state: $a_t = \pi(s_t)$, $s_{t+1} = f(s_t, a_t)$.

    Args:
        policy: A policy, a plan of T steps or a policy with a memory.
        task: The task, with a horizon of T steps.
        s0: One start state; see `rollouts` for a batch.
        key: Key of the noise of policy and dynamics, of which step t uses `step_keys(key, t)`; None for no noise.
        w: Perturbation added to the actions, shape [T, m]; the gradient with respect to it is dJ/da_t.
        remat: Amount of recomputation in the reverse pass. None recomputes nothing: fast to compile, most memory. 1
            recomputes each step: on a CPU up to ten times faster, since fewer residuals cross the loop. k > 1 also
            recomputes segments of k steps: memory of about T/k + k states.

    Returns:
        The trajectory: states and actions with a leading axis of T, and the last state.

    Raises:
        ValueError: If the policy's action is not of shape [m], the next state is not like the state, the reward is not a
            scalar, a plan's time axis is not T, or `remat` is below 1.

    >>> import jax
    >>> from diffmbrl import Neural, rollout, tasks
    >>> task = tasks.pendulum(horizon=10)
    >>> trajectory = rollout(Neural.init(task, key=jax.random.key(0)), task, task.initial(jax.random.key(1)))
    >>> trajectory.s.shape, trajectory.a.shape
    ((10, 2), (10, 1))
    """
    return recorded(policy, task, s0, key, keep=lambda _: None, w=w, remat=remat)[0]


def recorded(
    policy: Policy | Stateful,
    task: Task,
    s0: State,
    key: PRNGKeyArray | None = None,
    *,
    keep: Callable[[PyTree], PyTree],
    w: Float[Array, "T m"] | None = None,
    remat: int | None = 1,
) -> tuple[Trajectory, PyTree]:
    """Follow a policy from one start state and record a part of its memory at every step.

    Args:
        policy: As in `rollout`.
        task: As in `rollout`.
        s0: One start state.
        key: As in `rollout`.
        keep: Function from the memory after a step to the part that is recorded; a policy without a memory has None.
        w: As in `rollout`.
        remat: As in `rollout`.

    Returns:
        The trajectory, and the recorded parts with a leading axis of T.

    Raises:
        ValueError: As `rollout`.
    """

    def record(s, a, r, alive, memory):
        return s, a, r, alive, keep(memory)

    (s_T, alive_T), (s, a, r, alive, kept) = _scan(policy, task, s0, key, remat, record, w=w)
    return Trajectory(s, a, r, jnp.append(alive, alive_T), s_T), kept


def episode_return(
    policy: Policy | Stateful,
    task: Task,
    s0: State,
    key: PRNGKeyArray | None = None,
    *,
    remat: int | None = 1,
    adjoint: AdjointRule | None = None,
) -> Float[Array, ""]:
    r"""The return of one rollout, $J = \sum_{t<T} w_t r_t + w_T \phi(s_T)$, without storing the trajectory.

    Args:
        policy: As in `rollout`.
        task: As in `rollout`.
        s0: One start state.
        key: As in `rollout`.
        remat: As in `rollout`.
        adjoint: Rule `(t, dJ/ds_t) -> dJ/ds_t` that the reverse pass applies at every step, such as `Truncated`; None for
            the exact gradient. The return itself does not depend on it.

    Returns:
        J, a scalar.

    Raises:
        ValueError: As `rollout`.

    >>> from diffmbrl import Linear, tasks
    >>> task = tasks.lqr(horizon=10)
    >>> episode_return(Linear.zeros(task), task, task.initial(jax.random.key(0))).shape
    ()
    """
    (s_T, alive_T), r = _scan(policy, task, s0, key, remat, lambda s, a, r, alive, memory: r, adjoint)
    return jnp.vdot(task.weights[:-1], r) + _terminal(task, s0, s_T, alive_T)


def returns(trajectory: Trajectory, task: Task) -> Float[Array, ""]:
    r"""The return of a trajectory: $J = \sum_{t<T} w_t r_t + w_T \phi(s_T)$.

    Args:
        trajectory: One trajectory, without a batch axis.
        task: The task, whose weights w_t and terminal reward phi are used.

    Returns:
        J, a scalar.
    """
    s0 = jax.tree.map(lambda x: x[0], trajectory.s)
    terminal = _terminal(task, s0, trajectory.s_T, trajectory.alive[-1])
    return jnp.vdot(task.weights[:-1], trajectory.r) + terminal


def _terminal(task: Task, s0: State, s_T: State, alive_T: Array) -> Array:
    if task.done is None:
        return task.weights[-1] * task.terminal(s_T)
    return task.weights[-1] * terminal_reward(task.terminal, s_T, alive_T, s0)


def _scan(
    policy: Policy | Stateful,
    task: Task,
    s0: State,
    key: PRNGKeyArray | None,
    remat: int | None,
    record: Callable[..., PyTree],
    adjoint: AdjointRule | None = None,
    w: Array | None = None,
) -> tuple[tuple[State, Array], Any]:
    if remat is not None and (not isinstance(remat, int) or remat < 1):
        raise ValueError(f"remat must be None, 1 (each step) or a segment length, got {remat!r}")
    check_shapes(policy, task, s0)
    step, plan = stepping(policy, task, s0, key, record, adjoint), policy if is_plan(policy) else None
    carry, out = _scan_remat(step, rollout_start(policy, task, s0), (jnp.arange(task.horizon), plan, w), remat)
    return carry[:2], out


def _scan_remat(
    step: Callable[[Carry, Any], tuple[Carry, Any]], carry: Carry, xs: PyTree, remat: int | None
) -> tuple[Carry, Any]:
    """`lax.scan` whose reverse pass recomputes steps and, for `remat > 1`, segments of steps."""
    if remat is None:
        return jax.lax.scan(step, carry, xs)
    step = jax.checkpoint(step, prevent_cse=False)
    if remat == 1:
        return jax.lax.scan(step, carry, xs)
    length = jax.tree.leaves(xs)[0].shape[0]
    whole = length // remat * remat

    def segment(carry, xs):
        return jax.lax.scan(step, carry, xs)

    folded = jax.tree.map(lambda x: x[:whole].reshape(whole // remat, remat, *x.shape[1:]), xs)
    carry, out = jax.lax.scan(jax.checkpoint(segment, prevent_cse=False), carry, folded)
    out = jax.tree.map(lambda y: y.reshape(whole, *y.shape[2:]), out)
    carry, rest = jax.lax.scan(step, carry, jax.tree.map(lambda x: x[whole:], xs))
    return carry, jax.tree.map(lambda y, z: jnp.concatenate([y, z]), out, rest)
