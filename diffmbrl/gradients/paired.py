r"""The pathwise and the score-function gradient of one and the same rollout, side by side: the ground of all mixtures.

For a policy that draws its actions, $a_t = \pi_\theta(s_t; \epsilon_t)$ with density $\pi_\theta(a \mid s)$, one rollout gives

$$\text{pathwise: } \sum_t \Big(\frac{\partial a_t}{\partial\theta}\Big)^{\!\top} \lambda_t,\quad
\lambda_t = \frac{dJ}{da_t}, \qquad
\text{score function: } \sum_t A_t\,\frac{\partial \log\pi_\theta(a_t \mid s_t)}{\partial\theta},\quad A_t = R_t - b_t$$

with the return to go $R_t$ and a baseline $b_t$ (`likelihood_ratio.py`). Both are derivatives of the policy at the same states,
pulled back from something for each step, so they can be compared and mixed at the level of the actions, before the network is
differentiated: of additive noise, $\lambda_t$ and $\psi_t = -A_t\,\nabla_a \log\pi(a_t \mid s_t)$ have the same conditional
mean wherever J is smooth. $\lambda$ is the gradient with respect to an additive perturbation of the actions and takes one
reverse pass without the policy's parameters; the score function takes none.

Reference: Parmas and Sugiyama 2021, A unified view of likelihood ratio and reparameterization gradients.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from diffmbrl.batching import map_chunks
from diffmbrl.core import State, Task, Trajectory, is_plan, reweighted
from diffmbrl.gradients.likelihood_ratio import LeaveOneOut, RewardToGo, each_return, where_alive
from diffmbrl.gradients.smoothed import require_key
from diffmbrl.info import EvaluationCounts, count_evaluations
from diffmbrl.policies import Gaussian, OpenLoop
from diffmbrl.rollout import returns, rollout, split_keys, step_keys, weights_axis


class Pair(NamedTuple):
    """Rollouts of a policy that draws its actions, and both of their gradients at the level of the actions."""

    J: Float[Array, " B"]
    s: State  # [B, T, ...]: what the policy saw; the start after the end of an episode
    a: Float[Array, "B T m"]
    alive: Bool[Array, "B T"]
    keys: Key[Array, " B"]
    pathwise: Float[Array, "B T m"]  # lambda_t
    advantage: Float[Array, "B T"]  # A_t; 0 after the end of an episode
    score: Float[Array, "B T m"]  # psi_t


def pair(
    policy: Any,
    task: Task,
    s0: State,
    key: PRNGKeyArray | None,
    *,
    baseline: Any = None,
    folds: int = 1,
    remat: int | None = 1,
) -> Pair:
    """Roll out and differentiate once; `baseline` (leave-one-out without) is of the starts of the same fold.

    Cost: a forward and a reverse pass over time, and the policy's log density once at each step, without a recursion.
    Raises: `ValueError` without a key or a density, or if the batch cannot be parted.
    """
    key = check_score_function(policy, s0, key, folds)

    def one(s, k, weights):
        def run(w):
            trajectory = rollout(policy, task, s, k, w=w, remat=remat)
            return returns(trajectory, reweighted(task, weights)), trajectory

        w = jnp.zeros((task.horizon, task.m), task.a_low.dtype)
        J, transpose, trajectory = jax.vjp(run, w, has_aux=True)
        return trajectory, transpose(jnp.ones_like(J))[0]

    trajectories, pathwise = jax.vmap(one, in_axes=(0, 0, weights_axis(task, s0)))(
        s0, split_keys(key, s0), task.weights
    )
    return score_function(policy, task, s0, key, trajectories, baseline, folds)._replace(pathwise=pathwise)


def check_score_function(policy: Any, s0: State, key: PRNGKeyArray | None, folds: int) -> PRNGKeyArray:
    """What every estimator with a score function asks for; the key."""
    if not hasattr(policy, "log_prob"):
        raise ValueError(
            f"{type(policy).__name__} has no log_prob(s, a), which the score of its actions needs: put noise on it by "
            "Gaussian.around(policy, task, std=0.1), or Smoothed(estimator, std=0.1)"
        )
    batch = jax.tree.leaves(s0)[0].shape[0]
    if folds < 1 or batch % folds or batch // folds < 2:
        raise ValueError(f"{batch} starts cannot be parted into {folds} folds of equal size, of 2 starts at least")
    return require_key(key)


def score_function(
    policy: Any, task: Task, s0: State, key: PRNGKeyArray, trajectories: Trajectory, baseline: Any, folds: int
) -> Pair:
    """The half that needs no derivative of the task, from the rollouts; its pathwise half is 0."""
    s, alive = where_alive(trajectories), trajectories.alive[:, :-1]
    R = RewardToGo()(trajectories, task)
    A = jnp.where(alive, R - _predicted(baseline, R, trajectories, task, folds), 0)
    psi = score_terms(policy, s, trajectories.a, A)
    nothing = jnp.zeros_like(trajectories.a)
    keys: Any = split_keys(key, s)
    return Pair(each_return(trajectories, task), s, trajectories.a, alive, keys, nothing, A, psi)


def _predicted(
    baseline: Any, R: Float[Array, "B T"], trajectories: Trajectory, task: Task, folds: int
) -> Float[Array, "B T"]:
    """The baseline of each fold, from its own starts."""
    baseline = LeaveOneOut() if baseline is None else baseline
    apart = jax.tree.map(lambda x: x.reshape(folds, -1, *x.shape[1:]), (R, trajectories))
    return jax.vmap(lambda R, tau: baseline(R, tau, task))(*apart).reshape(R.shape)


def score_terms(policy: Any, s: State, a: Float[Array, "B T m"], A: Float[Array, "B T"]) -> Float[Array, "B T m"]:
    r"""$\psi_t = -A_t \nabla_a \log\pi(a_t \mid s_t)$, for a Gaussian $A_t \epsilon_t / \sigma_t$."""

    def at(pi, s, a, A):
        return -A * jax.grad(pi.log_prob, argnums=1)(s, a)

    return jax.vmap(lambda *x: over_time(at, policy, *x))(s, a, A)


def pull_each(policy: Any, x: Pair, to_a: Float[Array, "B T m"], to_log: Float[Array, "B T"]) -> Any:
    r"""$\sum_t (\partial a_t/\partial\theta)^\top u_t + v_t\,\partial\log\pi_t/\partial\theta$ for each start: B gradients."""

    def one(y):
        s, a, k, u, v = y
        return jax.vjp(lambda pi: heads(pi, s, a, k), policy)[1]((u, v))[0]

    return map_chunks(one, (x.s, x.a, x.keys, to_a, to_log), to_log.shape[1])


def pull_mean(policy: Any, x: Pair, to_a: Float[Array, "B T m"], to_log: Float[Array, "B T"]) -> Any:
    """The mean of `pull_each`, of which one gradient is held in memory."""

    def total(policy):
        def one(y):
            s, a, k, u, v = y
            action, log_density = heads(policy, s, a, k)
            return jnp.vdot(u, action) + jnp.vdot(v, log_density)

        # Recomputed rather than kept, so that the activations of a few starts at a time stay in the caches.
        each = (x.s, x.a, x.keys, to_a, to_log)
        return jnp.sum(map_chunks(jax.checkpoint(one, prevent_cse=False), each, to_log.shape[1]))

    return jax.tree.map(lambda g: g / x.J.shape[0], jax.grad(total)(policy))


def both(policy: Any, x: Pair) -> tuple[Any, Any]:
    """The pathwise and the score-function gradient of each start."""

    def one(y):
        s, a, k, u, v = y
        _, pull_back = jax.vjp(lambda pi: heads(pi, s, a, k), policy)
        return pull_back((u, jnp.zeros_like(v)))[0], pull_back((jnp.zeros_like(u), v))[0]

    return map_chunks(one, (x.s, x.a, x.keys, x.pathwise, x.advantage), x.advantage.shape[1])


def heads(
    policy: Any, s: State, a: Float[Array, "T m"], key: PRNGKeyArray
) -> tuple[Float[Array, "T m"], Float[Array, " T"]]:
    """The action, by its noise, and the log density of what was done, at each step of one rollout."""

    def at(pi, s, a, t):
        # With its mean in hand a policy is differentiated once for both.
        pi = Gaussian(OpenLoop(pi.mean(s)), pi.log_std) if isinstance(pi, Gaussian) else pi
        return noisy_action(pi, s, key, t), pi.log_prob(s, a)

    return over_time(at, policy, s, a, _steps(a))


def _steps(x: Float[Array, "T *m"]) -> Int[Array, " T"]:
    return jnp.arange(x.shape[0])


def noisy_action(policy: Any, s: State, key: PRNGKeyArray, t: Any) -> Float[Array, " m"]:
    """The policy with the noise that `rollout` draws at step t."""
    return policy(s, key=step_keys(key, t)[0])


def over_time(at: Any, policy: Any, *xs: Any) -> Any:
    """`at(pi, ...)` for each step, with slice t of a plan."""
    axes = (0 if is_plan(policy) else None, *(0 for _ in xs))
    return jax.vmap(at, in_axes=axes)(policy, *xs)


def paired_evaluations(task: Task, batch: int, remat: int | None) -> EvaluationCounts:
    """One forward and one reverse pass, whatever is made of it."""
    passes = 1 if remat is None else 2 if remat == 1 else 3
    steps = task.horizon * batch
    return count_evaluations(forward=passes * steps, vjp=steps, sequential=passes + 1)
