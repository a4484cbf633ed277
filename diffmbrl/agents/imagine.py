"""The model as a simulator: steps of a policy in an ensemble, branching off real states."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from diffmbrl.core import Task
from diffmbrl.models.buffer import Buffer, Transition
from diffmbrl.models.ensemble import size
from diffmbrl.rollout import is_done, step_keys, transition


def imagine(
    policy: Any,
    task: Task,
    members: Any,
    buffer: Buffer,
    key: PRNGKeyArray,
    *,
    branches: int,
    steps: int,
    length: Int[Array, ""] | int,
) -> tuple[Transition, Bool[Array, "N steps"]]:
    """`steps` imagined steps in each of N branches, [N, steps], and which of them to keep.

    A branch starts at a real state of the buffer and goes on for `length` steps, or until the task is done; then the next one
    starts, so that all N * steps rows are of use whatever the length, which is traced: a schedule compiles nothing. Where the
    model's state, or the reward, is not finite the branch ends, and the row is not kept.

    N is `branches` divided evenly among the members of the ensemble, each of which is applied to its own share at once; a
    branch keeps its member (TS-infinity). Rewards and ends are the task's. Cost: N * steps rows of one member.
    Raises: `ValueError` if there are fewer branches than members; what `buffer.sample` raises.
    Reference: Janner et al. 2019, When to trust your model, section 4.3.
    """
    E = size(members)
    if branches < E:
        raise ValueError(f"branches must be at least one for each of {E} members, got {branches}")
    N = branches // E * E

    def apply(s, a, key):
        """Reward and next state of each row, each member of the ensemble on its share of the rows."""

        def share(x):
            return x.reshape(E, N // E, *x.shape[1:])

        def one(member, s, a, keys):
            model = eqx.tree_at(lambda t: t.dynamics, task, member)
            return jax.vmap(lambda s, a, k: transition(model, s, a, k))(s, a, keys)

        out = jax.vmap(one)(members, jax.tree.map(share, s), share(a), share(jax.random.split(key, N)))
        return jax.tree.map(lambda x: x.reshape(N, *x.shape[2:]), out)

    def step(carry, t):
        s, age = carry
        key_a, key_s, key_start = step_keys(key_steps, t, 3)
        a = jax.vmap(lambda s, k: policy(s, key=k))(s, jax.random.split(key_a, N))
        r, s_next = apply(s, a, key_s)
        done = jax.vmap(lambda s: is_done(task, s))(s_next)
        keep = finite_rows((s, a, r, s_next), N)
        last = done | (age + 1 >= length) | ~keep
        again = buffer.sample(key_start, N).s
        s_after = jax.tree.map(lambda x, y: jnp.where(_like(last, x), x, y), again, s_next)
        return (s_after, jnp.where(last, 0, age + 1)), (Transition(s, a, r, s_next, done, last), keep)

    key_start, key_steps = jax.random.split(key)
    start = (buffer.sample(key_start, N).s, jnp.zeros(N, jnp.int32))
    _, out = jax.lax.scan(step, start, jnp.arange(steps))
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), out)


def finite_rows(tree: Any, N: int) -> Bool[Array, " N"]:
    """Which of N rows are finite in every leaf."""
    leaves = [x.reshape(N, -1) for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.isfinite(jnp.concatenate(leaves, axis=1)), axis=1)


def _like(condition: Array, x: Array) -> Array:
    return condition.reshape(-1, *[1] * (x.ndim - 1))
