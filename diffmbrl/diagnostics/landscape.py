r"""Slices of the return through a policy's parameters: $J(\theta + \alpha d)$ and $J(\theta + \alpha d + \beta e)$.

The sharpness of a slice along a random direction depends on the scaling of the network's layers, though the function does not.
Each filter of a direction (the weights into one unit) is therefore scaled to the length of the policy's own filter, so that
alpha is a relative change of the weights, the same in each unit.

Reference: Li, Xu, Taylor, Studer and Goldstein 2018, section 4 (filter normalisation).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from diffmbrl.core import Policy, State, Stateful, Task
from diffmbrl.rollout import episode_returns

CHUNK = 64  # points of a slice evaluated at once


def filter_normalised(policy: Policy | Stateful, key: PRNGKeyArray) -> PyTree:
    r"""A random direction in parameter space, normalised filter by filter: $d \leftarrow d\,|\theta|/|d|$.

    A filter is a row of a matrix (the weights into one unit, [out, in]; the actions of one time step of a plan), or a whole
    vector (the biases of a layer). A filter that is zero in the policy is zero in the direction.

    Args:
        policy: The policy at the centre of the slice.
        key: Key of the random direction.

    Returns:
        A pytree like the policy.

    >>> import jax
    >>> from diffmbrl import Neural, tasks
    >>> policy = Neural.init(tasks.pendulum(), key=jax.random.key(0))
    >>> d = filter_normalised(policy, jax.random.key(1))
    >>> bool(jax.numpy.allclose((d.net.weights[0] ** 2).sum(1), (policy.net.weights[0] ** 2).sum(1)))
    True
    """
    leaves, tree = jax.tree.flatten(policy)

    def one(leaf, key):
        d = jax.random.normal(key, leaf.shape, leaf.dtype)
        axes = tuple(range(1, leaf.ndim)) if leaf.ndim > 1 else None
        own, drawn = (jnp.sqrt(jnp.sum(jnp.square(x), axis=axes, keepdims=True)) for x in (leaf, d))
        return d * (own / drawn)

    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(tree, [one(leaf, k) for leaf, k in zip(leaves, keys, strict=True)])


def landscape_line(
    policy: Policy | Stateful,
    task: Task,
    s0: State,
    direction: PyTree,
    alphas: Float[Array, " k"],
    key: PRNGKeyArray | None = None,
    *,
    chunk: int = CHUNK,
) -> Float[Array, "k B"]:
    r"""Returns along a line through the policy's parameters, $J(\theta + \alpha d)$.

    Args:
        policy: The policy at alpha = 0.
        task: The task.
        s0: Start states, shape [B, ...].
        direction: The direction d, a pytree like the policy, such as `filter_normalised` makes.
        alphas: The points, shape [k].
        key: Key of the rollouts' noise, the same at all points; None for no noise.
        chunk: Number of points evaluated at once; memory grows with chunk times B.

    Returns:
        The return from each start at each point, shape [k, B]; the mean over starts is J.

    Raises:
        ValueError: If the direction is not like the policy, or `chunk` is below 1.

    >>> import jax, jax.numpy as jnp
    >>> from diffmbrl import Linear, tasks
    >>> task = tasks.lqr(horizon=10)
    >>> policy = Linear(jnp.array([[-1.0, -1.0]]), jnp.zeros(1))
    >>> d = filter_normalised(policy, jax.random.key(0))
    >>> landscape_line(policy, task, task.starts(jax.random.key(1), 4), d, jnp.linspace(-1, 1, 21)).shape
    (21, 4)
    """
    return _slice(policy, task, s0, (direction,), alphas[:, None], key, chunk)


def landscape_plane(
    policy: Policy | Stateful,
    task: Task,
    s0: State,
    directions: tuple[PyTree, PyTree],
    alphas: Float[Array, " k"],
    betas: Float[Array, " l"],
    key: PRNGKeyArray | None = None,
    *,
    chunk: int = CHUNK,
) -> Float[Array, "k l B"]:
    r"""Returns on a plane through the policy's parameters, $J(\theta + \alpha d + \beta e)$.

    Args:
        policy: The policy at the centre.
        task: The task.
        s0: Start states, shape [B, ...].
        directions: The directions d and e, pytrees like the policy.
        alphas: The points along d, shape [k].
        betas: The points along e, shape [l].
        key: As in `landscape_line`.
        chunk: As in `landscape_line`.

    Returns:
        The return from each start at each pair of points, shape [k, l, B].

    Raises:
        ValueError: As `landscape_line`.
    """
    grid = jnp.stack(jnp.meshgrid(alphas, betas, indexing="ij"), axis=-1)
    out = _slice(policy, task, s0, directions, grid.reshape(-1, 2), key, chunk)
    return out.reshape(*grid.shape[:2], -1)


def _slice(
    policy: Policy | Stateful,
    task: Task,
    s0: State,
    directions: tuple[PyTree, ...],
    points: Float[Array, "k d"],
    key: PRNGKeyArray | None,
    chunk: int,
) -> Float[Array, "k B"]:
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 point, got {chunk}")
    for direction in directions:
        if _shapes(direction) != _shapes(policy):
            raise ValueError(f"a direction must be like the policy, {_shapes(policy)}; got {_shapes(direction)}")

    def at(point):
        def moved(theta, *d):
            return theta + sum(x * by.astype(theta.dtype) for x, by in zip(d, point, strict=True))

        return episode_returns(jax.tree.map(moved, policy, *directions), task, s0, key)

    return jax.lax.map(at, points, batch_size=min(chunk, len(points)))


def _shapes(tree: PyTree) -> str:
    leaves = ((jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree))
    return ", ".join(f"{path} {list(np.shape(leaf))}" for path, leaf in leaves)
