r"""Approximations P of the Gauss-Newton matrix N by its diagonal or blocks, for Krylov methods in the metric of P.

In the coordinates $y = P^{1/2} d$ the operator is $P^{-1/2} N P^{-1/2}$ and the gradient $P^{-1/2} g$: its Krylov space of
dimension k gives the steps $-(N + \lambda P)^{-1} g$ for every damping. If P has the scales of N, fewer products suffice.

A maker (`Jacobi`, `SignedJacobi`, `LeafBlocks`, `Kronecker`) is called with the quadratic model and returns a `systems.Metric`.
`ridge` times the mean eigenvalue is added to every P: otherwise directions without curvature would dominate.

Measured (benchmarks/results/preconditioning.json: `cartpole-balance`, 385 parameters, 64 starts, 10 products). The undamped
model falls much faster in the metric of the leaves' blocks (.97 of the possible decrease against .63 without at the start of a
run, .69 against .03 at its end), and a little faster in those of the factors and the diagonal. At the end of a run, where the
model is right, this helps: the best true improvement over the dampings is .0011 of the return without, .0027 with the diagonal
and .0042 with the blocks. At the start, where the model is wrong, it hurts: .071, .060 and .012.

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
from diffmbrl.core import Policy, Task, as_float
from diffmbrl.optimizers.systems import Preconditioner
from diffmbrl.second_order.curvature import CurvatureModel, Vector
from diffmbrl.second_order.krylov import Spectral, lanczos


class Diagonal(NamedTuple):
    """P by its diagonal.

    Args:
        values: The diagonal, positive.
    """

    values: Vector

    def inverse(self, v: Vector) -> Vector:
        """Compute P^-1 v."""
        return v / self.values

    def root(self, v: Vector) -> Vector:
        """Compute P^-1/2 v."""
        return v / jnp.sqrt(self.values)


class Block(NamedTuple):
    """P by its eigenvectors and eigenvalues.

    Args:
        vectors: Eigenvectors, the columns.
        values: Eigenvalues, positive.
    """

    vectors: Float[Array, "k k"]
    values: Float[Array, " k"]

    def inverse(self, v: Float[Array, " k"]) -> Float[Array, " k"]:
        """Compute P^-1 v."""
        return _matmul(self.vectors, _matmul(self.vectors.T, v) / self.values)

    def root(self, v: Float[Array, " k"]) -> Float[Array, " k"]:
        """Compute P^-1/2 v."""
        return _matmul(self.vectors, _matmul(self.vectors.T, v) / jnp.sqrt(self.values))


class Blocks(NamedTuple):
    """P by blocks along its diagonal.

    Args:
        parts: The blocks, in the order of the parameters.
    """

    parts: tuple[Block | Diagonal, ...]

    def inverse(self, v: Vector) -> Vector:
        """Compute P^-1 v."""
        return self._each(v, lambda part, x: part.inverse(x))

    def root(self, v: Vector) -> Vector:
        """Compute P^-1/2 v."""
        return self._each(v, lambda part, x: part.root(x))

    def _each(self, v: Vector, act: Callable[..., Array]) -> Vector:
        out, first = [], 0
        for part in self.parts:
            last = first + part.values.size
            out.append(act(part, v[first:last]))
            first = last
        return jnp.concatenate(out)


class Layer(NamedTuple):
    """The block of P for one layer, by its Kronecker factors.

    Args:
        outputs: Eigenvectors of the outputs' factor.
        inputs: Eigenvectors of the inputs' factor.
        values: Eigenvalues of the product, positive.
    """

    outputs: Float[Array, "o o"]
    inputs: Float[Array, "i i"]
    values: Float[Array, "o i"]


class Factored(NamedTuple):
    """P by Kronecker factors for each layer of a `Neural` policy.

    Args:
        layers: The blocks.
        unravel: Function from a vector of parameters to the policy.
    """

    layers: tuple[Layer, ...]
    unravel: Callable[[Vector], Policy]

    def inverse(self, v: Vector) -> Vector:
        """Compute P^-1 v."""
        return self._each(v, lambda x, values: x / values)

    def root(self, v: Vector) -> Vector:
        """Compute P^-1/2 v."""
        return self._each(v, lambda x, values: x / jnp.sqrt(values))

    def _each(self, v: Vector, act: Callable[..., Array]) -> Vector:
        policy: Any = self.unravel(v)
        weights, biases = [], []
        for layer, W, b in zip(self.layers, policy.net.weights, policy.net.biases, strict=True):
            x = jnp.concatenate([W, b[:, None]], axis=1)
            x = _matmul(layer.outputs.T, _matmul(x, layer.inputs))
            x = _matmul(layer.outputs, _matmul(act(x, layer.values), layer.inputs.T))
            weights.append(x[:, :-1])
            biases.append(x[:, -1])
        net = (tuple(weights), tuple(biases))
        return ravel_pytree(eqx.tree_at(lambda p: (p.net.weights, p.net.biases), policy, net))[0]


# The makers: hyperparameters, and one pass over time (all signs at once).


class Jacobi(eqx.Module):
    r"""Approximate the matrix by a power of its exact diagonal, $P = (D + \epsilon \bar D)^\xi$.

    Args:
        ridge: $\epsilon$, relative to the mean of the diagonal.
        power: $\xi$.

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

    def __call__(self, model: CurvatureModel, policy: Policy, task: Task, key: PRNGKeyArray | None) -> Diagonal:
        return Diagonal(
            _ridged(diagonal(model, policy, task, key), self.ridge) ** self.power.astype(model.gradient.dtype)
        )


class SignedJacobi(eqx.Module):
    r"""Approximate the matrix by a power of its diagonal, estimated from random signs, $P = (\hat D + \epsilon \bar D)^\xi$.

    Args:
        ridge: $\epsilon$, relative to the mean of the diagonal.
        power: $\xi$.
        samples: Number of sign vectors.
        seed: Seed of the signs, which are the same at every update.

    Raises:
        ValueError: If `samples` is below 1.

    Cost: Half a product for each sample.
    """

    ridge: Float[Array, ""] = eqx.field(default_factory=lambda: as_float(1e-2), converter=as_float)
    power: Float[Array, ""] = eqx.field(default_factory=lambda: as_float(1.0), converter=as_float)
    samples: int = eqx.field(static=True, default=4)
    seed: int = eqx.field(static=True, default=0)

    def __call__(self, model: CurvatureModel, policy: Policy, task: Task, key: PRNGKeyArray | None) -> Diagonal:
        estimate = signed_diagonal(model, jax.random.key(self.seed), self.samples)
        return Diagonal(_ridged(estimate, self.ridge) ** self.power.astype(model.gradient.dtype))


class LeafBlocks(eqx.Module):
    """Approximate the matrix by the exact block of each leaf of the policy.

    Args:
        ridge: Added to the eigenvalues, relative to their mean.
        largest: Size of the largest leaf with a block; larger leaves have their diagonal.

    Cost: Nearly that of `Dense` if one leaf has most of the parameters.
    """

    ridge: Float[Array, ""] = eqx.field(default_factory=lambda: as_float(1e-3), converter=as_float)
    largest: int = eqx.field(static=True, default=512)

    def __call__(self, model: CurvatureModel, policy: Policy, task: Task, key: PRNGKeyArray | None) -> Blocks:
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
    """Approximate the matrix by Kronecker factors of each layer of a network.

    Args:
        ridge: Added to the eigenvalues, relative to their mean.

    Raises:
        TypeError: If the policy is not `Neural`.
    """

    ridge: Float[Array, ""] = eqx.field(default_factory=lambda: as_float(1e-3), converter=as_float)

    def __call__(self, model: CurvatureModel, policy: Policy, task: Task, key: PRNGKeyArray | None) -> Factored:
        eigen = _eigen([factor for pair in kronecker_factors(model, policy, task) for factor in pair])
        layers = []
        for (a, A), (b, B) in zip(eigen[::2], eigen[1::2], strict=True):
            layers.append(Layer(B, A, _ridged(b[:, None] * a, self.ridge)))
        return Factored(tuple(layers), ravel_pytree(policy)[1])


class Preconditioned(eqx.Module):
    r"""`Krylov` in the metric of an approximation P of N, with the steps $d(\lambda) = -(N + \lambda P)^{-1} g$.

    Lanczos on $P^{-1/2} N P^{-1/2}$ from $P^{-1/2} g$; dampings are relative to the largest eigenvalue of that operator.

    Args:
        preconditioner: Maker of P, called at every update.
        rank: Dimension of the Krylov space.

    Cost: `rank` products, and one pass over time for P.

    Reference: Chapelle and Erhan 2011; Martens 2010, section 4.7.
    """

    preconditioner: Preconditioner = eqx.field(default_factory=Jacobi)
    rank: int = eqx.field(static=True, default=10)

    def __call__(self, model: CurvatureModel, policy: Policy, task: Task, key: PRNGKeyArray | None) -> Spectral:
        P = self.preconditioner(model, policy, task, key)
        space = lanczos(lambda y: P.root(model.product(P.root(y))), P.root(model.gradient), self.rank)
        return space._replace(vectors=jax.vmap(P.root)(space.vectors), values=jnp.maximum(space.values, 0))

    def passes(self, parameters: int) -> int:
        """Two for each product, forward and back, and one for P."""
        return 2 * min(self.rank, parameters) + 1


def _eigen(matrices: list[Float[Array, "_ _"]]) -> list[tuple[Array, Array]]:
    """Eigenvalues, none negative, and eigenvectors of positive semidefinite matrices, one after another.

    jaxlib's batched eigh waits on XLA's thread pool, and two at a time can deadlock: each therefore waits for the result of the
    one before, times 0, which the compiler must keep because it may not be finite.
    """
    found, last = [], None
    for N in matrices:
        values, vectors = jnp.linalg.eigh(N if last is None else N + 0 * last)
        found.append((jnp.maximum(values, 0), vectors))
        last = values[0]
    return found


def _ridged(values: Array, ridge: Float[Array, ""]) -> Array:
    """Add a share of the mean to the values; without any curvature the result is 1."""
    mean = jnp.mean(values)
    return values + jnp.where(mean > 0, ridge.astype(values.dtype) * mean, 1.0)


def _matmul(X: Array, Y: Array) -> Array:
    return jnp.matmul(X, Y, precision="highest")
