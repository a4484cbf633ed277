"""Find the first value that is not finite, by name and step."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from diffmbrl.core import Policy, State, Stateful, Task, Trajectory, is_plan
from diffmbrl.rollout import mean_return, rollouts


def locate(policy: Policy | Stateful, task: Task, s0: State, key: PRNGKeyArray | None = None) -> str:
    """Name the first non-finite tensor of the rollouts, with its time step and start; else the gradient's leaf.

    A state s[t] is named before the action and reward computed from it.

    Args:
        policy: The policy.
        task: The task.
        s0: Start states [B, ...], or one start state.
        key: The random key of the rollouts; None for no noise.

    Returns:
        The name, for a message.

    >>> import jax
    >>> from diffmbrl import Linear, tasks
    >>> task = tasks.lqr(horizon=5)
    >>> locate(Linear.zeros(task), task, jax.numpy.array([[1.0, 0.0], [jax.numpy.nan, 0.0]]))
    's[0] of start 1'
    """
    if jax.tree.leaves(s0)[0].ndim == jax.tree.leaves(task.state_shape)[0].ndim:
        s0 = jax.tree.map(lambda x: x[None], s0)
    if (found := named(jax.jit(rollouts)(policy, task, s0, key))) is not None:
        return "{}[{}] of start {}".format(*found)
    gradient = jax.jit(jax.grad(mean_return))(policy, task, s0, key)
    name = nonfinite_leaf(gradient)
    if name is not None:
        what = "plan" if is_plan(policy) else "policy"
        return f"dJ/dtheta in {what}{name}, though every state, action and reward of the rollouts is finite"
    return "the return of the objective in force, though the rollouts and the gradient of the full objective are finite"


def named(trajectories: Trajectory) -> tuple[str, int, int] | None:
    """The first tensor of trajectories [B, ...] that is not finite (s, a or r), its time step and its row, or None."""
    found = []
    for order, (name, tree) in enumerate(zip("sar", trajectories[:3], strict=True)):
        bad = _bad(tree)
        if bad.any():
            row, t = min(np.argwhere(bad), key=lambda place: place[1])
            found.append((int(t), order, name, int(row)))
    if found:
        t, _, name, row = min(found)
        return name, t, row
    last = _bad(jax.tree.map(lambda x: x[:, None], trajectories.s_T))[:, 0]
    return ("s", trajectories.r.shape[1], int(np.argmax(last))) if last.any() else None


def nonfinite_leaf(tree: PyTree, *, allow_infinite: bool = False) -> str | None:
    """The path of the first leaf with a value that is not finite (or is NaN, if infinities are allowed), or None."""
    test = jnp.isnan if allow_infinite else lambda x: ~jnp.isfinite(x)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(leaf.dtype, jnp.floating) and bool(jnp.any(test(leaf))):
            return jax.tree_util.keystr(path)
    return None


def _bad(tree: PyTree) -> np.ndarray:
    """Whether any leaf has a value that is not finite, shape [B, T]."""
    leaves = [np.asarray(x) for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return np.any([~np.isfinite(x).reshape(*x.shape[:2], -1).all(-1) for x in leaves], axis=0)
