r"""SOAP as an optax rule: Adam in the eigenbasis of Shampoo's factors. Neither optax nor a maintained library has it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PyTree

from diffmbrl.core import cond_once

Square = Float[Array, "_ _"]
Sides = tuple[Square | None, ...]  # one matrix for each axis of a leaf; None for an axis that is not rotated


class SoapState(NamedTuple):
    """Moments of the gradient, and a factor and a basis for every axis of every leaf.

    Args:
        updates: Number of updates made.
        mean: M, like the parameters.
        square: V, like the parameters, in the rotated coordinates.
        factors: L and R of each leaf, leaves in the order of `jax.tree.leaves`.
        bases: Q_L and Q_R of each leaf.
    """

    updates: Int[Array, ""]
    mean: PyTree
    square: PyTree
    factors: tuple[Sides, ...]
    bases: tuple[Sides, ...]


def soap(learning_rate: optax.ScalarOrSchedule, **options: Any) -> optax.GradientTransformation:
    """SOAP: `scale_by_soap` times minus the learning rate.

    Args:
        learning_rate: Learning rate, or optax's schedule of it.
        **options: Options of `scale_by_soap`.

    Returns:
        The rule.

    >>> import jax
    >>> from diffmbrl import OptaxSolver, Neural, solve, tasks
    >>> task = tasks.cartpole_balance(horizon=20)
    >>> key = jax.random.key(0)
    >>> solver = OptaxSolver(soap, learning_rate=1e-2, every=5)
    >>> policy, history = solve(solver, Neural.init(task, key=key), task, task.starts(key, 8), key, steps=5)
    >>> bool(history.info.J[-1] > history.info.J[0])
    True
    """
    return optax.chain(scale_by_soap(**options), optax.scale_by_learning_rate(learning_rate))


def scale_by_soap(
    *,
    b1: ArrayLike = 0.95,
    b2: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    every: int = 10,
    largest: int = 1024,
) -> optax.GradientTransformation:
    r"""Scale a gradient by Adam's rule in the eigenbasis of Shampoo's factors.

    For a matrix with gradient G the step is $Q_L \big( Q_L^\top M Q_R / (\sqrt V + \epsilon) \big) Q_R^\top$, where

    $$M \leftarrow \beta_1 M + (1 - \beta_1) G,\quad V \leftarrow \beta_2 V + (1 - \beta_2) (Q_L^\top G Q_R)^2,$$
    $$L \leftarrow \beta_2 L + (1 - \beta_2) G G^\top,\quad R \leftarrow \beta_2 R + (1 - \beta_2) G^\top G,$$

    with Adam's corrections of the bias of M and V. $Q_L$ and $Q_R$ are the eigenvectors of L and R: first by an
    eigendecomposition, later by one power iteration $Q \leftarrow \mathrm{qr}(L Q)$ at every `every`-th update. A tensor has a
    factor for each of its axes; vectors follow Adam's rule. Unlike in the paper, the factors include a gradient before its
    step, so that the first step has a basis.

    Args:
        b1: Decay of the mean.
        b2: Decay of the squares and of the factors.
        eps: Added to the root of the squares.
        every: Number of updates between two power iterations.
        largest: Longest axis that is rotated.

    Returns:
        The rule.

    Raises:
        ValueError: If `every` is below 1.

    Cost: For a matrix, 6 products with a square matrix; at every `every`-th update a QR of each factor.
    Reference: Vyas et al. 2024, SOAP: improving and stabilizing Shampoo using Adam, algorithm 3.
    """
    if every < 1:
        raise ValueError(f"every must be at least 1 update, got {every}")

    def init(params: PyTree) -> SoapState:
        def sides(x: Array, of: Callable[..., Array]) -> Sides:
            return tuple(of(d, dtype=x.dtype) if x.ndim > 1 and 1 < d <= largest else None for d in x.shape)

        leaves = jax.tree.leaves(params)
        mean, square = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        factors = tuple(sides(x, lambda d, dtype: jnp.zeros((d, d), dtype)) for x in leaves)
        return SoapState(jnp.zeros((), jnp.int32), mean, square, factors, tuple(sides(x, jnp.eye) for x in leaves))

    def update(updates: PyTree, state: SoapState, params: PyTree | None = None) -> tuple[PyTree, SoapState]:
        gradients, structure = jax.tree.flatten(updates)

        def averaged(G: Array, sides: Sides) -> Sides:
            beta = jnp.asarray(b2, G.dtype)
            return tuple(None if F is None else beta * F + (1 - beta) * _outer(G, i) for i, F in enumerate(sides))

        factors = tuple(averaged(G, sides) for G, sides in zip(gradients, state.factors, strict=True))
        bases = _refresh(state.updates, state.bases, factors, every)
        count = state.updates + 1

        def one(G, M, V, Q):
            beta_1, beta_2, n = (jnp.asarray(x, G.dtype) for x in (b1, b2, count))
            M = beta_1 * M + (1 - beta_1) * G
            V = beta_2 * V + (1 - beta_2) * _rotate(G, Q) ** 2
            size = V / (1 - beta_2**n)
            # The first gradient is diagonal in its own eigenbasis up to rounding, which must not become steps of full length.
            rounding = 100 * jnp.finfo(G.dtype).eps * jnp.sqrt(jnp.sum(size)) if any(x is not None for x in Q) else 0.0
            scaled = (_rotate(M, Q) / (1 - beta_1**n)) / (jnp.sqrt(size) + rounding + jnp.asarray(eps, G.dtype))
            return _rotate(scaled, Q, back=True), M, V

        moments = zip(gradients, jax.tree.leaves(state.mean), jax.tree.leaves(state.square), bases, strict=True)
        steps, mean, square = (jax.tree.unflatten(structure, x) for x in zip(*(one(*x) for x in moments), strict=True))
        return steps, SoapState(count, mean, square, factors, bases)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]  (optax's own are as wide)


def _outer(G: Array, axis: int) -> Square:
    """G G' of the matrix with this axis as its rows and all others as its columns."""
    rows = jnp.moveaxis(G, axis, 0).reshape(G.shape[axis], -1)
    return jnp.matmul(rows, rows.T, precision="highest")


def _rotate(x: Array, Q: Sides, *, back: bool = False) -> Array:
    """Multiply by Q' along every axis that has a basis, or by Q on the way back."""
    for axis, basis in enumerate(Q):
        if basis is not None:
            turned = jnp.tensordot(basis, x, axes=(1 if back else 0, axis), precision="highest")
            x = jnp.moveaxis(turned, 0, axis)
    return x


def _refresh(
    updates: Int[Array, ""], bases: tuple[Sides, ...], factors: tuple[Sides, ...], every: int
) -> tuple[Sides, ...]:
    """Compute the factors' eigenvectors before the first step, and improve them by a power iteration at every `every`-th."""

    def if_due(due: Array, bases: tuple[Sides, ...], better: Callable[[Square, Square], Square]) -> tuple[Sides, ...]:
        def turn(bases):
            flat, structure = jax.tree.flatten(bases)
            out, last = [], jnp.zeros(())
            for Q, F in zip(flat, jax.tree.leaves(factors), strict=True):
                # 0 times the last result makes each wait for the one before: on a CPU two batched decompositions at once can
                # hold the threads that the other needs, and deadlock.
                out.append(better(Q, F + 0 * last.astype(F.dtype)))
                last = out[-1][0, 0]
            return jax.tree.unflatten(structure, out)

        return cond_once(due, turn, bases)

    bases = if_due(updates == 0, bases, lambda Q, F: jnp.linalg.eigh(F)[1])
    later = (updates > 0) & (updates % every == 0)
    return if_due(later, bases, lambda Q, F: jnp.linalg.qr(jnp.matmul(F, Q, precision="highest"))[0])
