r"""Solutions of the damped Gauss-Newton system: by products, by the matrix or its square root, or in the sigma-metric.

A system is called with the quadratic model and returns the eigenvectors or Ritz vectors in which every damping is cheap.
"""

from typing import Protocol, runtime_checkable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from diffmbrl.core import Policy, Task, as_float
from diffmbrl.second_order.curvature import CurvatureModel, Vector, curve, planner_step
from diffmbrl.second_order.dense import dense, square_root
from diffmbrl.second_order.krylov import Spectral, eigen, lanczos


@runtime_checkable
class LinearSystem(Protocol):
    """A solution of the damped Gauss-Newton system of a model, for every damping at once."""

    def __call__(self, model: CurvatureModel, policy: Policy, task: Task, key: PRNGKeyArray | None) -> Spectral:
        """Decompose the system.

        Args:
            model: Gauss-Newton model of the policy.
            policy: Policy or plan of which it is the model.
            task: Task.
            key: Key with which the model was built.

        Returns:
            Eigenvectors or Ritz vectors of the system.
        """
        ...

    def passes(self, parameters: int) -> int:
        """Count the sequential passes over the horizon for a policy with this number of parameters."""
        ...


@runtime_checkable
class Metric(Protocol):
    """A symmetric positive definite matrix P that approximates the Gauss-Newton matrix, by two products."""

    def inverse(self, v: Vector) -> Vector:
        """Compute P^-1 v."""
        ...

    def root(self, v: Vector) -> Vector:
        """Compute P^-1/2 v with the symmetric root."""
        ...


@runtime_checkable
class Preconditioner(Protocol):
    """A maker of approximations of the Gauss-Newton matrix."""

    def __call__(self, model: CurvatureModel, policy: Policy, task: Task, key: PRNGKeyArray | None) -> Metric:
        """Approximate the matrix of a model.

        Args:
            model: Gauss-Newton model of the policy.
            policy: Policy or plan of which it is the model.
            task: Task.
            key: Key with which the model was built.

        Returns:
            The approximation P.
        """
        ...


class Krylov(eqx.Module):
    """The Krylov space from the gradient: conjugate gradients for all dampings at once.

    Args:
        rank: Dimension of the space.

    Cost: `rank` products.
    """

    rank: int = eqx.field(static=True, default=30)

    def __call__(self, model: CurvatureModel, policy: Policy, task: Task, key: PRNGKeyArray | None) -> Spectral:
        space = lanczos(model.product, model.gradient, self.rank)
        return space._replace(values=jnp.maximum(space.values, 0))  # as for `Dense`

    def passes(self, parameters: int) -> int:
        """Two for each product, forward and back."""
        return 2 * min(self.rank, parameters)


class Dense(eqx.Module):
    """The matrix and all its eigenvectors, for up to some thousand parameters.

    Cost: One pass over time, P^2 memory and 9 P^3 flops.
    """

    def __call__(self, model: CurvatureModel, policy: Policy, task: Task, key: PRNGKeyArray | None) -> Spectral:
        space = eigen(dense(model, policy, task, key), model.gradient)
        # The matrix is positive semidefinite; a value that rounding leaves below zero could turn a damped step uphill.
        return space._replace(values=jnp.maximum(space.values, 0))

    def passes(self, parameters: int) -> int:
        """One."""
        return 1


class SquareRoot(eqx.Module):
    r"""The singular vectors of a matrix R with $R^\top R = N$, without forming N; for float32.

    Eigenvalues have the square of the relative precision of `Dense`, $10^{-14}$ of the largest in float32, so that rounding
    does not hide the flat directions of a badly conditioned rollout.

    Cost: A QR factorisation of P + B (n + m) rows at each time step, about ten times the cost of `Dense`.

    Reference: Golub and Van Loan, Matrix Computations, section 5.3 (least squares by QR rather than the normal equations).
    """

    def __call__(self, model: CurvatureModel, policy: Policy, task: Task, key: PRNGKeyArray | None) -> Spectral:
        _, singular, vectors = jnp.linalg.svd(square_root(model, policy, task, key))
        coefficients = jnp.matmul(vectors, model.gradient, precision="highest")
        count = jnp.asarray(singular.shape[0], jnp.int32)
        return Spectral(vectors, singular**2, singular**2, coefficients, count)

    def passes(self, parameters: int) -> int:
        """One."""
        return 1


class Sigma(eqx.Module):
    r"""The sigma-metric, between Gauss-Newton (sigma large) and imitation of the planner (sigma small).

    The planner's actions may differ from the policy's by a slack w - G d at the price $\tfrac\sigma2|w - Gd|^2$. Eliminating w
    from $\tfrac12 w^\top M w + g^\top w$ leaves

    $$G^\top \big[\sigma M (M + \sigma I)^{-1}\big] G\,d = -G^\top \sigma (M + \sigma I)^{-1} g,$$

    which is Gauss-Newton as $\sigma \to \infty$, and as $\sigma \to 0$ the regression $\min_d |G d - w^*|^2$ of the policy onto
    the step $w^* = -M^{-1} g$ of iLQR around its own closed loop.

    Args:
        sigma: Price of the slack, relative to the curvature $g^\top M g / g^\top g$ of M along its gradient.
        rank: Dimension of the Krylov space in which the system is solved.

    Cost: `rank` products, each with a Riccati sweep and three more recursions.

    Reference: Mora et al. 2021 (PODS), section 4; Levine and Koltun 2013 for the imitation of a planner.
    """

    sigma: Float[Array, ""] = eqx.field(default_factory=lambda: as_float(1.0), converter=as_float)
    rank: int = eqx.field(static=True, default=10)

    def __call__(self, model: CurvatureModel, policy: Policy, task: Task, key: PRNGKeyArray | None) -> Spectral:
        lin, K, g = model.linearization, model.K, model.g
        tiny = jnp.finfo(g.dtype).tiny
        sigma = self.sigma.astype(g.dtype) * jnp.sum(g * curve(lin, K, g)) / jnp.maximum(jnp.sum(g * g), tiny)
        # Without curvature sigma is absolute.
        sigma = jnp.where(sigma > 0, sigma, self.sigma.astype(g.dtype))

        def soft(w: Float[Array, "T m B"]) -> Float[Array, "T m B"]:
            return -sigma * planner_step(lin, K, sigma, w)

        space = lanczos(lambda v: model.pull(curve(lin, K, soft(model.push(v)))), model.pull(soft(g)), self.rank)
        return space._replace(values=jnp.maximum(space.values, 0))

    def passes(self, parameters: int) -> int:
        """Four for each product, and four for sigma and the planner's step."""
        return 4 * (min(self.rank, parameters) + 1)
