r"""The quadratic model of a policy's return: gradient and Gauss-Newton matrix of -J, through the rollout.

Batch rollout i is linearised along itself. With L the closed loop's response of (s, a) to an additive perturbation w of the
actions, H the projected Hessian of the costs and $G_t = d\pi/d\theta$ at $s_t$,

$$\nabla_\theta(-J) = \tfrac1B \sum_i G^\top g,\quad g = L^\top c, \qquad N = \tfrac1B \sum_i G^\top M G,\quad M = L^\top H L.$$

M is the Hessian of the LQR problem along the trajectory, so M v costs one forward and one backward linear recursion of n x n
matrices; the network enters only through G and its transpose, batched over all B T states, with no recursion in it.

Reference: Schraudolph 2002, section 3 (products); Sideris and Bobrow 2005 (the LQR structure of M).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from diffmbrl.batching import map_chunks
from diffmbrl.core import Policy, State, Task, Trajectory, is_plan, reweighted
from diffmbrl.policies import Gaussian
from diffmbrl.rollout import mean_return, returns, rollout, split_keys, step_keys, weights_axis
from diffmbrl.second_order.linearize import Linearization, feedback, linearize
from diffmbrl.second_order.riccati import adjoint, closed_loop, respond, riccati
from diffmbrl.second_order.small_matrices import matvec

Vector = Float[Array, " P"]


class Curved(NamedTuple):
    """-J near theta by its value, its gradient and the products of one symmetric matrix.

    Args:
        J: Mean return at theta.
        gradient: Gradient of -J.
        product: Product of the matrix with a vector.
    """

    J: Float[Array, ""]
    gradient: Vector
    product: Callable[[Vector], Vector]


class CurvatureModel(NamedTuple):
    """The Gauss-Newton model of -J near theta, for a batch of B starts.

    The batch is the last axis along the trajectories: the recursions over time, tiny in n and m, run over contiguous numbers.

    Args:
        J: Mean return at theta.
        gradient: Gradient of -J.
        product: v -> N v.
        push: v -> G v, the change of all actions along the trajectories.
        pull: w -> G' w / B.
        trajectory: Rollouts, leaves of shape [T, B, ...].
        linearization: Their derivatives, leaves of shape [T, ..., B].
        K: Gains of the policy along them.
        g: Gradients d(-J_i)/dw in perturbations of the actions.
    """

    J: Float[Array, ""]
    gradient: Vector
    product: Callable[[Vector], Vector]
    push: Callable[[Vector], Float[Array, "T m B"]]
    pull: Callable[[Float[Array, "T m B"]], Vector]
    trajectory: Trajectory
    linearization: Linearization
    K: Float[Array, "T m n B"]
    g: Float[Array, "T m B"]


AXES: Any = (1, 1, 1, 1, 0)
TIME_FIRST = Trajectory(*AXES)  # the batch axis of each leaf of stacked trajectories, time first


def gauss_newton(
    policy: Policy, task: Task, s0: State, key: PRNGKeyArray | None = None, *, chunk: int | None = None
) -> CurvatureModel:
    """Build the Gauss-Newton model of -J, with products by G and its transpose linearised once.

    Args:
        policy: Policy or plan, linearised at its parameters.
        task: Task.
        s0: Start states, leaves of shape [B, ...].
        key: Key of the noise in policy and dynamics; None without noise.
        chunk: Number of time steps whose B states go through the network at a time. None: on a CPU as many as make
            `batching.ROWS` states, whose activations fit in the caches, elsewhere all T. The numbers are the same.

    Returns:
        The model.

    Raises:
        TypeError: If a state has leaves that are not float.

    Cost: One rollout and its linearisation; each product about .7 of a BPTT gradient.

    >>> import jax
    >>> from diffmbrl import Linear, tasks
    >>> task = tasks.lqr(horizon=10)
    >>> model = gauss_newton(Linear.zeros(task), task, task.starts(jax.random.key(0), 8))
    >>> model.product(model.gradient).shape
    (3,)
    """
    J, trajectory, lin, K = linearize_rollouts(policy, task, s0, key)
    g = adjoint(lin.A, lin.B, K, lin.c_s, lin.c_a, lin.c_T)
    batch = g.shape[-1]
    theta, unravel = ravel_pytree(policy)
    _, push = jax.linearize(lambda x: actions(unravel(x), trajectory.s, split_keys(key, s0), chunk), theta)
    transpose = jax.linear_transpose(push, theta)

    def pull(w: Array) -> Vector:
        return transpose(w / batch)[0]

    def product(v: Vector) -> Vector:
        return pull(curve(lin, K, push(v)))

    return CurvatureModel(jnp.mean(J), pull(g), product, push, pull, trajectory, lin, K, g)


def hessian(policy: Policy, task: Task, s0: State, key: PRNGKeyArray | None = None) -> Curved:
    r"""Build the model of -J with its true, indefinite Hessian, $v \mapsto \nabla^2_\theta(-J)\,v$ by forward over reverse.

    Args:
        policy: Policy or plan, at whose parameters the Hessian is taken.
        task: Task.
        s0: Start states, leaves of shape [B, ...].
        key: Key of the noise in policy and dynamics; None without noise.

    Returns:
        Value, gradient and products.

    Cost: The rollout and its reverse pass are linearised once, in memory that grows with B T; a product takes a tangent of
    both, about 2.4 BPTT gradients.
    Reference: Pearlmutter 1994.

    >>> import jax
    >>> from diffmbrl import Linear, tasks
    >>> task = tasks.lqr(horizon=10)
    >>> model = hessian(Linear.zeros(task), task, task.starts(jax.random.key(0), 8))
    >>> model.product(model.gradient).shape
    (3,)
    """
    theta, unravel = ravel_pytree(policy)

    def cost(x):
        return -mean_return(unravel(x), task, s0, key)

    (J, gradient), push = jax.linearize(jax.value_and_grad(cost), theta)
    return Curved(-J, gradient, lambda v: push(v)[1])


def fisher(policy: Policy, task: Task, s0: State, key: PRNGKeyArray | None = None) -> Curved:
    r"""Build the model of -J with the Fisher matrix of a Gaussian policy along its own rollouts.

    $$F = \tfrac1B\sum_{i,t} w_t\,(G_t^\top \Sigma^{-1} G_t \oplus 2 I_{\log\sigma}),\qquad
    \mathrm{KL}(\pi_\theta, \pi_{\theta+d}) = \tfrac12 d^\top F d + O(d^3)$$

    summed over the steps of an episode, with G the derivative of the mean. It contains no derivative of the dynamics.

    Args:
        policy: Gaussian policy.
        task: Task.
        s0: Start states, leaves of shape [B, ...].
        key: Key of the noise in policy and dynamics; None without noise.

    Returns:
        Value and gradient of -J, and products with the Fisher matrix.

    Raises:
        TypeError: If the policy is not `Gaussian`: a deterministic one has no Fisher matrix.

    Reference: Amari 1998; Kakade 2001, section 2.

    >>> import jax
    >>> from diffmbrl import Gaussian, Linear, tasks
    >>> task = tasks.lqr(horizon=10)
    >>> policy = Gaussian.around(Linear.zeros(task), task, std=0.1)
    >>> model = fisher(policy, task, task.starts(jax.random.key(0), 8))
    >>> model.product(model.gradient).shape
    (4,)
    """
    if not isinstance(policy, Gaussian):
        raise TypeError(
            f"the Fisher matrix needs a Gaussian policy, as Gaussian.around(policy, ...); got {type(policy).__name__}"
        )
    theta, unravel = ravel_pytree(policy)
    J, gradient = jax.value_and_grad(lambda x: mean_return(unravel(x), task, s0, key))(theta)
    trajectory = jax.vmap(lambda s, k: rollout(policy, task, s, k), out_axes=TIME_FIRST)(s0, split_keys(key, s0))
    w = task.weights if task.weights.ndim == 2 else task.weights[None]
    weights = w[:, :-1].T * trajectory.alive[:-1].astype(w.dtype) / trajectory.alive.shape[1]

    def distribution(x):
        pi = unravel(x)
        return actions(pi.mean, trajectory.s, None, None), pi.log_std

    _, push = jax.linearize(distribution, theta)
    pull = jax.linear_transpose(push, theta)

    def product(v: Vector) -> Vector:
        mean, log_std = push(v)
        mean = mean * weights[:, None] / jnp.exp(2 * policy.log_std)[None, :, None]
        return pull((mean, 2 * jnp.sum(weights) * log_std))[0]

    return Curved(J, -gradient, product)


def linearize_rollouts(
    policy: Policy, task: Task, s0: State, key: PRNGKeyArray | None
) -> tuple[Float[Array, " B"], Trajectory, Linearization, Float[Array, "T m n B"]]:
    """Roll a policy out from a batch of starts and linearise every rollout, with the axes of `CurvatureModel`.

    Args:
        policy: Policy or plan.
        task: Task.
        s0: Start states, leaves of shape [B, ...].
        key: Key of the noise in policy and dynamics; None without noise.

    Returns:
        Returns, rollouts, their linearisation, and the policy's gains along them.
    """

    def one(s, k, w):
        weighted = reweighted(task, w)
        trajectory = rollout(policy, weighted, s, k)
        lin = linearize(weighted, trajectory, k)
        return returns(trajectory, weighted), trajectory, lin, feedback(policy, trajectory, k)

    batched = jax.vmap(one, in_axes=(0, 0, weights_axis(task, s0)), out_axes=(0, TIME_FIRST, -1, -1))
    return batched(s0, split_keys(key, s0), task.weights)


def planner_step(
    lin: Linearization, K: Float[Array, "T m n B"], sigma: Float[Array, ""], c: Float[Array, "T m B"]
) -> Float[Array, "T m B"]:
    r"""Compute $-(M + \sigma I)^{-1} c$ for each rollout by one Riccati sweep over its closed loop.

    Args:
        lin: Derivatives along the rollouts.
        K: Gains of the policy.
        sigma: Damping of the actions.
        c: Gradients in the actions; with c = g the result is the planner's step.

    Returns:
        Changes of the actions.
    """
    loop = closed_loop(lin, K)._replace(c_s=jnp.zeros_like(lin.c_s), c_a=c, c_T=jnp.zeros_like(lin.c_T))
    sweep = riccati(loop, sigma)
    return respond(loop.A, loop.B, sweep.K, sweep.k)[1]


def curve(lin: Linearization, K: Float[Array, "T m n B"], w: Float[Array, "T m B"]) -> Float[Array, "T m B"]:
    """Compute M w for each rollout: forward through L, times H, back through its transpose.

    Args:
        lin: Derivatives along the rollouts.
        K: Gains of the policy.
        w: Perturbations of the actions.

    Returns:
        The products.
    """
    n = lin.c_s.shape[1]
    s, a, s_T = respond(lin.A, lin.B, K, w)
    y = jax.vmap(matvec)(lin.H, jnp.concatenate([s, a], axis=1))
    y_T = matvec(lin.H_T, s_T)
    return adjoint(lin.A, lin.B, K, y[:, :n], y[:, n:], y_T)


def actions(policy: Policy, s: State, keys: Key[Array, " B"] | None, chunk: int | None) -> Float[Array, "T m B"]:
    """Evaluate a policy at every state of stacked trajectories, with no recursion over time.

    Args:
        policy: Policy or plan.
        s: States, leaves of shape [T, B, ...].
        keys: Keys of the rollouts; None without noise.
        chunk: Number of time steps in one batch, as for `gauss_newton`.

    Returns:
        The actions.
    """
    T = jax.tree.leaves(s)[0].shape[0]
    plan = policy if is_plan(policy) else None

    def at(x):
        t, s_t, plan_t = x
        pi = policy if plan is None else plan_t
        return jax.vmap(lambda s, k: action_at(pi, s, k, t), out_axes=-1)(s_t, keys)

    xs = (jnp.arange(T), s, plan)
    return map_chunks(at, xs, jax.tree.leaves(s)[0].shape[1], chunk)


def action_at(policy: Policy, s: State, key: PRNGKeyArray | None, t: Int[Array, ""]) -> Float[Array, " m"]:
    """Evaluate a policy at time step t of the rollout whose key is given.

    Args:
        policy: Policy, or a plan's slice t.
        s: State s_t.
        key: The rollout's key; None without noise.
        t: Time step.

    Returns:
        The action.
    """
    return policy(s, key=step_keys(key, t)[0])
