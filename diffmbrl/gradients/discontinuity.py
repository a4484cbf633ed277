r"""Mixtures that test for discontinuities first, and take the score function's estimate alone where they find one.

Where J jumps, the pathwise estimate misses the jump's share of the gradient, often with a small variance, so that
inverse-variance weights favour it. Two tests of the hypothesis that J is smooth in the noise, each with a `level`, its rate of
false alarms:

* `Agreement`: at each step t the pathwise $\lambda_t$ and the score function's $\psi_t$ must have the same mean. It says at
  which steps the two part, but its power is the score function's, which fades as the horizon grows.
* `Explained`: whatever varies must have a gradient. By the Gaussian Poincare inequality a smooth J has

$$\mathrm{Var}_\epsilon[J \mid s_0] \;\le\; E\,|\nabla_\epsilon J|^2 = E \sum_t |\sigma_t \lambda_t|^2,$$

  with equality where J is linear in the noise. The left side is half of the squared difference of two rollouts with independent
  noise from one start, the right one is known: no score function is involved. A jump adds to the left side alone. It sees
  jumps that matter beside what the gradient explains, and says nothing of when they happen.

Of a random walk of 10 steps with a reward of 1 for ending above 0, from 64 starts, `Explained` finds the jump in 100 of 100
batches, `Agreement` at 1% of the steps: the first is the default.

Onoda et al. (2026, equation 14) compare the same quantities, for noise in the parameters: the variance of the gradient against
$2 (\mathrm{Var} J - |E \nabla J|^2)$, with a tolerance in place of a level.
"""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from diffmbrl.core import State, Task, as_float, reweighted
from diffmbrl.gradients.inverse_variance import Weigh, at_steps, exchange, inverse_variance, step_weights
from diffmbrl.gradients.paired import Pair, noisy_action, over_time, pair, paired_evaluations, pull_each, pull_mean
from diffmbrl.info import EvaluationCounts, count_evaluations
from diffmbrl.rollout import returns, rollout, weights_axis


class Agreement(eqx.Module):
    r"""Smooth at step t if the mean of $\psi_t - \lambda_t$ is within z standard errors of 0, in every action dimension.

    z is at `level` / (T m), two-sided: `level` is the rate of false alarms of the whole rollout, in the limit of many starts.
    """

    level: Float[Array, ""] = eqx.field(default_factory=lambda: as_float(0.01), converter=as_float)
    rollouts: ClassVar[int] = 0  # that the test needs

    def __call__(self, policy: Any, task: Task, s0: State, x: Pair, folds: int) -> Bool[Array, "F T"]:
        d = (x.score - x.pathwise).reshape(folds, -1, *x.a.shape[1:])
        error = jnp.std(d, axis=1, ddof=1) / jnp.sqrt(d.shape[1]).astype(d.dtype)
        share = self.level.astype(d.dtype) / (2 * task.horizon * task.m)
        z = -jax.scipy.special.ndtri(share)
        return jnp.all(jnp.abs(jnp.mean(d, axis=1)) <= z * error, axis=-1)


class Explained(eqx.Module):
    r"""Smooth if the mean of $\tfrac12 (J - J')^2 - \sum_t |\sigma_t \lambda_t|^2$ is not above z standard errors.

    z is at `level`, one-sided. J' is of a second rollout with other noise in the actions and the same in the dynamics. For
    `Gaussian` policies. Its false alarms are fewer than `level` where J is curved, or the starts few: the difference is skewed
    to the right.
    Raises: `ValueError` for a policy that is not `Gaussian`.
    """

    level: Float[Array, ""] = eqx.field(default_factory=lambda: as_float(0.01), converter=as_float)
    rollouts: ClassVar[int] = 1

    def __call__(self, policy: Any, task: Task, s0: State, x: Pair, folds: int) -> Bool[Array, "F T"]:
        if not hasattr(policy, "log_std"):
            raise ValueError(f"the noise's size must be known, as Gaussian's log_std is; got {type(policy).__name__}")
        sigma = jnp.exp(policy.log_std)

        def again(s, key, a_seen, s_seen, weights):
            # Other actions by a perturbation, so that the dynamics keep the noise they had.
            def noise(pi, s, t):
                return noisy_action(pi, s, key, t) - pi.mean(s)

            drawn = over_time(noise, policy, s_seen, jnp.arange(task.horizon))
            other = sigma * jax.random.normal(jax.random.fold_in(key, task.horizon), a_seen.shape, a_seen.dtype)
            trajectory = rollout(policy, task, s, key, w=other - drawn, remat=None)
            return returns(trajectory, reweighted(task, weights))

        axis = weights_axis(task, s0)
        J = jax.vmap(again, (0, 0, 0, 0, axis))(s0, x.keys, x.a, x.s, task.weights)
        explained = jnp.sum((sigma * x.pathwise) ** 2, axis=(1, 2))
        d = ((x.J - J) ** 2 / 2 - explained).reshape(folds, -1)
        error = jnp.std(d, axis=1, ddof=1) / jnp.sqrt(d.shape[1]).astype(d.dtype)
        z = -jax.scipy.special.ndtri(self.level.astype(d.dtype))
        # A gradient that is not finite explains everything: of an overflow inverse variance takes care.
        smooth = ~(jnp.mean(d, axis=1) > z * error)
        return jnp.broadcast_to(smooth[:, None], (folds, task.horizon))


class DiscontinuityTested(eqx.Module):
    r"""Inverse-variance weights per step where `test` finds J smooth, the score function alone where it does not.

    `test` is `Explained()` or `Agreement()`, see above; `baseline`, `weigh` and `folds` as `InverseVariancePerStep`. A test
    that fails to see a discontinuity leaves inverse variance's bias; more starts make it see more.

    Shapes: `s0` [B, ...]; B a multiple of `folds`, 2 starts or more in each; a dozen for the test to mean something.
    Cost: as `InverseVariancePerStep`, and for `Explained` one rollout more, without derivatives.
    Raises: `ValueError` without a key or a density, for a batch that cannot be parted, what the test raises.
    Reference: Onoda, Parmas, Yaguchi and Matsuo 2026 (arXiv 2604.18161), whose test is changed as said above.

    >>> from diffmbrl import Gaussian, Linear, tasks
    >>> task = tasks.lqr(horizon=10)
    >>> policy = Gaussian.around(Linear.zeros(task), task, std=0.1)
    >>> key = jax.random.key(0)
    >>> DiscontinuityTested().smooth(policy, task, task.starts(key, 64), key).all()
    Array(True, dtype=bool)
    """

    test: Any = eqx.field(default_factory=Explained)
    baseline: Any = None
    weigh: Weigh = eqx.field(static=True, default=inverse_variance)
    folds: int = eqx.field(static=True, default=1)
    remat: int | None = eqx.field(static=True, default=1)

    def __call__(self, policy: Any, task: Task, s0: State, key: PRNGKeyArray | None) -> tuple[Float[Array, ""], Any]:
        x, k = self._weigh(policy, task, s0, key)
        return jnp.mean(x.J), pull_mean(policy, x, *at_steps(k, x))

    def samples(self, policy: Any, task: Task, s0: State, key: PRNGKeyArray | None) -> tuple[Float[Array, " B"], Any]:
        """Return and gradient of each start. Memory: B gradients."""
        x, k = self._weigh(policy, task, s0, key)
        return x.J, pull_each(policy, x, *at_steps(k, x))

    def weights(self, policy: Any, task: Task, s0: State, key: PRNGKeyArray | None) -> Float[Array, " T"]:
        """k_t, the weight of the pathwise estimate at each step; the mean over folds."""
        return jnp.mean(self._weigh(policy, task, s0, key)[1], axis=0)

    def smooth(self, policy: Any, task: Task, s0: State, key: PRNGKeyArray | None) -> Bool[Array, " T"]:
        """At which steps the test finds nothing, in any fold."""
        x = self._pair(policy, task, s0, key)
        return jnp.all(self.test(policy, task, s0, x, self.folds), axis=0)

    def work(self, task: Task, batch: int) -> EvaluationCounts:
        """One forward and one reverse pass, and the test's rollouts."""
        more = count_evaluations(forward=self.test.rollouts * task.horizon * batch)
        return jax.tree.map(jnp.add, paired_evaluations(task, batch, self.remat), more)

    def _pair(self, policy: Any, task: Task, s0: State, key: PRNGKeyArray | None) -> Pair:
        return pair(policy, task, s0, key, baseline=self.baseline, folds=self.folds, remat=self.remat)

    def _weigh(self, policy: Any, task: Task, s0: State, key: PRNGKeyArray | None) -> tuple[Pair, Float[Array, "F T"]]:
        x = self._pair(policy, task, s0, key)
        smooth = self.test(policy, task, s0, x, self.folds)
        return x, exchange(jnp.where(smooth, step_weights(x, self.weigh, self.folds), 0))
