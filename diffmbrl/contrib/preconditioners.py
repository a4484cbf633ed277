r"""Approximations P of the Gauss-Newton matrix N, by its diagonal or blocks, for Krylov methods in the metric of P.

In the coordinates $y = P^{1/2} d$ the operator is $P^{-1/2} N P^{-1/2}$ and the gradient $P^{-1/2} g$: its Krylov space of
dimension k gives the steps $-(N + \lambda P)^{-1} g$, for every damping as before. If P has the scales of N, fewer products do.

A maker (`Jacobi`, `SignedJacobi`, `LeafBlocks`, `Kronecker`) is called with the quadratic model and returns a `systems.Metric`.
`ridge` times the mean eigenvalue is added to every P, without which directions of no curvature would be all that counts.

Measured (benchmarks/results/preconditioning.json: `cartpole-balance`, 385 parameters, 64 starts, 10 products). The undamped
model falls much faster in the metric of the leaves' blocks (.97 of what can be had against .63 without at the start of a
run, .69 against .03 at its end), a little faster in those of the factors and the diagonal. It helps where the model is
right that far, at the end of a run: the best true improvement of the path of dampings is .0011 of the return without, .0027
with the diagonal and .0042 with the blocks. At the start, where it is wrong, it hurts: .071, .060 and .012. So it is an
option, not the default.

Reference: Chapelle and Erhan 2011; Martens 2010, section 4.7 (the power of the diagonal); Martens and Grosse 2015.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray

from diffmbrl.contrib.blocks import diagonal, kronecker_factors, leaf_blocks, signed_diagonal
from diffmbrl.core import Task, as_float
from diffmbrl.optimizers.systems import Preconditioner
from diffmbrl.second_order.curvature import CurvatureModel, Vector
from diffmbrl.second_order.krylov import Spectral, lanczos


class Diagonal(NamedTuple):
    """P by its diagonal, positive."""

    values: Vector

    def inverse(self, v: Vector) -> Vector:
        return v / self.values

    def root(self, v: Vector) -> Vector:
        return v / jnp.sqrt(self.values)


class Block(NamedTuple):
    """P by its eigenvectors, the columns, and eigenvalues, positive."""

    vectors: Float[Array, "k k"]
    values: Float[Array, " k"]

    def inverse(self, v: Float[Array, " k"]) -> Float[Array, " k"]:
        return _matmul(self.vectors, _matmul(self.vectors.T, v) / self.values)

    def root(self, v: Float[Array, " k"]) -> Float[Array, " k"]:
        return _matmul(self.vectors, _matmul(self.vectors.T, v) / jnp.sqrt(self.values))


class Blocks(NamedTuple):
    """P by blocks along its diagonal."""

    parts: tuple[Block | Diagonal, ...]

    def inverse(self, v: Vector) -> Vector:
        return self._each(v, lambda part, x: part.inverse(x))

    def root(self, v: Vector) -> Vector:
        return self._each(v, lambda part, x: part.root(x))

    def _each(self, v: Vector, act: Callable) -> Vector:
        out, first = [], 0
        for part in self.parts:
            last = first + part.values.size
            out.append(act(part, v[first:last]))
            first = last
        return jnp.concatenate(out)


class Layer(NamedTuple):
    """One layer's part of P: eigenvectors of both factors, and the eigenvalues of their product, positive."""

    outputs: Float[Array, "o o"]
    inputs: Float[Array, "i i"]
    values: Float[Array, "o i"]


class Factored(NamedTuple):
    """P by Kronecker factors for each layer of a `Neural` policy."""

    layers: tuple[Layer, ...]
    unravel: Callable[[Vector], Any]

    def inverse(self, v: Vector) -> Vector:
        return self._each(v, lambda x, values: x / values)

    def root(self, v: Vector) -> Vector:
        return self._each(v, lambda x, values: x / jnp.sqrt(values))

    def _each(self, v: Vector, act: Callable) -> Vector:
        policy = self.unravel(v)
        weights, biases = [], []
        for layer, W, b in zip(self.layers, policy.net.weights, policy.net.biases, strict=True):
            x = jnp.concatenate([W, b[:, None]], axis=1)
            x = _matmul(layer.outputs.T, _matmul(x, layer.inputs))
            x = _matmul(layer.outputs, _matmul(act(x, layer.values), layer.inputs.T))
            weights.append(x[:, :-1])
            biases.append(x[:, -1])
        net = (tuple(weights), tuple(biases))
        return ravel_pytree(eqx.tree_at(lambda p: (p.net.weights, p.net.biases), policy, net))[0]


# What makes them of a model: hyperparameters, and one pass over time (all signs at once).


class Jacobi(eqx.Module):
    r"""The exact diagonal to a power: $P = (D + \epsilon \bar D)^\xi$.

    >>> import jax
    >>> from diffmbrl import Linear, tasks
    >>> from diffmbrl.second_order.curvature import gauss_newton
    >>> task = tasks.lqr(horizon=3)
    >>> policy, s0 = Linear.zeros(task), task.starts(jax.random.key(0), 2)
    >>> P = jax.jit(lambda policy: Jacobi()(gauss_newton(policy, task, s0), policy, task, None))(policy)
    >>> P.inverse(P.values).tolist()
    [1.0, 1.0, 1.0]
    """

    ridge: Float[Array, ""] = eqx.field(default_factory=lambda: as_float(1e-3), converter=as_float)
    power: Float[Array, ""] = eqx.field(default_factory=lambda: as_float(1.0), converter=as_float)

    def __call__(self, model: CurvatureModel, policy: Any, task: Task, key: PRNGKeyArray | None) -> Diagonal:
        return Diagonal(
            _ridged(diagonal(model, policy, task, key), self.ridge) ** self.power.astype(model.gradient.dtype)
        )


class SignedJacobi(eqx.Module):
    r"""The diagonal estimated from random signs, to a power: $P = (\hat D + \epsilon \bar D)^\xi$. Half a product a sample.

    The signs are those of `seed` at every update. Raises: `ValueError` if `samples` is below 1.
    """

    ridge: Float[Array, ""] = eqx.field(default_factory=lambda: as_float(1e-2), converter=as_float)
    power: Float[Array, ""] = eqx.field(default_factory=lambda: as_float(1.0), converter=as_float)
    samples: int = eqx.field(static=True, default=4)
    seed: int = eqx.field(static=True, default=0)

    def __call__(self, model: CurvatureModel, policy: Any, task: Task, key: PRNGKeyArray | None) -> Diagonal:
        estimate = signed_diagonal(model, jax.random.key(self.seed), self.samples)
        return Diagonal(_ridged(estimate, self.ridge) ** self.power.astype(model.gradient.dtype))


class LeafBlocks(eqx.Module):
    """The exact block of each leaf of the policy with up to `largest` parameters, and the diagonal of the others.

    Nearly as dear as `Dense` where one leaf has most of the parameters.
    """

    ridge: Float[Array, ""] = eqx.field(default_factory=lambda: as_float(1e-3), converter=as_float)
    largest: int = eqx.field(static=True, default=512)

    def __call__(self, model: CurvatureModel, policy: Any, task: Task, key: PRNGKeyArray | None) -> Blocks:
        blocks = leaf_blocks(model, policy, task, key, largest=self.largest)
        eigen = iter(_eigen([N for N in blocks if N.ndim == 2]))
        parts = []
        for N in blocks:
            if N.ndim == 1:
                parts.append(Diagonal(_ridged(N, self.ridge)))
            else:
                values, vectors = next(eigen)
                parts.append(Block(vectors, _ridged(values, self.ridge)))
        return Blocks(tuple(parts))


class Kronecker(eqx.Module):
    """Kronecker factors of each layer. Raises: `TypeError` for a policy that is not `Neural`."""

    ridge: Float[Array, ""] = eqx.field(default_factory=lambda: as_float(1e-3), converter=as_float)

    def __call__(self, model: CurvatureModel, policy: Any, task: Task, key: PRNGKeyArray | None) -> Factored:
        eigen = _eigen([factor for pair in kronecker_factors(model, policy, task) for factor in pair])
        layers = []
        for (a, A), (b, B) in zip(eigen[::2], eigen[1::2], strict=True):
            layers.append(Layer(B, A, _ridged(b[:, None] * a, self.ridge)))
        return Factored(tuple(layers), ravel_pytree(policy)[1])


class Preconditioned(eqx.Module):
    r"""`Krylov` in the metric of an approximation P of N: the path of dampings is $d(\lambda) = -(N + \lambda P)^{-1} g$.

    Lanczos on $P^{-1/2} N P^{-1/2}$ from $P^{-1/2} g$; dampings are relative to the largest eigenvalue of that operator. P is
    one of this module, made anew at every update.

    Reference: Chapelle and Erhan 2011; Martens 2010, section 4.7.
    """

    preconditioner: Preconditioner = eqx.field(default_factory=Jacobi)
    rank: int = eqx.field(static=True, default=10)

    def __call__(self, model: CurvatureModel, policy: Any, task: Task, key: PRNGKeyArray | None) -> Spectral:
        P = self.preconditioner(model, policy, task, key)
        space = lanczos(lambda y: P.root(model.product(P.root(y))), P.root(model.gradient), self.rank)
        return space._replace(vectors=jax.vmap(P.root)(space.vectors), values=jnp.maximum(space.values, 0))

    def passes(self, parameters: int) -> int:
        """Passes over the horizon: forward and back for each product, and one for P."""
        return 2 * min(self.rank, parameters) + 1


def _eigen(matrices: list[Float[Array, "_ _"]]) -> list[tuple[Array, Array]]:
    """Eigenvalues, none negative, and eigenvectors of positive semidefinite matrices, one after another.

    jaxlib's batched eigh waits on XLA's thread pool, and two of them at a time can lock it for good: each therefore waits for
    the last one's result, times 0, which the compiler must keep since it may not be finite.
    """
    found, last = [], None
    for N in matrices:
        values, vectors = jnp.linalg.eigh(N if last is None else N + 0 * last)
        found.append((jnp.maximum(values, 0), vectors))
        last = values[0]
    return found


def _ridged(values: Array, ridge: Float[Array, ""]) -> Array:
    """Plus so much of their mean; ones where there is no curvature at all."""
    mean = jnp.mean(values)
    return values + jnp.where(mean > 0, ridge.astype(values.dtype) * mean, 1.0)


def _matmul(X: Array, Y: Array) -> Array:
    return jnp.matmul(X, Y, precision="highest")
