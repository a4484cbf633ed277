"""What was not finite between two records of `learn`, by name: of which step of which episode, or of which update."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from diffmbrl.agents.collect import Collected
from diffmbrl.devices import to_local


def steps_named(fresh: Collected) -> list[str]:
    """For each seed that has any, the first value of its steps that is not finite, and the first step whose planner met one.

    Of one step the state is named before the action, the reward and the next state, which follow from it.
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


def update_named(carries: Any, spoilt: Bool[np.ndarray, "S leaves"], number: int) -> list[str]:
    """For each seed whose update was refused, the first leaf of its carry that had been finite and was not any more."""
    names = [jax.tree_util.keystr(path) for path, leaf in jax.tree_util.tree_leaves_with_path(carries) if _float(leaf)]
    rows = enumerate(spoilt)
    return [f"carry{names[int(np.argmax(row))]} in update {number}, seed {seed}" for seed, row in rows if row.any()]


def spoilt(before: Any, after: Any) -> Bool[Array, " leaves"]:
    """Which leaves of floats were finite and are not any more."""
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    found = [jnp.any(jnp.isfinite(x) & ~jnp.isfinite(y)) for x, y in pairs if _float(x)]
    return jnp.stack(found) if found else jnp.zeros(0, bool)


def _earliest(bad: np.ndarray) -> tuple[int, int]:
    """Of [N, k], the environment and the step that come first."""
    step = int(np.argmax(bad.any(axis=0)))
    return int(np.argmax(bad[:, step])), step


def _bad(tree: Any) -> np.ndarray:
    """[S, N, k]: whether any leaf has a value there that is not finite."""
    leaves = [np.asarray(x) for x in jax.tree.leaves(tree) if _float(x)]
    return np.any([~np.isfinite(x).reshape(*x.shape[:3], -1).all(-1) for x in leaves], axis=0)


def _float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)
