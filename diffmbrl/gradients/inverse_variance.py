r"""Inverse-variance mixtures of the pathwise and the score-function gradient: one weight per parameter, or per time step.

The weights are those of `mixing.py`. A variance does not show a bias: where J is discontinuous the pathwise estimate can be
wrong with no variance at all (on a step function it is always 0), and then has all the weight. `alpha_order.py` bounds that
bias, and `discontinuity.py` tests for it.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from diffmbrl.core import Policy, State, Task
from diffmbrl.gradients.likelihood_ratio import Baseline
from diffmbrl.gradients.mixing import Weigh, exchange, fold_moments, inverse_variance, mix, trace_weights
from diffmbrl.gradients.paired import (
    Pair,
    both,
    mixed_gradient,
    mixed_samples,
    over_starts,
    pair,
    paired_evaluations,
)
from diffmbrl.info import EvaluationCounts


class InverseVariance(eqx.Module):
    r"""Mixture with one weight per parameter: $k_j\,(\nabla^{\text{pathwise}} J)_j + (1 - k_j)\,(\nabla^{\text{score}} J)_j$.

    It is unbiased where J is smooth (exactly so with two folds or more). Under discontinuities it is biased towards the
    pathwise estimate, and on a step function it is 0.

    Args:
        baseline: Baseline of the score function; None for leave-one-out.
        weigh: Function of both variances and the covariance: `inverse_variance` or `minimum_variance`.
        folds: Number of equal parts of the batch. With 1 the weights come from the samples that they multiply; with more,
            each part's weights come from the other parts.
        remat: As in `rollout`.

    Raises:
        ValueError: Without a key, for a policy without a density (wrap the estimator in `Smoothed`), or if the batch is not a
            multiple of `folds` with at least 2 starts in each.

    Cost: one forward and one reverse pass, and two products with the policy's derivative at all B T states. Memory: 2 B
    gradients.
    Reference: Suh et al. 2022, section 4, before the bias is constrained; per parameter: Parmas et al. 2018, section 4.

    >>> from diffmbrl import Gaussian, Linear, tasks
    >>> task = tasks.lqr(horizon=10)
    >>> policy = Gaussian.around(Linear.zeros(task), task, std=0.1)
    >>> key = jax.random.key(0)
    >>> J, gradient = InverseVariance()(policy, task, task.starts(key, 8), key)
    >>> gradient.mean.K.shape
    (1, 2)
    """

    baseline: Baseline | None = None
    weigh: Weigh = eqx.field(static=True, default=inverse_variance)
    folds: int = eqx.field(static=True, default=1)
    remat: int | None = eqx.field(static=True, default=1)

    def __call__(
        self, policy: Policy, task: Task, s0: State, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, ""], PyTree]:
        return over_starts(*self.samples(policy, task, s0, key))

    def samples(
        self, policy: Policy, task: Task, s0: State, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, " B"], PyTree]:
        """Return and mixed gradient of each start."""
        x = self._pair(policy, task, s0, key)
        pathwise, score = both(policy, x)
        return x.J, jax.tree.map(mix, self._weights(pathwise, score), pathwise, score)

    def weights(self, policy: Policy, task: Task, s0: State, key: PRNGKeyArray | None) -> PyTree[Float[Array, "..."]]:
        """The weight of the pathwise estimate, a pytree like the policy; the mean over folds."""
        k = self._weights(*both(policy, self._pair(policy, task, s0, key)))
        return jax.tree.map(lambda x: jnp.mean(x, axis=0), k)

    def work(self, task: Task, batch: int) -> EvaluationCounts:
        """One forward and one reverse pass."""
        return paired_evaluations(task, batch, self.remat)

    def _pair(self, policy: Policy, task: Task, s0: State, key: PRNGKeyArray | None) -> Pair:
        return pair(policy, task, s0, key, baseline=self.baseline, folds=self.folds, remat=self.remat)

    def _weights(self, pathwise: PyTree, score: PyTree) -> PyTree[Float[Array, "..."]]:
        return jax.tree.map(lambda x, y: exchange(self.weigh(*fold_moments(x, y, self.folds))), pathwise, score)


class InverseVariancePerStep(eqx.Module):
    r"""Mixture with one weight per time step, at the level of the actions: $\lambda_t = dJ/da_t$ against $\psi_t$.

    $$\nabla_\theta J = \sum_t k_t \Big(\frac{\partial a_t}{\partial\theta}\Big)^{\!\top} \lambda_t
      + (1 - k_t)\,A_t\,\frac{\partial\log\pi_t}{\partial\theta},\qquad
      k_t = \frac{\mathrm{tr}\,\mathrm{Var}\,\psi_t}{\mathrm{tr}\,\mathrm{Var}\,\lambda_t + \mathrm{tr}\,\mathrm{Var}\,\psi_t}$$

    The pathwise estimate of early actions passes through all Jacobians and that of late ones through few, which one weight per
    parameter cannot express. A step's variance does not show that the pathwise errors of all steps have one cause and add up:
    on the cart-pole and the double pendulum weights per parameter do as well or better (experiments/mixing.py).

    Args:
        baseline: As in `InverseVariance`.
        weigh: As in `InverseVariance`.
        folds: As in `InverseVariance`.
        remat: As in `rollout`.

    Raises:
        ValueError: As `InverseVariance`.

    Cost: one forward and one reverse pass, and one product with the policy's derivative at all B T states; the weights need
    nothing of the network's size. Memory: one gradient.
    Reference: Parmas et al. 2018, section 4; Onoda et al. 2026, IVW-H (arXiv 2604.18161).

    >>> from diffmbrl import Gaussian, Linear, tasks
    >>> task = tasks.lqr(horizon=10)
    >>> policy = Gaussian.around(Linear.zeros(task), task, std=0.1)
    >>> key = jax.random.key(0)
    >>> InverseVariancePerStep().weights(policy, task, task.starts(key, 8), key).shape
    (10,)
    """

    baseline: Baseline | None = None
    weigh: Weigh = eqx.field(static=True, default=inverse_variance)
    folds: int = eqx.field(static=True, default=1)
    remat: int | None = eqx.field(static=True, default=1)

    def __call__(
        self, policy: Policy, task: Task, s0: State, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, ""], PyTree]:
        x, k = self._weighted(policy, task, s0, key)
        return jnp.mean(x.J), mixed_gradient(policy, x, k)

    def samples(
        self, policy: Policy, task: Task, s0: State, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, " B"], PyTree]:
        """Return and mixed gradient of each start. Memory: B gradients."""
        x, k = self._weighted(policy, task, s0, key)
        return x.J, mixed_samples(policy, x, k)

    def weights(self, policy: Policy, task: Task, s0: State, key: PRNGKeyArray | None) -> Float[Array, " T"]:
        """k_t, the weight of the pathwise estimate at each step; the mean over folds."""
        return jnp.mean(self._weighted(policy, task, s0, key)[1], axis=0)

    def work(self, task: Task, batch: int) -> EvaluationCounts:
        """One forward and one reverse pass."""
        return paired_evaluations(task, batch, self.remat)

    def _weighted(
        self, policy: Policy, task: Task, s0: State, key: PRNGKeyArray | None
    ) -> tuple[Pair, Float[Array, "F T"]]:
        x = pair(policy, task, s0, key, baseline=self.baseline, folds=self.folds, remat=self.remat)
        return x, exchange(trace_weights(x.pathwise, x.score, self.weigh, self.folds))
