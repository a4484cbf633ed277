r"""Inverse-variance mixtures of the pathwise and the score-function gradient: per parameter, and per time step.

Of two unbiased estimates x and y with variances $v_x, v_y$ and covariance c, $k x + (1 - k) y$ has the least variance at

$$k = \frac{v_y - c}{v_x + v_y - 2c},\qquad \text{and for } c = 0:\;\; k = \frac{v_y}{v_x + v_y}.$$

The variances are the samples' own, which has two prices. Weights that know the samples they multiply make the mean biased,
by O(1/B); with `folds = 2` (or more) the weights of each part of the batch come from the other parts, and the mean is exactly
that of the two estimates. And a variance says nothing of a bias: where J is discontinuous the pathwise estimate can be wrong
with no variance at all (on a step function it is 0, always), and then has all the weight. `alpha_order.py` and
`discontinuity.py` are the answers to that.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from diffmbrl.core import State, Task
from diffmbrl.gradients.paired import Pair, both, pair, paired_evaluations, pull_each, pull_mean
from diffmbrl.info import EvaluationCounts

Weigh = Callable[[Array, Array, Array], Array]


def inverse_variance(v_x: Array, v_y: Array, c: Array) -> Array:
    r"""The weight of x, $v_y / (v_x + v_y)$, whatever the covariance; 1/2 where neither varies, 0 where $v_x$ is not finite.

    >>> print(inverse_variance(jnp.array(1.0), jnp.array(3.0), jnp.array(0.0)))
    0.75
    """
    return _ratio(v_y, v_x + v_y, v_x)


def minimum_variance(v_x: Array, v_y: Array, c: Array) -> Array:
    r"""The weight of x with the covariance of the two, $(v_y - c) / (v_x + v_y - 2c)$, kept in [0, 1].

    Both estimates come from one rollout and often err together. The optimum may then lie outside [0, 1], where sampling errors
    of the weight cost most.

    >>> print(minimum_variance(jnp.array(1.0), jnp.array(3.0), jnp.array(0.5)))
    0.8333333
    """
    return jnp.clip(_ratio(v_y - c, v_x + v_y - 2 * c, v_x), 0, 1)


def _ratio(share: Array, total: Array, v_x: Array) -> Array:
    known = total > 0
    k = jnp.where(known, share / jnp.where(known, total, 1), 0.5)
    # An overflow of x: it has no weight. One of y is not hidden.
    return jnp.where(jnp.isfinite(v_x), k, 0).astype(total.dtype)


def fold_moments(
    x: Float[Array, "B *n"], y: Float[Array, "B *n"], folds: int
) -> tuple[Float[Array, "F *n"], Float[Array, "F *n"], Float[Array, "F *n"]]:
    """Variances and covariance of one sample of x and y in each of `folds` parts of the batch."""
    x, y = (z.reshape(folds, -1, *z.shape[1:]) for z in (x, y))
    degrees = x.shape[1] - 1
    x, y = (z - jnp.mean(z, axis=1, keepdims=True) for z in (x, y))
    v_x, v_y, c = (jnp.sum(z, axis=1) / degrees for z in (x * x, y * y, x * y))
    return v_x, v_y, c


def exchange(k: Float[Array, "F *n"]) -> Float[Array, "F *n"]:
    """To each fold the mean of the other folds' weights; a single fold keeps its own."""
    folds = k.shape[0]
    return k if folds == 1 else (jnp.sum(k, axis=0) - k) / (folds - 1)


def mix(k: Float[Array, "F *n"], x: Float[Array, "B *m"], y: Float[Array, "B *m"]) -> Float[Array, "B *m"]:
    """k x + (1 - k) y, each fold with its k; what has no weight does not enter, not even if it is not finite."""
    k = jnp.repeat(k, x.shape[0] // k.shape[0], axis=0)
    k = k.reshape(k.shape + (1,) * (x.ndim - k.ndim)).astype(x.dtype)
    return jnp.where(k > 0, k * x, 0) + jnp.where(k < 1, (1 - k) * y, 0)


class InverseVariance(eqx.Module):
    r"""A weight for each parameter: $k_j\,(\nabla^{\text{pathwise}} J)_j + (1 - k_j)\,(\nabla^{\text{score}} J)_j$.

    `weigh` is `inverse_variance` or, with the covariance, `minimum_variance`; `folds` says whose samples make the weights (see
    above); `baseline` is the score function's, leave-one-out without. For policies with a density: `Gaussian`, or any in
    `Smoothed(InverseVariance(), std=...)`.

    Unbiased where J is smooth (exactly for `folds` of 2 or more). Under discontinuities it is biased towards the pathwise
    estimate, and on a step function it is 0.
    Shapes: `s0` [B, ...]; B a multiple of `folds`, 2 starts or more in each. Memory: 2 B gradients.
    Cost: one forward and one reverse pass, and two products with the policy's derivative at all B T states.
    Raises: `ValueError` without a key or a density, or for a batch that cannot be parted.
    Reference: Suh et al. 2022, section 4, before the bias is constrained; per parameter: Parmas et al. 2018, section 4.

    >>> from diffmbrl import Gaussian, Linear, tasks
    >>> task = tasks.lqr(horizon=10)
    >>> policy = Gaussian.around(Linear.zeros(task), task, std=0.1)
    >>> key = jax.random.key(0)
    >>> J, gradient = InverseVariance()(policy, task, task.starts(key, 8), key)
    >>> gradient.mean.K.shape
    (1, 2)
    """

    baseline: Any = None
    weigh: Weigh = eqx.field(static=True, default=inverse_variance)
    folds: int = eqx.field(static=True, default=1)
    remat: int | None = eqx.field(static=True, default=1)

    def __call__(self, policy: Any, task: Task, s0: State, key: PRNGKeyArray | None) -> tuple[Float[Array, ""], Any]:
        J, each = self.samples(policy, task, s0, key)
        return jnp.mean(J), jax.tree.map(lambda x: jnp.mean(x, axis=0), each)

    def samples(self, policy: Any, task: Task, s0: State, key: PRNGKeyArray | None) -> tuple[Float[Array, " B"], Any]:
        """Return and mixed gradient of each start."""
        x = self._pair(policy, task, s0, key)
        pathwise, score = both(policy, x)
        return x.J, jax.tree.map(mix, self._weights(pathwise, score), pathwise, score)

    def weights(self, policy: Any, task: Task, s0: State, key: PRNGKeyArray | None) -> PyTree[Float[Array, "..."]]:
        """The weight of the pathwise estimate, a pytree like the policy; the mean over folds."""
        k = self._weights(*both(policy, self._pair(policy, task, s0, key)))
        return jax.tree.map(lambda x: jnp.mean(x, axis=0), k)

    def work(self, task: Task, batch: int) -> EvaluationCounts:
        """One forward and one reverse pass."""
        return paired_evaluations(task, batch, self.remat)

    def _pair(self, policy: Any, task: Task, s0: State, key: PRNGKeyArray | None) -> Pair:
        return pair(policy, task, s0, key, baseline=self.baseline, folds=self.folds, remat=self.remat)

    def _weights(self, pathwise: Any, score: Any) -> Any:
        return jax.tree.map(lambda x, y: exchange(self.weigh(*fold_moments(x, y, self.folds))), pathwise, score)


class InverseVariancePerStep(eqx.Module):
    r"""A weight for each time step, at the level of the actions: $\lambda_t = dJ/da_t$ against $A_t \epsilon_t / \sigma_t$.

    $$\nabla_\theta J = \sum_t k_t \Big(\frac{\partial a_t}{\partial\theta}\Big)^{\!\top} \lambda_t
      + (1 - k_t)\,A_t\,\frac{\partial\log\pi_t}{\partial\theta},\qquad
      k_t = \frac{\mathrm{tr}\,\mathrm{Var}\,\psi_t}{\mathrm{tr}\,\mathrm{Var}\,\lambda_t + \mathrm{tr}\,\mathrm{Var}\,\psi_t}$$

    The pathwise estimate of early actions has gone through all Jacobians and that of late ones through few, so the one is best
    left to the score function and the other not: one weight for a parameter, which acts at all steps, cannot do so. Nothing
    of the network's size is needed to find the weights, and one product with its derivative makes the gradient. But a step's
    variance does not see that the pathwise errors of all steps have one cause and add up, while those of the score function
    do not: on the cart-pole and the double pendulum weights per parameter do as well or better (experiments/mixing.py).

    Fields, bias and requirements as `InverseVariance`. Cost: one forward and one reverse pass, one product with the
    policy's derivative at all B T states; a call holds one gradient.
    Reference: Parmas et al. 2018, section 4; Onoda et al. 2026, IVW-H (arXiv 2604.18161).

    >>> from diffmbrl import Gaussian, Linear, tasks
    >>> task = tasks.lqr(horizon=10)
    >>> policy = Gaussian.around(Linear.zeros(task), task, std=0.1)
    >>> key = jax.random.key(0)
    >>> InverseVariancePerStep().weights(policy, task, task.starts(key, 8), key).shape
    (10,)
    """

    baseline: Any = None
    weigh: Weigh = eqx.field(static=True, default=inverse_variance)
    folds: int = eqx.field(static=True, default=1)
    remat: int | None = eqx.field(static=True, default=1)

    def __call__(self, policy: Any, task: Task, s0: State, key: PRNGKeyArray | None) -> tuple[Float[Array, ""], Any]:
        x, k = self._weigh(policy, task, s0, key)
        return jnp.mean(x.J), pull_mean(policy, x, *at_steps(k, x))

    def samples(self, policy: Any, task: Task, s0: State, key: PRNGKeyArray | None) -> tuple[Float[Array, " B"], Any]:
        """Return and mixed gradient of each start. Memory: B gradients."""
        x, k = self._weigh(policy, task, s0, key)
        return x.J, pull_each(policy, x, *at_steps(k, x))

    def weights(self, policy: Any, task: Task, s0: State, key: PRNGKeyArray | None) -> Float[Array, " T"]:
        """k_t, the weight of the pathwise estimate at each step; the mean over folds."""
        return jnp.mean(self._weigh(policy, task, s0, key)[1], axis=0)

    def work(self, task: Task, batch: int) -> EvaluationCounts:
        """One forward and one reverse pass."""
        return paired_evaluations(task, batch, self.remat)

    def _weigh(self, policy: Any, task: Task, s0: State, key: PRNGKeyArray | None) -> tuple[Pair, Float[Array, "F T"]]:
        x = pair(policy, task, s0, key, baseline=self.baseline, folds=self.folds, remat=self.remat)
        return x, exchange(step_weights(x, self.weigh, self.folds))


def step_weights(x: Pair, weigh: Weigh, folds: int) -> Float[Array, "F T"]:
    """The weight of lambda_t at each step, from each fold's own samples."""
    return weigh(*(jnp.sum(v, axis=-1) for v in fold_moments(x.pathwise, x.score, folds)))


def at_steps(k: Float[Array, "F T"], x: Pair) -> tuple[Float[Array, "B T m"], Float[Array, "B T"]]:
    """What goes back through the action and through its log density, of each step."""
    return mix(k, x.pathwise, jnp.zeros_like(x.pathwise)), mix(k, jnp.zeros_like(x.advantage), x.advantage)
