r"""The pathwise and the score-function gradient of the same rollouts, for estimators that mix or compare the two.

For a policy that draws its actions, $a_t = \pi_\theta(s_t; \epsilon_t)$ with density $\pi_\theta(a \mid s)$, one rollout gives

$$\text{pathwise: } \sum_t \Big(\frac{\partial a_t}{\partial\theta}\Big)^{\!\top} \lambda_t,\quad
\lambda_t = \frac{dJ}{da_t}, \qquad
\text{score function: } \sum_t A_t\,\frac{\partial \log\pi_\theta(a_t \mid s_t)}{\partial\theta},\quad A_t = R_t - b_t$$

with the return to go $R_t$ and a baseline $b_t$ (`likelihood_ratio.py`). Both are vector-Jacobian products of the policy at the
same states, with one cotangent for each step, so they can be compared and mixed at the level of the actions, before the
network is differentiated. With additive noise, $\lambda_t$ and $\psi_t = -A_t\,\nabla_a \log\pi(a_t \mid s_t)$ have the same
conditional mean wherever J is smooth. $\lambda$ is the gradient with respect to an additive perturbation of the actions; it
takes one reverse pass without the policy's parameters, and the score function takes none.

An estimator weighs the two (`mixing.py`), one weight for each parameter (`both`, then `mix`) or for each time step
(`mixed_gradient`, `mixed_samples`).

Reference: Parmas and Sugiyama 2021, A unified view of likelihood ratio and reparameterization gradients.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, PyTree

from diffmbrl.batching import map_chunks
from diffmbrl.core import Policy, State, Task, Trajectory, is_plan, reweighted
from diffmbrl.gradients.likelihood_ratio import (
    Baseline,
    LeaveOneOut,
    RewardToGo,
    each_return,
    require_density,
    where_alive,
)
from diffmbrl.gradients.mixing import mix
from diffmbrl.gradients.smoothed import require_key
from diffmbrl.info import EvaluationCounts, count_evaluations
from diffmbrl.policies import Gaussian, OpenLoop
from diffmbrl.rollout import returns, rollout, split_keys, step_keys, weights_axis


class Pair(NamedTuple):
    """Rollouts of a policy that draws its actions, and both gradients at the level of the actions.

    Args:
        J: Return of each start, shape [B].
        s: States that the policy saw, shape [B, T, ...]; the start state after the end of an episode.
        a: Actions, shape [B, T, m].
        alive: Whether the episode had not ended at s_t, shape [B, T].
        keys: Key of each start's rollout, shape [B].
        pathwise: lambda_t, shape [B, T, m].
        advantage: A_t, shape [B, T]; 0 after the end of an episode.
        score: psi_t, shape [B, T, m].
    """

    J: Float[Array, " B"]
    s: State
    a: Float[Array, "B T m"]
    alive: Bool[Array, "B T"]
    keys: Key[Array, " B"]
    pathwise: Float[Array, "B T m"]
    advantage: Float[Array, "B T"]
    score: Float[Array, "B T m"]


def pair(
    policy: Policy,
    task: Task,
    s0: State,
    key: PRNGKeyArray | None,
    *,
    baseline: Baseline | None = None,
    folds: int = 1,
    remat: int | None = 1,
) -> Pair:
    """Roll out and differentiate once.

    Args:
        policy: A policy with a density, such as `Gaussian`.
        task: The task.
        s0: Start states, shape [B, ...].
        key: Key of the noise.
        baseline: Baseline of the score function, fitted in each fold to its own starts; None for leave-one-out.
        folds: Number of equal parts of the batch.
        remat: As in `rollout`.

    Returns:
        The rollouts and both gradients at the level of the actions.

    Raises:
        ValueError: Without a key or a density, or if the batch cannot be divided into the folds.

    Cost: a forward and a reverse pass over time, and the policy's log density once at each step, without a recursion.
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
    return score_function(policy, task, key, trajectories, baseline, folds)._replace(pathwise=pathwise)


def check_score_function(policy: Policy, s0: State, key: PRNGKeyArray | None, folds: int) -> PRNGKeyArray:
    """Return the key, or raise `ValueError` if a score function cannot be estimated: no density, no key, too few starts."""
    require_density(policy)
    batch = jax.tree.leaves(s0)[0].shape[0]
    if folds < 1 or batch % folds or batch // folds < 2:
        raise ValueError(
            f"{batch} starts cannot be divided into {folds} folds of equal size, of at least 2 starts each; choose a batch "
            f"that is a multiple of {max(folds, 1)}, of at least {2 * max(folds, 1)} starts"
        )
    return require_key(key)


def score_function(
    policy: PyTree,
    task: Task,
    key: PRNGKeyArray,
    trajectories: Trajectory,
    baseline: Baseline | None,
    folds: int,
) -> Pair:
    """The score function's half, which needs no derivative of the task; the pathwise half is 0."""
    s, alive = where_alive(trajectories), trajectories.alive[:, :-1]
    R = RewardToGo()(trajectories, task)
    A = jnp.where(alive, R - _predicted(baseline, R, trajectories, task, folds), 0)
    psi = score_terms(policy, s, trajectories.a, A)
    nothing = jnp.zeros_like(trajectories.a)
    keys: Any = split_keys(key, s)
    return Pair(each_return(trajectories, task), s, trajectories.a, alive, keys, nothing, A, psi)


def _predicted(
    baseline: Baseline | None, R: Float[Array, "B T"], trajectories: Trajectory, task: Task, folds: int
) -> Float[Array, "B T"]:
    """The baseline of each fold, from its own starts."""
    baseline = LeaveOneOut() if baseline is None else baseline
    apart = jax.tree.map(lambda x: x.reshape(folds, -1, *x.shape[1:]), (R, trajectories))
    return jax.vmap(lambda R, tau: baseline(R, tau, task))(*apart).reshape(R.shape)


def score_terms(policy: PyTree, s: State, a: Float[Array, "B T m"], A: Float[Array, "B T"]) -> Float[Array, "B T m"]:
    r"""$\psi_t = -A_t \nabla_a \log\pi(a_t \mid s_t)$, for a Gaussian $A_t \epsilon_t / \sigma_t$."""

    def at(pi, s, a, A):
        return -A * jax.grad(pi.log_prob, argnums=1)(s, a)

    return jax.vmap(lambda *x: over_time(at, policy, *x))(s, a, A)


def mixed_gradient(policy: PyTree, x: Pair, k: Float[Array, "F T"]) -> PyTree:
    r"""The mean over starts of the mixture with weight $k_t$ of the pathwise estimate at each step.

    $$\sum_t \Big(\frac{\partial a_t}{\partial\theta}\Big)^{\!\top} k_t \lambda_t
      + (1 - k_t)\,A_t\,\frac{\partial\log\pi_t}{\partial\theta}$$

    Memory: one gradient.
    """

    def total(policy):
        def one(y):
            s, a, k, u, v = y
            action, log_density = _heads(policy, s, a, k)
            return jnp.vdot(u, action) + jnp.vdot(v, log_density)

        # Recomputed rather than stored, so that the activations of a few starts at a time stay in the caches.
        each = (x.s, x.a, x.keys, *_cotangents(k, x))
        return jnp.sum(map_chunks(jax.checkpoint(one, prevent_cse=False), each, x.a.shape[1]))

    return jax.tree.map(lambda g: g / x.J.shape[0], jax.grad(total)(policy))


def mixed_samples(policy: PyTree, x: Pair, k: Float[Array, "F T"]) -> PyTree:
    """The mixture of each start, whose mean is `mixed_gradient`. Memory: B gradients."""

    def one(y):
        s, a, k, u, v = y
        return jax.vjp(lambda pi: _heads(pi, s, a, k), policy)[1]((u, v))[0]

    return map_chunks(one, (x.s, x.a, x.keys, *_cotangents(k, x)), x.a.shape[1])


def both(policy: PyTree, x: Pair) -> tuple[PyTree, PyTree]:
    """The pathwise and the score-function gradient of each start. Memory: 2 B gradients."""

    def one(y):
        s, a, k, u, v = y
        _, pull_back = jax.vjp(lambda pi: _heads(pi, s, a, k), policy)
        return pull_back((u, jnp.zeros_like(v)))[0], pull_back((jnp.zeros_like(u), v))[0]

    return map_chunks(one, (x.s, x.a, x.keys, x.pathwise, x.advantage), x.advantage.shape[1])


def over_starts(J: Float[Array, " B"], samples: PyTree) -> tuple[Float[Array, ""], PyTree]:
    """The means of the returns and of the gradients over the starts."""
    return jnp.mean(J), jax.tree.map(lambda x: jnp.mean(x, axis=0), samples)


def split_cotangents(
    k: Float[Array, "F *n"], pathwise: Float[Array, "B *n m"], advantage: Float[Array, "B *n"]
) -> tuple[Float[Array, "B *n m"], Float[Array, "B *n"]]:
    """The cotangents of the action and of its log density in the mixture with weight k of the pathwise estimate."""
    return mix(k, pathwise, jnp.zeros_like(pathwise)), mix(k, jnp.zeros_like(advantage), advantage)


def _cotangents(k: Float[Array, "F T"], x: Pair) -> tuple[Float[Array, "B T m"], Float[Array, "B T"]]:
    return split_cotangents(k, x.pathwise, x.advantage)


def _heads(
    policy: PyTree, s: State, a: Float[Array, "T m"], key: PRNGKeyArray
) -> tuple[Float[Array, "T m"], Float[Array, " T"]]:
    """The action as a function of its noise, and the log density of the action taken, at each step of one rollout."""

    def at(pi, s, a, t):
        # The mean is evaluated once, so that the policy is differentiated once for both.
        pi = Gaussian(OpenLoop(pi.mean(s)), pi.log_std) if isinstance(pi, Gaussian) else pi
        return noisy_action(pi, s, key, t), pi.log_prob(s, a)

    return over_time(at, policy, s, a, jnp.arange(a.shape[0]))


def noisy_action(policy: Policy, s: State, key: PRNGKeyArray, t: Int[Array, ""]) -> Float[Array, " m"]:
    """The policy's action with the noise that `rollout` draws at step t."""
    return policy(s, key=step_keys(key, t)[0])


def over_time(at: Callable[..., PyTree], policy: PyTree, *xs: PyTree) -> PyTree:
    """`at(pi, ...)` for each step, with slice t of a plan."""
    axes = (0 if is_plan(policy) else None, *(0 for _ in xs))
    return jax.vmap(at, in_axes=axes)(policy, *xs)


def paired_evaluations(task: Task, batch: int, remat: int | None) -> EvaluationCounts:
    """Dynamics evaluations of one forward and one reverse pass."""
    passes = 1 if remat is None else 2 if remat == 1 else 3
    steps = task.horizon * batch
    return count_evaluations(forward=passes * steps, vjp=steps, sequential=passes + 1)
