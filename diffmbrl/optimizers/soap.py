r"""SOAP as an optax rule: Adam in the eigenbasis of Shampoo's factors. Optax has none, nor any library that is kept."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from diffmbrl.core import cond_once

Square = Float[Array, "_ _"]
Sides = tuple[Square | None, ...]  # one matrix for each axis of a leaf; None for an axis that is not rotated


class SoapState(NamedTuple):
    """Moments of the gradient, and for every axis of every leaf the factor and the basis it is rotated into."""

    updates: Int[Array, ""]
    mean: Any  # M, like the parameters
    square: Any  # V, like the parameters, in the rotated coordinates
    factors: tuple[Sides, ...]  # L, R of each leaf, leaves in the order of `jax.tree.leaves`
    bases: tuple[Sides, ...]  # Q_L, Q_R


def soap(learning_rate: Any, **options: Any) -> optax.GradientTransformation:
    """`scale_by_soap` times minus the learning rate.

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
    *, b1: Any = 0.95, b2: Any = 0.95, eps: Any = 1e-8, every: int = 10, largest: int = 1024
) -> optax.GradientTransformation:
    r"""For a matrix with gradient G, $Q_L \big( Q_L^\top M Q_R / (\sqrt V + \epsilon) \big) Q_R^\top$, where

    $$M \leftarrow \beta_1 M + (1 - \beta_1) G,\quad V \leftarrow \beta_2 V + (1 - \beta_2) (Q_L^\top G Q_R)^2,$$
    $$L \leftarrow \beta_2 L + (1 - \beta_2) G G^\top,\quad R \leftarrow \beta_2 R + (1 - \beta_2) G^\top G,$$

    with Adam's corrections of the bias of M and V. $Q_L$ and $Q_R$ have the eigenvectors of L and R: of the first gradient's by
    an eigendecomposition, and from then on one power iteration $Q \leftarrow \mathrm{qr}(L Q)$ at every `every`-th update. A
    tensor has such a factor for each of its axes; vectors are left to Adam, and so is an axis longer than `largest`.

    The factors take in a gradient before the step that it makes, not after it as in the paper: so the first step has a basis.

    Shapes: any. Cost: for [m, n], 6 products of it with a square matrix; every `every` updates a QR of each factor.
    Raises: `ValueError` if `every` is below 1.
    Reference: Vyas et al. 2024, SOAP: improving and stabilizing Shampoo using Adam, algorithm 3.
    """
    if every < 1:
        raise ValueError(f"every must be at least 1 update, got {every}")

    def init(params: Any) -> SoapState:
        def sides(x: Array, of: Callable[..., Array]) -> Sides:
            return tuple(of(d, dtype=x.dtype) if x.ndim > 1 and 1 < d <= largest else None for d in x.shape)

        leaves = jax.tree.leaves(params)
        mean, square = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        factors = tuple(sides(x, lambda d, dtype: jnp.zeros((d, d), dtype)) for x in leaves)
        return SoapState(jnp.zeros((), jnp.int32), mean, square, factors, tuple(sides(x, jnp.eye) for x in leaves))

    def update(updates: Any, state: SoapState, params: Any = None) -> tuple[Any, SoapState]:
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
            # The first gradient is diagonal in its own eigenbasis, up to rounding, which must not become steps of full length.
            rounding = 100 * jnp.finfo(G.dtype).eps * jnp.sqrt(jnp.sum(size)) if any(x is not None for x in Q) else 0.0
            scaled = (_rotate(M, Q) / (1 - beta_1**n)) / (jnp.sqrt(size) + rounding + jnp.asarray(eps, G.dtype))
            return _rotate(scaled, Q, back=True), M, V

        moments = zip(gradients, jax.tree.leaves(state.mean), jax.tree.leaves(state.square), bases, strict=True)
        steps, mean, square = (jax.tree.unflatten(structure, x) for x in zip(*(one(*x) for x in moments), strict=True))
        return steps, SoapState(count, mean, square, factors, bases)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]  (optax's own are as wide)


def _outer(G: Array, axis: int) -> Square:
    """G G' of the matrix that has this axis for its rows and all others for its columns."""
    rows = jnp.moveaxis(G, axis, 0).reshape(G.shape[axis], -1)
    return jnp.matmul(rows, rows.T, precision="highest")


def _rotate(x: Array, Q: Sides, *, back: bool = False) -> Array:
    """Q' along every axis that has a basis; Q itself on the way back."""
    for axis, basis in enumerate(Q):
        if basis is not None:
            turned = jnp.tensordot(basis, x, axes=(1 if back else 0, axis), precision="highest")
            x = jnp.moveaxis(turned, 0, axis)
    return x


def _refresh(
    updates: Int[Array, ""], bases: tuple[Sides, ...], factors: tuple[Sides, ...], every: int
) -> tuple[Sides, ...]:
    """Eigenvectors of the factors before the first step; after it, when their turn has come, one power iteration nearer."""

    def if_due(due: Array, bases: tuple[Sides, ...], better: Callable[[Square, Square], Square]) -> tuple[Sides, ...]:
        def turn(bases):
            flat, structure = jax.tree.flatten(bases)
            out, last = [], jnp.zeros(())
            for Q, F in zip(flat, jax.tree.leaves(factors), strict=True):
                # 0 times the last result makes one wait for another: two batched decompositions at once can each hold the
                # threads that the other needs, on a CPU, for ever.
                out.append(better(Q, F + 0 * last.astype(F.dtype)))
                last = out[-1][0, 0]
            return jax.tree.unflatten(structure, out)

        return cond_once(due, turn, bases)

    bases = if_due(updates == 0, bases, lambda Q, F: jnp.linalg.eigh(F)[1])
    later = (updates > 0) & (updates % every == 0)
    return if_due(later, bases, lambda Q, F: jnp.linalg.qr(jnp.matmul(F, Q, precision="highest"))[0])
