"""Names of the non-finite values between two records of `learn`: which step of which episode, or which update."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from diffmbrl.agents.collect import Collected
from diffmbrl.devices import to_local


def steps_named(fresh: Collected) -> list[str]:
    """Name the first non-finite value of each seed's steps, and the first step whose planner met one.

    Within a step the state is named before the action, the reward and the next state, which depend on it.

    Args:
        fresh: The steps, with leading axes [S, N, k].

    Returns:
        A line for each; none for a seed without any.
    """
    out = []
    episode, t, doubts = (np.asarray(to_local(x)) for x in (fresh.episode, fresh.t, fresh.met))
    steps = to_local(fresh.steps)
    bad = np.stack([_bad(x) for x in (steps.s, steps.a, steps.r, steps.s_next)])  # [4, S, N, k]
    for seed in range(t.shape[0]):
        if bad[:, seed].any():
            at = (seed, *_earliest(np.any(bad[:, seed], axis=0, keepdims=True)[0]))
            order = int(np.argmax(bad[(slice(None), *at)]))
            out.append(f"{'sars'[order]}[{t[at] + (order == 3)}] of episode {episode[at]}, seed {seed}")
        if doubts[seed].any():
            at = (seed, *_earliest(doubts[seed] > 0))
            out.append(f"a rollout of the planner's at step {t[at]} of episode {episode[at]}, seed {seed}")
    return out


def update_named(carries: PyTree, nonfinite: Bool[np.ndarray, "S leaves"], number: int) -> list[str]:
    """Name the first leaf of each seed's carry that an update made non-finite.

    Args:
        carries: The carries, which give the leaves their names.
        nonfinite: The results of `became_nonfinite`, shape [S, leaves].
        number: The number of the update.

    Returns:
        A line for each seed whose update was refused.
    """
    names = [jax.tree_util.keystr(path) for path, leaf in jax.tree_util.tree_leaves_with_path(carries) if _float(leaf)]
    rows = enumerate(nonfinite)
    return [f"carry{names[int(np.argmax(row))]} in update {number}, seed {seed}" for seed, row in rows if row.any()]


def became_nonfinite(before: PyTree, after: PyTree) -> Bool[Array, " leaves"]:
    """Which leaves of floats have a value that was finite before and is not after."""
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    found = [jnp.any(jnp.isfinite(x) & ~jnp.isfinite(y)) for x, y in pairs if _float(x)]
    return jnp.stack(found) if found else jnp.zeros(0, bool)


def _earliest(bad: np.ndarray) -> tuple[int, int]:
    """The environment and the step of the first true value of [N, k]."""
    step = int(np.argmax(bad.any(axis=0)))
    return int(np.argmax(bad[:, step])), step


def _bad(tree: PyTree) -> np.ndarray:
    """Whether any leaf has a non-finite value, shape [S, N, k]."""
    leaves = [np.asarray(x) for x in jax.tree.leaves(tree) if _float(x)]
    return np.any([~np.isfinite(x).reshape(*x.shape[:3], -1).all(-1) for x in leaves], axis=0)


def _float(leaf: Array | np.ndarray) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)
