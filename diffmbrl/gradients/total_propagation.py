r"""Total propagation: backpropagation that mixes in the score function at every time step and propagates the mixture.

At each step, from the last, each rollout has an estimate $v_{t+1}$ of the derivative of its value to go with respect to
$s_{t+1}$. Its noise is in the actions, $a_t \sim \pi(\cdot \mid s_t)$, which thus have two estimates of the same derivative,

$$\lambda_t = w_t\,r_a + B_t^\top v_{t+1} \qquad\text{and}\qquad \psi_t = -A_t\,\nabla_a\log\pi(a_t \mid s_t)$$

(here $A_t = R_t - b_t$), mixed by the inverse of their variances over the rollouts. The mixture enters the gradient through
$\partial a_t/\partial\theta$ and propagates to earlier states through the policy's gain $K_t = \partial a_t / \partial s_t$:

$$v_t = w_t\,r_s + f_s^\top v_{t+1} + K_t^\top \big(k_t \lambda_t + (1 - k_t) \psi_t\big).$$

By induction from the last step, $E[v_{t+1} \mid s_{t+1}] = \nabla V_{t+1}$ makes $E[\lambda_t \mid s_t] = E[\psi_t \mid s_t]$
where the task is smooth, and so $E[v_t \mid s_t] = \nabla V_t$, whatever the weights: every mixture is unbiased, and with
$k = 1$ it is backpropagation.

In the source the noise is in the transition and cuts every path from $s_t$ to $s_{t+1}$. Noise in the actions cuts only the
paths through the policy: $f_s^\top v_{t+1}$ propagates unchanged. If the free system is chaotic, v therefore grows as in
backpropagation, and the advantage over weights per step (`InverseVariancePerStep`) is small; it is larger if the growth comes
through the policy's gain.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from diffmbrl.core import Policy, State, Task, is_plan, where
from diffmbrl.gradients.likelihood_ratio import Baseline
from diffmbrl.gradients.mixing import Weigh, exchange, inverse_variance, trace_weights
from diffmbrl.gradients.paired import (
    Pair,
    check_score_function,
    mixed_gradient,
    mixed_samples,
    noisy_action,
    score_function,
    split_cotangents,
)
from diffmbrl.info import EvaluationCounts, count_evaluations
from diffmbrl.rollout import rollouts, step_keys, transition, weights_axis


class TotalPropagation(eqx.Module):
    r"""Backpropagation whose adjoint is mixed, at every step, with the score function by inverse variance.

    Weights are per time step, from the traces of the variances at the level of the actions. (The source weighs by the variance
    of the policy's gradient, which costs a gradient for each rollout and step.)

    Args:
        baseline: As in `InverseVariance`.
        weigh: As in `InverseVariance`.
        folds: As in `InverseVariance`.
        remat: Not used here, where every step is recomputed; for solvers that differentiate the same rollouts.

    Raises:
        ValueError: As `InverseVariance`.

    Cost: rollouts, one reverse pass over all starts in lockstep that recomputes each step (two for `folds` above 1), and one
    product with the policy's derivative at all B T states. Memory: the states of the rollouts; for `samples`, B gradients.
    Reference: Parmas, Rasmussen, Peters and Doya 2018, PIPPS: Flexible model-based policy search robust to the curse of chaos,
    section 4.

    >>> from diffmbrl import Gaussian, Linear, tasks
    >>> task = tasks.lqr(horizon=10)
    >>> policy = Gaussian.around(Linear.zeros(task), task, std=0.1)
    >>> key = jax.random.key(0)
    >>> J, gradient = TotalPropagation()(policy, task, task.starts(key, 8), key)
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
        x, k = self._propagated(policy, task, s0, key)
        return jnp.mean(x.J), mixed_gradient(policy, x, k)

    def samples(
        self, policy: Policy, task: Task, s0: State, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, " B"], PyTree]:
        """Return and gradient of each start, whose mean a call returns."""
        x, k = self._propagated(policy, task, s0, key)
        return x.J, mixed_samples(policy, x, k)

    def weights(self, policy: Policy, task: Task, s0: State, key: PRNGKeyArray | None) -> Float[Array, " T"]:
        """k_t, the weight of the pathwise estimate at each step; the mean over folds."""
        return jnp.mean(self._propagated(policy, task, s0, key)[1], axis=0)

    def work(self, task: Task, batch: int) -> EvaluationCounts:
        """Rollouts, and for each reverse pass a step recomputed and pulled back."""
        steps, sweeps = task.horizon * batch, 1 if self.folds == 1 else 2
        return count_evaluations(forward=(1 + sweeps) * steps, vjp=sweeps * steps, sequential=1 + sweeps)

    def _propagated(
        self, policy: Policy, task: Task, s0: State, key: PRNGKeyArray | None
    ) -> tuple[Pair, Float[Array, "F T"]]:
        key = check_score_function(policy, s0, key, self.folds)
        trajectories = rollouts(policy, task, s0, key, remat=None)
        x = score_function(policy, task, key, trajectories, self.baseline, self.folds)
        s_T, alive_T = trajectories.s_T, trajectories.alive[:, -1]
        lam, k = propagate_backward(policy, task, x, s_T, alive_T, None, self.weigh, self.folds)
        if self.folds > 1:
            # A fold's weights at t depend, through later steps, on its own samples; a second sweep removes that.
            lam, k = propagate_backward(policy, task, x, s_T, alive_T, exchange(k), self.weigh, self.folds)
        return x._replace(pathwise=lam), k


def propagate_backward(
    policy: PyTree,
    task: Task,
    x: Pair,
    s_T: State,
    alive_T: Bool[Array, " B"],
    weights: Float[Array, "F T"] | None,
    weigh: Weigh,
    folds: int,
) -> tuple[Float[Array, "B T m"], Float[Array, "F T"]]:
    """Propagate the mixed adjoint from the last step to the first; the weights are computed here unless they are given.

    Returns lambda_t [B, T, m] and the weights of each fold.
    """
    axis = weights_axis(task, x.s)

    def masked(alive: Bool[Array, ""], v: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: jnp.where(alive, leaf, jnp.zeros_like(leaf)), v)

    def last(s, s_seen, alive, w):
        safe = where(alive, s, s_seen)
        return masked(alive, jax.grad(lambda z: w[-1] * task.terminal(z))(safe))

    def pathwise(t, s, a, key, v, w, alive):
        def stage(s, a):
            r, s_next = transition(task, s, a, step_keys(key, t)[1])
            return w[t] * r, s_next

        (r, _), transpose = jax.vjp(stage, s, a)
        return masked(alive, transpose((jnp.ones_like(r), v)))

    def through_policy(t, pi, s, a, key, alive, u, A):
        _, transpose = jax.vjp(lambda z: (noisy_action(pi, z, key, t), pi.log_prob(z, a)), s)
        return masked(alive, transpose((u, A))[0])

    def step(v, slices):
        t, pi, s, a, psi, A, alive, given = slices
        pi = policy if pi is None else pi
        v_s, lam = jax.vmap(pathwise, (None, 0, 0, 0, 0, axis, 0))(t, s, a, x.keys, v, task.weights, alive)
        k = trace_weights(lam, psi, weigh, folds) if given is None else given
        u, to_log = split_cotangents(k, lam, A)
        through = jax.vmap(through_policy, (None, None, 0, 0, 0, 0, 0, 0))(t, pi, s, a, x.keys, alive, u, to_log)
        return jax.tree.map(jnp.add, v_s, through), (lam, k)

    first = jax.tree.map(lambda z: z[:, 0], x.s)
    v_T = jax.vmap(last, (0, 0, 0, axis))(s_T, first, alive_T, task.weights)
    time_first = jax.tree.map(lambda z: jnp.moveaxis(z, 1, 0), (x.s, x.a, x.score, x.advantage, x.alive))
    plan = policy if is_plan(policy) else None
    slices = (jnp.arange(task.horizon), plan, *time_first, None if weights is None else weights.T)
    _, (lam, k) = jax.lax.scan(step, v_T, slices, reverse=True)
    return jnp.moveaxis(lam, 0, 1), k.T
