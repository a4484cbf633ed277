r"""All the scans of a task over time: `rollout`, `episode_return`, `mean_return`, `returns`.

A policy is applied at every step; a plan (`OpenLoop`, `Affine`) has a leading time axis, and step t uses its slice t; one with
a memory (`core.Stateful`) carries it from step to step.

After the end of an episode (`task.done`) the state is held and every function is evaluated at the start state instead,
whose result is then discarded: with one `where` on the outputs alone, the reverse pass would multiply a zero cotangent by
the Jacobian at the terminated state, and 0 * inf is NaN.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, PyTree

from diffmbrl.core import State, Task, Trajectory, is_plan, is_stateful, reweighted, where

# (t, dJ/ds_t) -> the adjoint that the reverse pass hands on to step t - 1; a module, as `gradients.truncated` has them.
AdjointRule = Callable[[Int[Array, ""], State], State]


def rollout(
    policy: Any,
    task: Task,
    s0: State,
    key: PRNGKeyArray | None = None,
    *,
    w: Float[Array, "T m"] | None = None,
    remat: int | None = 1,
) -> Trajectory:
    r"""Follow `policy` for T steps from one start state: $a_t = \pi(s_t)$, $s_{t+1} = f(s_t, a_t)$.

    `key` drives the noise of policy and dynamics (step t uses `fold_in(key, t)`); None means no noise. `remat` says what the
    reverse pass recomputes: None nothing (fast to compile, most memory), 1 each step (the default: on a CPU up to ten times
    faster, since fewer residuals cross the loop), k > 1 segments of k steps as well (memory ~ T/k + k states). `w` is added to
    the actions: the gradient with respect to it is dJ/da_t.

    Raises: `ValueError` if the policy's action is not of shape [m], the next state is not like the state, the reward is not a
    scalar, or a plan's time axis is not T.

    >>> import jax
    >>> from diffmbrl import Neural, rollout, tasks
    >>> task = tasks.pendulum(horizon=10)
    >>> trajectory = rollout(Neural.init(task, key=jax.random.key(0)), task, task.initial(jax.random.key(1)))
    >>> trajectory.s.shape, trajectory.a.shape
    ((10, 2), (10, 1))
    """
    return recorded(policy, task, s0, key, keep=lambda _: None, w=w, remat=remat)[0]


def recorded(
    policy: Any,
    task: Task,
    s0: State,
    key: PRNGKeyArray | None = None,
    *,
    keep: Callable[[PyTree], PyTree],
    w: Float[Array, "T m"] | None = None,
    remat: int | None = 1,
) -> tuple[Trajectory, PyTree]:
    """A rollout, and of the policy's memory after each step what `keep` takes of it, with a leading axis of T.

    A policy without a memory has None.
    """

    def record(s, a, r, alive, memory):
        return s, a, r, alive, keep(memory)

    (s_T, alive_T), (s, a, r, alive, kept) = _scan(policy, task, s0, key, remat, record, w=w)
    return Trajectory(s, a, r, jnp.append(alive, alive_T), s_T), kept


def episode_return(
    policy: Any,
    task: Task,
    s0: State,
    key: PRNGKeyArray | None = None,
    *,
    remat: int | None = 1,
    adjoint: AdjointRule | None = None,
) -> Float[Array, ""]:
    """The weighted return J of one rollout, without keeping the trajectory.

    Its value is the same with any `adjoint`; its reverse-mode derivative is what that rule makes of each dJ/ds_t.
    """
    (s_T, alive_T), r = _scan(policy, task, s0, key, remat, lambda s, a, r, alive, memory: r, adjoint)
    return jnp.vdot(task.weights[:-1], r) + _terminal(task, s0, s_T, alive_T)


def mean_return(
    policy: Any, task: Task, s0: State, key: PRNGKeyArray | None = None, *, remat: int | None = 1
) -> Float[Array, ""]:
    """The mean return over a batch of start states `s0` [B, ...], each with a key (and weights, if any) of its own."""
    return jnp.mean(episode_returns(policy, task, s0, key, remat=remat))


def episode_returns(
    policy: Any,
    task: Task,
    s0: State,
    key: PRNGKeyArray | None = None,
    *,
    remat: int | None = 1,
    adjoint: AdjointRule | None = None,
) -> Float[Array, " B"]:
    """The return from each start state of a batch `s0` [B, ...].

    Raises: `ValueError` if the task's weights have a batch axis of another length.
    """

    def one(s, k, w):
        return episode_return(policy, reweighted(task, w), s, k, remat=remat, adjoint=adjoint)

    return jax.vmap(one, in_axes=(0, 0, weights_axis(task, s0)))(s0, split_keys(key, s0), task.weights)


def rollouts(
    policy: Any, task: Task, s0: State, key: PRNGKeyArray | None = None, *, remat: int | None = 1
) -> Trajectory:
    """A batch of rollouts from `s0` [B, ...]; every leaf has a leading batch axis."""
    return jax.vmap(lambda s, k: rollout(policy, task, s, k, remat=remat))(s0, split_keys(key, s0))


def returns(trajectory: Trajectory, task: Task) -> Float[Array, ""]:
    r"""$J = \sum_{t<T} w_t r_t + w_T \phi(s_T)$ of one trajectory."""
    s0 = jax.tree.map(lambda x: x[0], trajectory.s)
    terminal = _terminal(task, s0, trajectory.s_T, trajectory.alive[-1])
    return jnp.vdot(task.weights[:-1], trajectory.r) + terminal


def weights_axis(task: Task, s0: State) -> int | None:
    """Which axis of `task.weights` runs over the start states `s0` [B, ...]: None if all share them.

    Raises: `ValueError` if there is one of another length.
    """
    if task.weights.ndim == 1:
        return None
    batch = jax.tree.leaves(s0)[0].shape[0]
    if task.weights.shape[:-1] != (batch,):
        raise ValueError(
            f"task.weights must have shape [T+1] or [{batch}, T+1] for {batch} starts, got {list(task.weights.shape)}"
        )
    return 0


def split_keys(key: PRNGKeyArray | None, s0: State) -> Key[Array, " B"] | None:
    """One key per start state."""
    return None if key is None else jax.random.split(key, jax.tree.leaves(s0)[0].shape[0])


def _terminal(task: Task, s0: State, s_T: State, alive_T: Array) -> Array:
    if task.done is None:
        return task.weights[-1] * task.terminal(s_T)
    # A terminated state may be where phi is undefined, so phi is not evaluated on it: the start stands in.
    phi = task.terminal(where(alive_T, s_T, jax.lax.stop_gradient(s0)))
    return task.weights[-1] * jnp.where(alive_T, phi, jnp.zeros_like(phi))


@jax.custom_vjp
def _ruled(adjoint: Any, t: Array, s: State) -> State:
    """s itself, whose cotangent passes through `adjoint`."""
    return s


def _ruled_backward(residuals: Any, cotangent: State) -> tuple[None, None, State]:
    adjoint, t = residuals
    return None, None, adjoint(t, cotangent)


_ruled.defvjp(lambda adjoint, t, s: (s, (adjoint, t)), _ruled_backward)


def _scan(
    policy: Any,
    task: Task,
    s0: State,
    key: PRNGKeyArray | None,
    remat: int | None,
    record: Any,
    adjoint: Any = None,
    w: Any = None,
):
    _check(policy, task, s0, remat)
    step, plan = stepping(policy, task, s0, key, record, adjoint), policy if is_plan(policy) else None
    carry, out = _scan_remat(step, rollout_start(policy, task, s0), (jnp.arange(task.horizon), plan, w), remat)
    return carry[:2], out


def rollout_start(policy: Any, task: Task, s0: State) -> tuple[State, Bool[Array, ""], Any]:
    """What a rollout carries from step to step, at its start: the state, whether the episode goes on, the policy's memory."""
    alive = jnp.array(True) if task.done is None else ~task.done(s0)
    return s0, alive, policy.start(task) if is_stateful(policy) else None


def stepping(
    policy: Any, task: Task, s0: State, key: PRNGKeyArray | None, record: Any, adjoint: AdjointRule | None = None
) -> Callable[[Any, Any], tuple[Any, Any]]:
    """One step of a rollout from `s0`, for a scan over (t, the slice of a plan, what is added to the action).

    It takes and returns what `rollout_start` makes, and beside it what `record` makes of s, a, r, alive and the memory.
    """
    stateful, is_planned = is_stateful(policy), is_plan(policy)

    def step(carry, x):
        s, alive, memory = carry
        t, plan_t, w_t = x
        pi = plan_t if is_planned else policy
        s = s if adjoint is None else _ruled(adjoint, t, s)
        key_a, key_s = (None, None) if key is None else jax.random.split(jax.random.fold_in(key, t))
        held = s
        if task.done is not None:
            s = where(alive, s, s0)
        if stateful:
            a, memory = pi.step(memory, s, key=key_a)
            _check_action(a, task)
        else:
            a = pi(s, key=key_a)
        if w_t is not None:
            a = a + w_t
        with jax.default_matmul_precision("highest"):
            r = task.reward(s, a)
            s_next = task.dynamics(s, a, key=key_s)
        if task.done is None:
            return (s_next, alive, memory), record(s, a, r, alive, memory)
        s_next = where(alive, s_next, held)
        out = record(held, a, jnp.where(alive, r, jnp.zeros_like(r)), alive, memory)
        return (s_next, alive & ~task.done(s_next), memory), out

    return step


def _scan_remat(step: Any, carry: Any, xs: Any, remat: int | None) -> Any:
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


def _check(policy: Any, task: Task, s0: State, remat: int | None) -> None:
    """Shapes, once per trace: a wrong one would broadcast its way through the scan."""
    if remat is not None and (not isinstance(remat, int) or remat < 1):
        raise ValueError(f"remat must be None, 1 (each step) or a segment length, got {remat!r}")
    if is_plan(policy):
        lengths = {leaf.shape[0] for leaf in jax.tree.leaves(policy)}
        if lengths != {task.horizon}:
            raise ValueError(
                f"the plan has {sorted(lengths)} time steps; task '{task.name}' has a horizon of {task.horizon}"
            )
        policy = jax.tree.map(lambda x: x[0], policy)
    # A policy with a memory may be dear to trace: it is looked at when the scan traces it.
    a = task.a_low if is_stateful(policy) else jax.eval_shape(lambda s: policy(s), s0)
    _check_action(a, task)
    r, s_next = jax.eval_shape(lambda s, a: (task.reward(s, a), task.dynamics(s, a)), s0, a)
    if r.shape != ():
        raise ValueError(f"the reward of task '{task.name}' has shape {list(r.shape)}; expected a scalar")
    given, made = describe(s0), describe(s_next)
    if given != made:
        raise ValueError(f"the dynamics of task '{task.name}' map a state {given} to {made}; expected the same")


def _check_action(a: Any, task: Task) -> None:
    if a.shape != (task.m,):
        raise ValueError(
            f"the policy returned an action of shape {list(a.shape)}; task '{task.name}' takes [m] = [{task.m}]"
        )


def describe(s: State) -> str:
    """Structure, shapes and dtypes of a state, for comparison and for the error message."""
    leaves, tree = jax.tree.flatten(s)
    shapes = ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves)
    return shapes if len(leaves) == 1 else f"{tree} of {shapes}"
