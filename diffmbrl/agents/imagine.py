"""The learned model as a simulator: steps of a policy in an ensemble, which start at real states."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray, PyTree

from diffmbrl.core import Policy, Task
from diffmbrl.models.buffer import Buffer, Transition
from diffmbrl.models.ensemble import size
from diffmbrl.rollout import is_done, transition


def imagine(
    policy: Policy,
    task: Task,
    members: PyTree,
    buffer: Buffer,
    key: PRNGKeyArray,
    *,
    branches: int,
    steps: int,
    length: Int[Array, ""] | int,
) -> tuple[Transition, Bool[Array, "N steps"]]:
    """Follow a policy in the learned model from real states of the buffer.

    N, the number of branches, is `branches` rounded down to a multiple of the number of members; every member advances its own
    share of the branches (TS-infinity). A branch ends after `length` steps, when the task is done, or if a state or reward is
    not finite; the next branch begins at once, so that all N * steps rows are used whatever the length.

    Args:
        policy: The policy.
        task: The task, whose reward and end are used.
        members: Ensemble of dynamics with a leading axis of E.
        buffer: Real transitions, whose states the branches start at.
        key: Key of all draws.
        branches: Number of branches, at least E.
        steps: Number of steps of each branch.
        length: Steps after which a branch begins again; may be traced, so a schedule compiles once.

    Returns:
        The transitions, shape [N, steps], and whether each is finite and thus usable.

    Raises:
        ValueError: If there are fewer branches than members; as `buffer.sample`.

    Cost: N * steps evaluations of one member.
    Reference: Janner et al. 2019, When to trust your model, section 4.3.
    """
    E = size(members)
    if branches < E:
        raise ValueError(f"branches must be at least one for each of {E} members, got {branches}")
    N = branches // E * E

    def model(s, a, *, key):
        """The next state of each row, by the member of the ensemble whose share the row is in."""

        def share(x):
            return x.reshape(E, N // E, *x.shape[1:])

        def apply(f, s, a, keys):
            return jax.vmap(lambda s, a, k: f(s, a, key=k))(s, a, keys)

        s_next = jax.vmap(apply)(members, jax.tree.map(share, s), share(a), share(jax.random.split(key, N)))
        return jax.tree.map(lambda x: x.reshape(N, *x.shape[2:]), s_next)

    rows = eqx.tree_at(lambda t: (t.dynamics, t.reward), task, (model, jax.vmap(task.reward)))

    def step(carry, key):
        s, age = carry
        key_a, key_s, key_start = jax.random.split(key, 3)
        a = jax.vmap(lambda s, k: policy(s, key=k))(s, jax.random.split(key_a, N))
        r, s_next = transition(rows, s, a, key_s)
        done = jax.vmap(lambda s: is_done(task, s))(s_next)
        keep = finite_rows((s, a, r, s_next), N)
        last = done | (age + 1 >= length) | ~keep
        again = buffer.sample(key_start, N).s
        s_after = jax.tree.map(lambda x, y: jnp.where(_like(last, x), x, y), again, s_next)
        return (s_after, jnp.where(last, 0, age + 1)), (Transition(s, a, r, s_next, done, last), keep)

    key_start, key_steps = jax.random.split(key)
    start = (buffer.sample(key_start, N).s, jnp.zeros(N, jnp.int32))
    _, out = jax.lax.scan(step, start, jax.random.split(key_steps, steps))
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), out)


def finite_rows(tree: PyTree, N: int) -> Bool[Array, " N"]:
    """Whether each of N rows is finite in every leaf."""
    leaves = [x.reshape(N, -1) for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.isfinite(jnp.concatenate(leaves, axis=1)), axis=1)


def _like(condition: Array, x: Array) -> Array:
    return condition.reshape(-1, *[1] * (x.ndim - 1))
