r"""Mixtures that test for discontinuities first, and use the score function's estimate alone where they find one.

Where J jumps, the pathwise estimate misses the jump's share of the gradient, often with a small variance, so that
inverse-variance weights favour it. Two tests of the hypothesis that J is smooth in the noise, each with a `level`, its rate of
false alarms:

* `Agreement`: at each step t the pathwise $\lambda_t$ and the score function's $\psi_t$ must have the same mean. It says at
  which steps the two differ, but its power is the score function's, which fades as the horizon grows.
* `Explained`: whatever varies must have a gradient. By the Gaussian Poincare inequality a smooth J has

$$\mathrm{Var}_\epsilon[J \mid s_0] \;\le\; E\,|\nabla_\epsilon J|^2 = E \sum_t |\sigma_t \lambda_t|^2,$$

  with equality where J is linear in the noise. The left side is half of the squared difference of two rollouts with independent
  noise from one start, and the right side is known: no score function is involved. A jump adds to the left side alone. The test
  sees jumps that matter compared with the variance that the gradient explains, and does not say when they happen.

Of a random walk of 10 steps with a reward of 1 for ending above 0, from 64 starts, `Explained` finds the jump in 100 of 100
batches, `Agreement` at 1% of the steps: the first is the default.

Onoda et al. (2026, equation 14) compare the same quantities, for noise in the parameters: the variance of the gradient against
$2 (\mathrm{Var} J - |E \nabla J|^2)$, with a tolerance in place of a level.
"""

from typing import ClassVar, Protocol, cast, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from diffmbrl.core import Policy, State, Task, parameter, reweighted
from diffmbrl.gradients.likelihood_ratio import Baseline
from diffmbrl.gradients.mixing import Weigh, exchange, inverse_variance, trace_weights
from diffmbrl.gradients.paired import (
    Pair,
    mixed_gradient,
    mixed_samples,
    noisy_action,
    over_time,
    pair,
    paired_evaluations,
)
from diffmbrl.info import EvaluationCounts, count_evaluations
from diffmbrl.policies import Gaussian
from diffmbrl.rollout import returns, rollout, weights_axis


@runtime_checkable
class SmoothnessTest(Protocol):
    """A test of whether J is smooth at each time step, in each fold of the batch; `rollouts` more per start are needed."""

    rollouts: ClassVar[int]

    def __call__(self, policy: Policy, task: Task, s0: State, x: Pair, folds: int) -> Bool[Array, "F T"]: ...


class Agreement(eqx.Module):
    r"""Test that finds J smooth at step t if the mean of $\psi_t - \lambda_t$ is within z standard errors of 0.

    Every action dimension must pass; z is the two-sided quantile of `level` / (T m).

    Args:
        level: Rate of false alarms of the whole rollout, in the limit of many starts.
    """

    level: Float[Array, ""] = parameter(0.01)
    rollouts: ClassVar[int] = 0

    def __call__(self, policy: Policy, task: Task, s0: State, x: Pair, folds: int) -> Bool[Array, "F T"]:
        mean, error = _mean_and_error(x.score - x.pathwise, folds)
        share = self.level.astype(mean.dtype) / (2 * task.horizon * task.m)
        z = -jax.scipy.special.ndtri(share)
        return jnp.all(jnp.abs(mean) <= z * error, axis=-1)


class Explained(eqx.Module):
    r"""Test that finds J smooth if the gradient explains the variance of the return.

    The mean of $\tfrac12 (J - J')^2 - \sum_t |\sigma_t \lambda_t|^2$ must be at most z standard errors, with z the one-sided
    quantile of `level`. J' is the return of a second rollout with other noise in the actions and the same in the dynamics. The
    difference is skewed to the right, so false alarms are fewer than `level` if J is curved or the starts are few.

    Args:
        level: Rate of false alarms.

    Raises:
        ValueError: For a policy that is not `Gaussian`.
    """

    level: Float[Array, ""] = parameter(0.01)
    rollouts: ClassVar[int] = 1

    def __call__(self, policy: Policy, task: Task, s0: State, x: Pair, folds: int) -> Bool[Array, "F T"]:
        if not hasattr(policy, "log_std"):
            raise ValueError(f"the noise's size must be known, as Gaussian's log_std is; got {type(policy).__name__}")
        sigma = jnp.exp(cast(Gaussian, policy).log_std)

        def second_return(s, key, a_seen, s_seen, weights):
            # The other actions are made by a perturbation, so that the dynamics' noise stays the same.
            def noise(pi, s, t):
                return noisy_action(pi, s, key, t) - pi.mean(s)

            drawn = over_time(noise, policy, s_seen, jnp.arange(task.horizon))
            other = sigma * jax.random.normal(jax.random.fold_in(key, task.horizon), a_seen.shape, a_seen.dtype)
            trajectory = rollout(policy, task, s, key, w=other - drawn, remat=None)
            return returns(trajectory, reweighted(task, weights))

        axis = weights_axis(task, s0)
        J = jax.vmap(second_return, (0, 0, 0, 0, axis))(s0, x.keys, x.a, x.s, task.weights)
        explained = jnp.sum((sigma * x.pathwise) ** 2, axis=(1, 2))
        mean, error = _mean_and_error((x.J - J) ** 2 / 2 - explained, folds)
        z = -jax.scipy.special.ndtri(self.level.astype(mean.dtype))
        # A gradient that is not finite explains everything; the inverse-variance weights exclude an overflow.
        smooth = ~(mean > z * error)
        return jnp.broadcast_to(smooth[:, None], (folds, task.horizon))


def _mean_and_error(d: Float[Array, "B *n"], folds: int) -> tuple[Float[Array, "F *n"], Float[Array, "F *n"]]:
    """Mean and standard error of the mean in each fold."""
    d = d.reshape(folds, -1, *d.shape[1:])
    return jnp.mean(d, axis=1), jnp.std(d, axis=1, ddof=1) / jnp.sqrt(d.shape[1]).astype(d.dtype)


class DiscontinuityTested(eqx.Module):
    r"""Inverse-variance weights per step where a test finds J smooth, and the score function alone where it does not.

    A test that fails to see a discontinuity leaves inverse variance's bias; it sees more with more starts.

    Args:
        test: The test, `Explained()` or `Agreement()`.
        baseline: As in `InverseVariance`.
        weigh: As in `InverseVariance`.
        folds: As in `InverseVariance`; a fold needs about a dozen starts for the test to mean something.
        remat: As in `rollout`.

    Raises:
        ValueError: As `InverseVariance`; what the test raises.

    Cost: as `InverseVariancePerStep`, and with `Explained` one more rollout, without derivatives.
    Reference: Onoda, Parmas, Yaguchi and Matsuo 2026 (arXiv 2604.18161), with another test (see the top of this file).

    >>> from diffmbrl import Gaussian, Linear, tasks
    >>> task = tasks.lqr(horizon=10)
    >>> policy = Gaussian.around(Linear.zeros(task), task, std=0.1)
    >>> key = jax.random.key(0)
    >>> DiscontinuityTested().smooth(policy, task, task.starts(key, 64), key).all()
    Array(True, dtype=bool)
    """

    test: SmoothnessTest = eqx.field(default_factory=Explained)
    baseline: Baseline | None = None
    weigh: Weigh = eqx.field(static=True, default=inverse_variance)
    folds: int = eqx.field(static=True, default=1)
    remat: int | None = eqx.field(static=True, default=1)

    def __call__(
        self, policy: Policy, task: Task, s0: State, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, ""], PyTree]:
        x, smooth = self._tested(policy, task, s0, key)
        return jnp.mean(x.J), mixed_gradient(policy, x, self._weights(x, smooth))

    def samples(
        self, policy: Policy, task: Task, s0: State, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, " B"], PyTree]:
        """Return and gradient of each start. Memory: B gradients."""
        x, smooth = self._tested(policy, task, s0, key)
        return x.J, mixed_samples(policy, x, self._weights(x, smooth))

    def weights(self, policy: Policy, task: Task, s0: State, key: PRNGKeyArray | None) -> Float[Array, " T"]:
        """k_t, the weight of the pathwise estimate at each step; the mean over folds."""
        return jnp.mean(self._weights(*self._tested(policy, task, s0, key)), axis=0)

    def smooth(self, policy: Policy, task: Task, s0: State, key: PRNGKeyArray | None) -> Bool[Array, " T"]:
        """Whether the test finds J smooth at each step, in all folds."""
        return jnp.all(self._tested(policy, task, s0, key)[1], axis=0)

    def work(self, task: Task, batch: int) -> EvaluationCounts:
        """One forward and one reverse pass, and the test's rollouts."""
        more = count_evaluations(forward=self.test.rollouts * task.horizon * batch)
        return jax.tree.map(jnp.add, paired_evaluations(task, batch, self.remat), more)

    def _tested(
        self, policy: Policy, task: Task, s0: State, key: PRNGKeyArray | None
    ) -> tuple[Pair, Bool[Array, "F T"]]:
        x = pair(policy, task, s0, key, baseline=self.baseline, folds=self.folds, remat=self.remat)
        return x, self.test(policy, task, s0, x, self.folds)

    def _weights(self, x: Pair, smooth: Bool[Array, "F T"]) -> Float[Array, "F T"]:
        return exchange(jnp.where(smooth, trace_weights(x.pathwise, x.score, self.weigh, self.folds), 0))
