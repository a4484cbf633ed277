r"""Networks of bounded slope: after each update every weight matrix is scaled back to $\|W\|_2 \le c$.

The rule that trains the weights enforces the bound, so it applies to any network and rollouts cost nothing more. With
activations of slope at most 1 between them, L such layers have a slope of at most $c^L$ in their normalised inputs.
Reference: Miyato et al. 2018, section 2.1 (the power iteration); Gouk et al. 2021, section 4 (the projection).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree


class BoundedState(NamedTuple):
    """State of the inner rule, and for each matrix an estimate of its leading right singular vector."""

    inner: optax.OptState
    directions: PyTree


def bounded_spectrum(
    inner: Callable[..., optax.GradientTransformation] = optax.adam,
    *,
    bound: Float[Array, ""] | float = 1.0,
    iterations: int = 2,
    **arguments: Any,
) -> optax.GradientTransformation:
    """Project every weight matrix onto spectral norm at most `bound` after each step of an optax rule.

    Args:
        inner: Constructor of an optax rule.
        bound: Largest spectral norm c of a weight matrix.
        iterations: Steps of power iteration per update; they continue from one update to the next.
        **arguments: Arguments of `inner`.

    Returns:
        The rule, for example `Training(bounded_spectrum, bound=1.0, learning_rate=1e-3)`.

    Raises:
        ValueError: If `iterations` is below 1.

    >>> W = {"W": 3.0 * jnp.eye(2)}
    >>> rule = bounded_spectrum(optax.sgd, learning_rate=0.1)
    >>> change, _ = rule.update(jax.tree.map(jnp.zeros_like, W), rule.init(W), W)
    >>> (W["W"] + change["W"]).round(4).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    rule = optax.with_extra_args_support(inner(**arguments))

    def init(params: PyTree) -> BoundedState:
        drawn = jax.tree.map(lambda W: jax.random.normal(jax.random.key(0), W.shape[-1:], W.dtype), params)
        found = jax.tree.map(lambda W, v: power(W, v, 30)[1] if W.ndim == 2 else v, params, drawn)
        return BoundedState(rule.init(params), found)

    def update(updates: PyTree, state: Any, params: Any = None, **extra: Any) -> tuple[Any, BoundedState]:
        change, inner_state = rule.update(updates, state.inner, params, **extra)
        leaves, tree = jax.tree.flatten(params)
        changes, directions = [], []
        for W, u, v in zip(leaves, jax.tree.leaves(change), jax.tree.leaves(state.directions), strict=True):
            if W.ndim == 2:
                norm, v = power(W + u, v, iterations)
                u = (W + u) * jnp.minimum(jnp.asarray(bound, W.dtype) / norm, 1) - W
            changes.append(u)
            directions.append(v)
        return tree.unflatten(changes), BoundedState(inner_state, tree.unflatten(directions))

    return optax.GradientTransformationExtraArgs(init, update)


def power(W: Float[Array, "out in"], v: Float[Array, " in"], steps: int) -> tuple[Array, Float[Array, " in"]]:
    """Return a lower estimate of the largest singular value of W and its right singular vector, by power iteration from v."""
    tiny = jnp.finfo(W.dtype).tiny
    norm = jnp.zeros((), W.dtype)
    for _ in range(steps):
        u = W @ v
        v = W.T @ (u / jnp.maximum(jnp.linalg.norm(u), tiny))
        norm = jnp.linalg.norm(v)
        v = v / jnp.maximum(norm, tiny)
    return jnp.maximum(norm, tiny), v
