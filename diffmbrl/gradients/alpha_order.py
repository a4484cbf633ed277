r"""The alpha-order gradient: a mixture with as much of the pathwise estimate as a bound on its bias allows.

With P and Z the means of N pathwise (first-order) and score-function (zeroth-order) samples, $g = E[Z]$ the true gradient
and $|Z - g| \le \epsilon$ with probability $1 - \delta$, the mixture $\alpha P + (1 - \alpha) Z$ has from its pathwise part
the error

$$\alpha\,|P - g| \;\le\; \alpha\,(|P - Z| + |Z - g|) \;\le\; \alpha\,(|P - Z| + \epsilon).$$

This error is at most gamma, with probability $1 - \delta$, and the variance is the least possible under that bound, for

$$\alpha = \min\{\alpha_\infty,\; \gamma / (|P - Z| + \epsilon)\}$$

with the inverse-variance weight $\alpha_\infty$; this is `bias_bound`. Suh et al. (2022, lemma 4.4) bound the whole error
instead,

$$|\alpha P + (1 - \alpha) Z - g| \;\le\; \alpha\,|P - Z| + \epsilon \;\le\; \gamma,\qquad
\alpha = \min\{\alpha_\infty,\; (\gamma - \epsilon) / |P - Z|\},$$

which is `accuracy`. It has no solution where epsilon > gamma, and then uses $\alpha = 0$, the score function alone, exactly
where that is known to be inaccurate. In both, alpha grows with gamma and falls with epsilon: an uncertain Z cannot rule out a
bias of P.

The authors' code inverts the confidence: it puts its `delta`, .95 by default, into $\log((d + 1)/\delta)$ in place of the
probability of failure, so that more confidence makes a smaller radius; and it squares a variance. Here `delta` is the
probability of failure, .05 by default.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from diffmbrl.core import Policy, State, Task, as_float
from diffmbrl.gradients.likelihood_ratio import Baseline
from diffmbrl.gradients.mixing import exchange, inverse_variance, mix, trace_weights
from diffmbrl.gradients.paired import both, over_starts, pair, paired_evaluations
from diffmbrl.info import EvaluationCounts

# (samples [N, P], delta) -> epsilon.
Radius = Callable[[Array, Array], Array]
# (gamma, |P - Z|, epsilon) -> the largest alpha.
Bound = Callable[[Array, Array, Array], Array]


def chebyshev(y: Float[Array, "N P"], delta: Float[Array, ""]) -> Float[Array, ""]:
    r"""Confidence radius of a mean by Chebyshev's inequality, $\sqrt{\mathrm{tr}\,\Sigma / (N \delta)}$.

    It holds for any distribution with a known (or well estimated) variance.

    Args:
        y: Samples, shape [N, P].
        delta: Probability that the mean is further off.

    Returns:
        The radius epsilon, in the samples' units.

    >>> y = jax.random.normal(jax.random.key(0), (400, 3))
    >>> chebyshev(y, jnp.array(0.05)) > jnp.linalg.norm(y.mean(0))
    Array(True, dtype=bool)
    """
    return jnp.sqrt(_trace(y) / (y.shape[0] * delta))


def normal(y: Float[Array, "N P"], delta: Float[Array, ""]) -> Float[Array, ""]:
    r"""Confidence radius of a normal mean, $(1 + \sqrt{2 \log(1/\delta)}) \sqrt{\mathrm{tr}\,\Sigma / N}$, for large N.

    Args:
        y: Samples, shape [N, P], of any covariance.
        delta: Probability that the mean is further off.

    Returns:
        The radius epsilon, in the samples' units.

    Reference: Boucheron, Lugosi and Massart 2013, theorem 5.6.
    """
    return (1 + jnp.sqrt(-2 * jnp.log(delta))) * jnp.sqrt(_trace(y) / y.shape[0])


def bernstein(y: Float[Array, "N P"], delta: Float[Array, ""]) -> Float[Array, ""]:
    r"""Confidence radius by Bernstein's inequality.

    $$(P + 1) \exp(-N \epsilon^2 / (2\,\mathrm{tr}\,\Sigma + 2 L \epsilon / 3)) = \delta$$

    L bounds a sample's distance from its mean. No bound is known, so the largest observed distance is used, as in the source.

    Args:
        y: Samples, shape [N, P].
        delta: Probability that the mean is further off.

    Returns:
        The radius epsilon, in the samples' units.

    Reference: Tropp 2012, theorem 1.6; Suh et al. 2022, appendix C.
    """
    N, P = y.shape
    size = jnp.log((P + 1) / delta)
    L = jnp.max(jnp.linalg.norm(y - jnp.mean(y, axis=0), axis=1))
    half = size * L / 3
    return (half + jnp.sqrt(half**2 + 2 * N * _trace(y) * size)) / N


def _trace(y: Float[Array, "N P"]) -> Float[Array, ""]:
    return jnp.sum(jnp.var(y, axis=0, ddof=1))


def bias_bound(gamma: Array, distance: Array, epsilon: Array) -> Array:
    r"""The largest alpha with $\alpha (|P - Z| + \epsilon) \le \gamma$.

    Args:
        gamma: Bound on the error from the pathwise part.
        distance: |P - Z|, the distance of both means.
        epsilon: Confidence radius of Z.

    Returns:
        alpha, which may be above 1.

    >>> print(bias_bound(jnp.array(1.0), jnp.array(3.0), jnp.array(1.0)))
    0.25
    """
    return gamma / (distance + epsilon)


def accuracy(gamma: Array, distance: Array, epsilon: Array) -> Array:
    r"""The largest alpha with $\alpha |P - Z| + \epsilon \le \gamma$; 0 if there is none.

    Args:
        gamma: Bound on the whole error.
        distance: |P - Z|, the distance of both means.
        epsilon: Confidence radius of Z.

    Returns:
        alpha, which may be above 1.

    >>> [accuracy(gamma, jnp.array(4.0), jnp.array(1.0)).item() for gamma in jnp.array([2.0, 0.5])]
    [0.25, 0.0]
    """
    return jnp.where(epsilon > gamma, 0, (gamma - epsilon) / distance)


class AlphaOrder(eqx.Module):
    r"""Mixture of the pathwise and the score-function gradient, of least variance with a bounded bias.

    $$\nabla_\theta J = \alpha \nabla^{\text{pathwise}} J + (1 - \alpha) \nabla^{\text{score}} J$$

    Under a discontinuity that the pathwise estimate misses altogether, such as a step function, the mixture is within gamma of
    the score function's estimate. The method `alpha` returns the weight.

    Args:
        gamma: Bound on the error of the pathwise part, in the gradient's units; if infinite, alpha is the inverse-variance
            weight of the traces of both covariances.
        delta: Probability with which the error may exceed gamma, in (0, 1).
        baseline: Baseline of the score function; None for leave-one-out.
        radius: Confidence radius of the score function's mean: `chebyshev`, `normal` or `bernstein`.
        bound: The constraint on alpha: `bias_bound` or `accuracy` (see the top of this file).
        folds: As in `InverseVariance`.
        remat: As in `rollout`.

    Raises:
        ValueError: For a negative gamma or a delta outside (0, 1); as `InverseVariance`.

    Cost: one forward and one reverse pass, two products with the policy's derivative at all B T states. Memory: 2 B gradients.
    Reference: Suh et al. 2022, Do differentiable simulators give better policy gradients?, section 4 and appendix C.

    >>> from diffmbrl import Gaussian, Linear, tasks
    >>> task = tasks.lqr(horizon=10)
    >>> policy = Gaussian.around(Linear.zeros(task), task, std=0.1)
    >>> key = jax.random.key(0)
    >>> AlphaOrder(gamma=0.0).alpha(policy, task, task.starts(key, 8), key)
    Array(0., dtype=float32)
    """

    gamma: Float[Array, ""]
    delta: Float[Array, ""]
    baseline: Baseline | None
    radius: Radius = eqx.field(static=True)
    bound: Bound = eqx.field(static=True)
    folds: int = eqx.field(static=True)
    remat: int | None = eqx.field(static=True)

    def __init__(
        self,
        *,
        gamma: float | Float[Array, ""] = 1.0,
        delta: float | Float[Array, ""] = 0.05,
        baseline: Baseline | None = None,
        radius: Radius = chebyshev,
        bound: Bound = bias_bound,
        folds: int = 1,
        remat: int | None = 1,
    ):
        if isinstance(gamma, float | int) and not gamma >= 0:
            raise ValueError(f"gamma must not be negative, got {gamma}")
        if isinstance(delta, float | int) and not 0 < delta < 1:
            raise ValueError(f"delta, a probability of failure, must lie in (0, 1), got {delta}")
        self.gamma, self.delta, self.baseline = as_float(gamma), as_float(delta), baseline
        self.radius, self.bound, self.folds, self.remat = radius, bound, folds, remat

    def __call__(
        self, policy: Policy, task: Task, s0: State, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, ""], PyTree]:
        return over_starts(*self.samples(policy, task, s0, key))

    def samples(
        self, policy: Policy, task: Task, s0: State, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, " B"], PyTree]:
        """Return and mixed gradient of each start."""
        J, pathwise, score = self._both(policy, task, s0, key)
        alpha = self._alpha(pathwise, score)
        return J, jax.tree.map(lambda x, y: mix(alpha, x, y), pathwise, score)

    def alpha(self, policy: Policy, task: Task, s0: State, key: PRNGKeyArray | None) -> Float[Array, ""]:
        """The weight of the pathwise estimate; the mean over folds."""
        _, pathwise, score = self._both(policy, task, s0, key)
        return jnp.mean(self._alpha(pathwise, score))

    def work(self, task: Task, batch: int) -> EvaluationCounts:
        """One forward and one reverse pass."""
        return paired_evaluations(task, batch, self.remat)

    def _both(
        self, policy: Policy, task: Task, s0: State, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, " B"], PyTree, PyTree]:
        x = pair(policy, task, s0, key, baseline=self.baseline, folds=self.folds, remat=self.remat)
        return x.J, *both(policy, x)

    def _alpha(self, pathwise: PyTree, score: PyTree) -> Float[Array, " F"]:
        x, y = (jax.vmap(lambda g: ravel_pytree(g)[0])(each) for each in (pathwise, score))
        free = trace_weights(x, y, inverse_variance, self.folds)
        x, y = (z.reshape(self.folds, -1, z.shape[-1]) for z in (x, y))
        gamma, delta = self.gamma.astype(x.dtype), self.delta.astype(x.dtype)
        distance = jnp.linalg.norm(jnp.mean(x, axis=1) - jnp.mean(y, axis=1), axis=-1)
        epsilon = jax.vmap(lambda z: self.radius(z, delta))(y)
        # If both are 0 there is nothing to bound (0 / 0); if P has overflowed, alpha is bounded by 0.
        bound = jnp.where(distance + epsilon > 0, self.bound(gamma, distance, epsilon), jnp.inf)
        return exchange(jnp.where(free > 0, jnp.minimum(free, bound), 0))
