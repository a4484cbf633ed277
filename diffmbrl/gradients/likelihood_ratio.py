r"""The score-function gradient of a stochastic policy, which differentiates neither the dynamics nor the reward.

$$\nabla_\theta J = E\Big[\sum_{t<T} (R_t - b_t)\, \nabla_\theta \log\pi_\theta(a_t \mid s_t)\Big]$$

An estimator is a choice of the credit R_t (`TotalReturn`, `RewardToGo`) and of a baseline b_t (`NoBaseline`, `MeanBaseline`,
`LeaveOneOut`, `LinearBaseline`, `ValueBaseline`). The credit computes returns [B, T] from a batch of rollouts, and the baseline
predicts them, shape [B, T] as well.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from diffmbrl.batching import map_chunks
from diffmbrl.core import Policy, State, Task, Trajectory, is_plan, parameter, reweighted
from diffmbrl.gradients.smoothed import require_key
from diffmbrl.info import EvaluationCounts, count_evaluations
from diffmbrl.rollout import returns, rollouts, weights_axis

# (trajectories, task) -> R_t, the return that each action is credited with.
Credit = Callable[[Trajectory, Task], Float[Array, "B T"]]
# (R, trajectories, task) -> b_t, its prediction.
Baseline = Callable[[Float[Array, "B T"], Trajectory, Task], Float[Array, "B T"]]


class TotalReturn(eqx.Module):
    """Credit every action with the return of the whole episode: R_t = J.

    Reference: Williams 1992 (REINFORCE).
    """

    def __call__(self, trajectories: Trajectory, task: Task) -> Float[Array, "B T"]:
        J = each_return(trajectories, task)
        return jnp.broadcast_to(J[:, None], (J.shape[0], task.horizon))


class RewardToGo(eqx.Module):
    r"""Credit an action with the rewards from its step on: $R_t = \sum_{u \ge t} w_u r_u + w_T \phi(s_T)$.

    Earlier rewards do not depend on the action. The gradient has the same mean as with `TotalReturn` and a variance that is
    commonly lower by half or more.

    Reference: Baxter and Bartlett 2001; Peters and Schaal 2008, section 2.2.
    """

    def __call__(self, trajectories: Trajectory, task: Task) -> Float[Array, "B T"]:
        earned = task.weights[..., :-1] * trajectories.r
        terminal = each_return(trajectories, reweighted(task, task.weights.at[..., :-1].set(0)))
        # From the end, so that late returns are not differences of large sums.
        return jnp.cumsum(earned[:, ::-1], axis=1)[:, ::-1] + terminal[:, None]


class NoBaseline(eqx.Module):
    """No baseline, b = 0: unbiased, with a variance that grows with the square of the mean return."""

    def __call__(self, R: Float[Array, "B T"], trajectories: Trajectory, task: Task) -> Float[Array, "B T"]:
        return jnp.zeros_like(R)


class MeanBaseline(eqx.Module):
    """The mean over the batch at each step; with `TotalReturn` the mean return.

    A sample is part of its own baseline, so the gradient's mean is exactly 1 - 1/B times the true one; its direction is
    unbiased.
    """

    def __call__(self, R: Float[Array, "B T"], trajectories: Trajectory, task: Task) -> Float[Array, "B T"]:
        return jnp.broadcast_to(jnp.mean(R, axis=0), R.shape)


class LeaveOneOut(eqx.Module):
    """The mean over the other samples of the batch at each step: unbiased.

    Raises:
        ValueError: For a batch of 1.

    Reference: Kool, van Hoof and Welling 2019, Buy 4 REINFORCE samples, get a baseline for free.
    """

    def __call__(self, R: Float[Array, "B T"], trajectories: Trajectory, task: Task) -> Float[Array, "B T"]:
        _at_least(2, R, "leave-one-out")
        # R - b = (R - mean) B / (B - 1), which does not subtract two sums over the whole batch.
        B = R.shape[0]
        return R - (R - jnp.mean(R, axis=0)) * (B / (B - 1))


class LinearBaseline(eqx.Module):
    r"""Ridge regression of R_t on $(x, x^2, \tau, \tau^2, \tau^3, 1)$, with x the features of s_t and $\tau = t/T$.

    Each call fits it and, unlike in the source, across folds: the baseline of start i is fitted to the starts of the other
    folds (its fold is i modulo `folds`), so it is unbiased, which a fit to a start's own returns is not.

    Args:
        ridge: Weight of the penalty on the coefficients, relative to regressors scaled to unit size.
        folds: Number of parts of the batch, at least 2.

    Raises:
        ValueError: For fewer than 2 folds, or a batch smaller than `folds`.

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
        # Row k sums over the starts of all folds except k.
        fold = jnp.arange(R.shape[0]) % self.folds
        others = (fold != jnp.arange(self.folds)[:, None]).astype(R.dtype)
        XtX, Xty = (jnp.tensordot(others, x, axes=1, precision="highest") for x in (XtX, Xty))
        coefficients = jax.vmap(self._solve)(XtX, Xty)
        return jnp.einsum("btp,bp->bt", X, coefficients[fold], precision="highest")

    def _solve(self, XtX: Float[Array, "p p"], Xty: Float[Array, " p"]) -> Float[Array, " p"]:
        """Solve in units in which every regressor has the same size; the ridge then has no unit, and float32 suffices."""
        size = jnp.sqrt(jnp.diagonal(XtX))
        unit = jnp.where(size > 0, 1 / jnp.where(size > 0, size, 1), 0).astype(XtX.dtype)
        scaled = XtX * unit[:, None] * unit + self.ridge.astype(XtX.dtype) * jnp.eye(len(unit), dtype=XtX.dtype)
        return unit * jax.scipy.linalg.solve(scaled, unit * Xty, assume_a="pos")


class ValueBaseline(eqx.Module):
    """A value function known beforehand, such as a critic: unbiased if it is not fitted to the same batch.

    Args:
        value: Module s -> [].
    """

    value: Callable[[State], Float[Array, ""]]

    def __call__(self, R: Float[Array, "B T"], trajectories: Trajectory, task: Task) -> Float[Array, "B T"]:
        return jax.vmap(jax.vmap(self.value))(where_alive(trajectories))


class LikelihoodRatio(eqx.Module):
    r"""The likelihood-ratio (score-function, REINFORCE) gradient: $\sum_t (R_t - b_t) \nabla_\theta \log\pi_\theta(a_t | s_t)$.

    It is unbiased for any dynamics and reward, discontinuous ones included, and needs a policy with a density `log_prob(s, a)`,
    such as `Gaussian`; `Smoothed(LikelihoodRatio(), std=...)` takes any policy. Its variance falls with the size of the noise
    and grows with T, but not with products of Jacobians.

    Args:
        credit: The return R_t of each action: `RewardToGo()` (the default) or `TotalReturn()`.
        baseline: The baseline b_t; `NoBaseline()` by default.
        remat: As in `rollout`. Not used here; for solvers that differentiate the same rollouts.

    Raises:
        ValueError: Without a key, for a policy without a density, or as the baseline.

    Cost: one rollout, and one product with the policy's derivative at all B T states; no pass back through time.
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

    credit: Credit
    baseline: Baseline
    remat: int | None = eqx.field(static=True)

    def __init__(self, credit: Credit | None = None, baseline: Baseline | None = None, *, remat: int | None = 1):
        self.credit = RewardToGo() if credit is None else credit
        self.baseline = NoBaseline() if baseline is None else baseline
        self.remat = remat

    def __call__(
        self, policy: Policy, task: Task, s0: State, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, ""], PyTree]:
        J, trajectories, advantage = self._advantages(policy, task, s0, key)
        return jnp.mean(J), _score(policy, where_alive(trajectories), trajectories.a, advantage / J.shape[0])

    def samples(
        self, policy: Policy, task: Task, s0: State, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, " B"], PyTree]:
        """Return and gradient of each start. Memory: B gradients."""
        J, trajectories, advantage = self._advantages(policy, task, s0, key)

        def one(s, a, weight):
            return jax.vjp(lambda pi: _log_probs(pi, s, a), policy)[1](weight)[0]

        return J, jax.vmap(one)(where_alive(trajectories), trajectories.a, advantage)

    def work(self, task: Task, batch: int) -> EvaluationCounts:
        """One rollout."""
        return count_evaluations(forward=task.horizon * batch, sequential=1)

    def _advantages(
        self, policy: Policy, task: Task, s0: State, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, " B"], Trajectory, Float[Array, "B T"]]:
        """Returns, rollouts and R - b of each action, which is 0 after the end of an episode."""
        require_density(policy)
        weights_axis(task, s0)  # raises for weights of another batch
        trajectories = rollouts(policy, task, s0, require_key(key), remat=None)
        R = self.credit(trajectories, task)
        advantage = jnp.where(trajectories.alive[:, :-1], R - self.baseline(R, trajectories, task), 0)
        return each_return(trajectories, task), trajectories, advantage


def require_density(policy: Policy) -> None:
    """Raise `ValueError` for a policy without `log_prob(s, a)`."""
    if not hasattr(policy, "log_prob"):
        raise ValueError(
            f"{type(policy).__name__} has no log_prob(s, a), which the score of its actions needs: put noise on it by "
            "Gaussian.around(policy, task, std=0.1), or wrap the estimator in Smoothed(..., std=0.1)"
        )


def each_return(trajectories: Trajectory, task: Task) -> Float[Array, " B"]:
    """The return of each trajectory, with its own weights if the task has them."""
    axis = None if task.weights.ndim == 1 else 0
    return jax.vmap(lambda tau, w: returns(tau, reweighted(task, w)), in_axes=(0, axis))(trajectories, task.weights)


def _score(policy: PyTree, s: State, a: Float[Array, "B T m"], weight: Float[Array, "B T"]) -> PyTree:
    """The sum over starts and steps of weight times the derivative of log pi(a | s)."""

    def total(policy):
        plan = policy if is_plan(policy) else None

        def at(x):
            s_t, a_t, weight_t, plan_t = x
            pi = policy if plan is None else plan_t
            return jnp.vdot(weight_t, jax.vmap(pi.log_prob)(s_t, a_t))

        steps = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (s, a, weight))
        # Recomputed rather than stored, so that the activations of a few steps at a time stay in the caches.
        return jnp.sum(map_chunks(jax.checkpoint(at, prevent_cse=False), (*steps, plan), a.shape[0]))

    return jax.grad(total)(policy)


def _log_probs(policy: PyTree, s: State, a: Float[Array, "T m"]) -> Float[Array, " T"]:
    """log pi(a_t | s_t) of each step of one rollout."""
    return jax.vmap(lambda pi, s, a: pi.log_prob(s, a), in_axes=(0 if is_plan(policy) else None, 0, 0))(policy, s, a)


def where_alive(trajectories: Trajectory) -> State:
    """The states, with the start state after the end of an episode, where policy and value may be undefined."""

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
