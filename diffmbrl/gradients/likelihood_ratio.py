r"""The score-function gradient of a stochastic policy, which differentiates neither the dynamics nor the reward.

$$\nabla_\theta J = E\Big[\sum_{t<T} (R_t - b_t)\, \nabla_\theta \log\pi_\theta(a_t \mid s_t)\Big]$$

An estimator is a choice of R_t, its credit (`TotalReturn`, `RewardToGo`), and of a baseline b_t (none, `MeanBaseline`,
`LeaveOneOut`, `LinearBaseline`, `ValueBaseline`). The credit makes returns [B, T] of a batch of rollouts, the baseline
predicts them, [B, T] as well.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from diffmbrl.batching import map_chunks
from diffmbrl.core import State, Task, Trajectory, is_plan, parameter, reweighted
from diffmbrl.gradients.smoothed import require_key
from diffmbrl.info import EvaluationCounts, count_evaluations
from diffmbrl.rollout import returns, rollouts, weights_axis


class TotalReturn(eqx.Module):
    """R_t = J, the return of the whole episode, for every step: REINFORCE (Williams 1992)."""

    def __call__(self, trajectories: Trajectory, task: Task) -> Float[Array, "B T"]:
        J = each_return(trajectories, task)
        return jnp.broadcast_to(J[:, None], (J.shape[0], task.horizon))


class RewardToGo(eqx.Module):
    r"""$R_t = \sum_{u \ge t} w_u r_u + w_T \phi(s_T)$: what was earned before an action does not depend on it.

    The same mean as `TotalReturn` with T terms of noise fewer, so a variance that is lower, commonly by half or more.
    Reference: Baxter and Bartlett 2001; Peters and Schaal 2008, section 2.2.
    """

    def __call__(self, trajectories: Trajectory, task: Task) -> Float[Array, "B T"]:
        earned = task.weights[..., :-1] * trajectories.r
        terminal = each_return(trajectories, reweighted(task, task.weights.at[..., :-1].set(0)))
        # From the end, so that late returns are not differences of large sums.
        return jnp.cumsum(earned[:, ::-1], axis=1)[:, ::-1] + terminal[:, None]


class NoBaseline(eqx.Module):
    """b = 0: unbiased, with a variance that grows with the square of the mean return."""

    def __call__(self, R: Float[Array, "B T"], trajectories: Trajectory, task: Task) -> Float[Array, "B T"]:
        return jnp.zeros_like(R)


class MeanBaseline(eqx.Module):
    """The mean over the batch, at each step; for `TotalReturn` this is the mean return.

    A sample is in its own baseline, so the gradient's mean is exactly 1 - 1/B times the true one: the direction is unbiased.
    """

    def __call__(self, R: Float[Array, "B T"], trajectories: Trajectory, task: Task) -> Float[Array, "B T"]:
        return jnp.broadcast_to(jnp.mean(R, axis=0), R.shape)


class LeaveOneOut(eqx.Module):
    """The mean over the other samples of the batch, at each step: unbiased.

    Raises: `ValueError` for a batch of 1.
    Reference: Kool, van Hoof and Welling 2019, Buy 4 REINFORCE samples, get a baseline for free.
    """

    def __call__(self, R: Float[Array, "B T"], trajectories: Trajectory, task: Task) -> Float[Array, "B T"]:
        _at_least(2, R, "leave-one-out")
        # R - b = (R - mean) B / (B - 1), which does not subtract two sums over the whole batch.
        B = R.shape[0]
        return R - (R - jnp.mean(R, axis=0)) * (B / (B - 1))


class LinearBaseline(eqx.Module):
    r"""A learned value: ridge regression of R_t on $(x, x^2, \tau, \tau^2, \tau^3, 1)$, x the features of s_t and $\tau = t/T$.

    Fitted within the call and, unlike in the source, across folds: start i's baseline comes from the starts of the other folds
    (i modulo `folds`) and from a state that its action has not yet changed. So it is unbiased, which a fit to its own
    returns is not.

    Raises: `ValueError` for a batch smaller than `folds`, or fewer than 2 of them.
    Reference: Duan et al. 2016, Benchmarking deep reinforcement learning for continuous control, the linear feature baseline.
    """

    ridge: Float[Array, ""] = parameter(1e-5)
    folds: int = eqx.field(static=True, default=2)

    def __check_init__(self):
        if self.folds < 2:
            raise ValueError(f"folds must be at least 2, got {self.folds}: a start must not predict its own return")

    def __call__(self, R: Float[Array, "B T"], trajectories: Trajectory, task: Task) -> Float[Array, "B T"]:
        _at_least(self.folds, R, f"{self.folds} folds")
        X = _regressors(trajectories, task).astype(R.dtype)
        alive = trajectories.alive[:, :-1].astype(R.dtype)
        XtX = jnp.einsum("bt,btp,btq->bpq", alive, X, X, precision="highest")
        Xty = jnp.einsum("bt,btp,bt->bp", alive, X, R, precision="highest")
        # Row k takes the starts of all folds but k.
        fold = jnp.arange(R.shape[0]) % self.folds
        others = (fold != jnp.arange(self.folds)[:, None]).astype(R.dtype)
        XtX, Xty = (jnp.tensordot(others, x, axes=1, precision="highest") for x in (XtX, Xty))
        coefficients = jax.vmap(self._solve)(XtX, Xty)
        return jnp.einsum("btp,bp->bt", X, coefficients[fold], precision="highest")

    def _solve(self, XtX: Float[Array, "p p"], Xty: Float[Array, " p"]) -> Float[Array, " p"]:
        """In units in which every regressor has the same size: the ridge then has none, and float32 suffices."""
        size = jnp.sqrt(jnp.diagonal(XtX))
        unit = jnp.where(size > 0, 1 / jnp.where(size > 0, size, 1), 0).astype(XtX.dtype)
        scaled = XtX * unit[:, None] * unit + self.ridge.astype(XtX.dtype) * jnp.eye(len(unit), dtype=XtX.dtype)
        return unit * jax.scipy.linalg.solve(scaled, unit * Xty, assume_a="pos")


class ValueBaseline(eqx.Module):
    """A value known beforehand: `value` (s -> [], a module), such as a critic. Unbiased, if not fitted to the same batch."""

    value: Any

    def __call__(self, R: Float[Array, "B T"], trajectories: Trajectory, task: Task) -> Float[Array, "B T"]:
        return jax.vmap(jax.vmap(self.value))(where_alive(trajectories))


class LikelihoodRatio(eqx.Module):
    r"""The likelihood-ratio (score-function, REINFORCE) gradient: $\sum_t (R_t - b_t) \nabla_\theta \log\pi_\theta(a_t | s_t)$.

    Unbiased for any dynamics and reward, discontinuous ones included, of a policy that has `log_prob(s, a)`, such as
    `Gaussian`, of which log_std gets its gradient, too; `Smoothed(LikelihoodRatio(), std=)` takes any policy. Its variance
    falls with the size of the noise and grows with T, but not with products of Jacobians. `credit` and `baseline`: see above.

    Shapes: `s0` [B, ...]. Cost: one rollout, and one product with the policy at all B T states: no pass back through time.
    Raises: `ValueError` without a key, or for a policy without a density; what the baseline raises.
    Reference: Williams 1992; Glynn 1990; Mohamed et al. 2020, Monte Carlo gradient estimation in machine learning, section 4.

    >>> import jax
    >>> from diffmbrl import Gaussian, Linear, tasks
    >>> task = tasks.lqr(horizon=10)
    >>> policy = Gaussian.around(Linear.zeros(task), task, std=0.1)
    >>> key = jax.random.key(0)
    >>> J, gradient = LikelihoodRatio(baseline=LeaveOneOut())(policy, task, task.starts(key, 8), key)
    >>> gradient.log_std.shape
    (1,)
    """

    credit: Any
    baseline: Any
    remat: int | None = eqx.field(static=True)  # for whoever differentiates the same rollouts; this does not

    def __init__(self, credit: Any = None, baseline: Any = None, *, remat: int | None = 1):
        self.credit = RewardToGo() if credit is None else credit
        self.baseline = NoBaseline() if baseline is None else baseline
        self.remat = remat

    def __call__(self, policy: Any, task: Task, s0: State, key: PRNGKeyArray | None) -> tuple[Float[Array, ""], Any]:
        J, trajectories, advantage = self._weigh(policy, task, s0, key)
        return jnp.mean(J), _score(policy, where_alive(trajectories), trajectories.a, advantage / J.shape[0])

    def samples(self, policy: Any, task: Task, s0: State, key: PRNGKeyArray | None) -> tuple[Float[Array, " B"], Any]:
        """Return and gradient of each start. Memory: B gradients."""
        J, trajectories, advantage = self._weigh(policy, task, s0, key)

        def one(s, a, weight):
            return jax.vjp(lambda pi: _log_probs(pi, s, a), policy)[1](weight)[0]

        return J, jax.vmap(one)(where_alive(trajectories), trajectories.a, advantage)

    def work(self, task: Task, batch: int) -> EvaluationCounts:
        """One rollout."""
        return count_evaluations(forward=task.horizon * batch, sequential=1)

    def _weigh(self, policy, task, s0, key) -> tuple[Float[Array, " B"], Trajectory, Float[Array, "B T"]]:
        """Returns, rollouts, and what multiplies the score of each action: 0 after the end of an episode."""
        if not hasattr(policy, "log_prob"):
            raise ValueError(
                f"{type(policy).__name__} has no log_prob(s, a), which the score of its actions needs: put noise on it by "
                "Gaussian.around(policy, task, std=0.1), or Smoothed(LikelihoodRatio(), std=0.1)"
            )
        weights_axis(task, s0)  # raises for weights of another batch
        trajectories = rollouts(policy, task, s0, require_key(key), remat=None)
        R = self.credit(trajectories, task)
        advantage = jnp.where(trajectories.alive[:, :-1], R - self.baseline(R, trajectories, task), 0)
        return each_return(trajectories, task), trajectories, advantage


def each_return(trajectories: Trajectory, task: Task) -> Float[Array, " B"]:
    """J of each trajectory, with its weights, if each has its own."""
    axis = None if task.weights.ndim == 1 else 0
    return jax.vmap(lambda tau, w: returns(tau, reweighted(task, w)), in_axes=(0, axis))(trajectories, task.weights)


def _score(policy: Any, s: State, a: Float[Array, "B T m"], weight: Float[Array, "B T"]) -> Any:
    """The sum over starts and steps of weight times the derivative of log pi(a | s)."""

    def total(policy):
        plan = policy if is_plan(policy) else None

        def at(x):
            s_t, a_t, weight_t, plan_t = x
            pi = policy if plan is None else plan_t
            return jnp.vdot(weight_t, jax.vmap(pi.log_prob)(s_t, a_t))

        steps = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (s, a, weight))
        # Recomputed rather than kept, so that the activations of a few steps at a time stay in the caches.
        return jnp.sum(map_chunks(jax.checkpoint(at, prevent_cse=False), (*steps, plan), a.shape[0]))

    return jax.grad(total)(policy)


def _log_probs(policy: Any, s: State, a: Float[Array, "T m"]) -> Float[Array, " T"]:
    """log pi(a_t | s_t) of each step of one rollout."""
    return jax.vmap(lambda pi, s, a: pi.log_prob(s, a), in_axes=(0 if is_plan(policy) else None, 0, 0))(policy, s, a)


def where_alive(trajectories: Trajectory) -> State:
    """The states, with the start in place of those after the end, where policy and value may be undefined (see `rollout`)."""

    def masked(x: Array) -> Array:
        alive: Bool[Array, "..."] = trajectories.alive[:, :-1].reshape(x.shape[:2] + (1,) * (x.ndim - 2))
        return jnp.where(alive, x, x[:, :1])

    return jax.tree.map(masked, trajectories.s)


def _regressors(trajectories: Trajectory, task: Task) -> Float[Array, "B T p"]:
    x = jax.vmap(jax.vmap(task.features))(where_alive(trajectories))
    time = jnp.arange(task.horizon, dtype=x.dtype) / task.horizon
    powers = jnp.broadcast_to(jnp.stack([time, time**2, time**3, jnp.ones_like(time)], axis=1), (*x.shape[:2], 4))
    return jnp.concatenate([x, x**2, powers], axis=2)


def _at_least(count: int, R: Float[Array, "B T"], what: str) -> None:
    if R.shape[0] < count:
        raise ValueError(f"a baseline of {what} needs at least {count} starts, got {R.shape[0]}")
