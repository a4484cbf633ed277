r"""The response of a closed loop to noise in its actions, start by start and step by step.

Noise in the actions, $w_t \sim N(0, h^2)$ with h the half width of the limits (1 where there are none), spreads the states of a
rollout with covariance

$$\Sigma_{t+1} = (A_t + B_t K_t)\,\Sigma_t\,(A_t + B_t K_t)^\top + B_t h^2 B_t^\top,\qquad \Sigma_0 = 0,$$

and the expected cost of step t grows by half of $m_t = \mathrm{tr}(Z_t^\top H_t Z_t \Sigma_t)$, with $Z^\top = [I\;K^\top]$.
The sum of $m_t$ over time is, up to the scale h and the actions' own part, the trace of the matrix M of the Gauss-Newton
model. After one rollout leaves its region, its $m_t$ grows by orders of magnitude and fills M, the gradient and every
Krylov space with directions that carry no information.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from diffmbrl.core import Policy, State, Task
from diffmbrl.policies import centre_and_half
from diffmbrl.second_order.curvature import linearize_rollouts
from diffmbrl.second_order.linearize import Linearization
from diffmbrl.second_order.riccati import closed_loop
from diffmbrl.second_order.small_matrices import matmul


def sensitivity(policy: Policy, task: Task, s0: State, key: PRNGKeyArray | None = None) -> Float[Array, "T B"]:
    """Sensitivities m_t of a policy's rollouts for t = 1 to T, the last of the terminal cost.

    Args:
        policy: Policy or plan.
        task: Task.
        s0: Start states, leaves of shape [B, ...].
        key: Key of the noise in policy and dynamics; None without noise.

    Returns:
        The sensitivities, one column for each start.

    Cost: One rollout and its linearisation, and a recursion of n x n matrices.

    >>> from diffmbrl import Linear, tasks
    >>> task = tasks.lqr(horizon=10)
    >>> sensitivity(Linear.zeros(task), task, task.starts(jax.random.key(0), 4)).shape
    (10, 4)
    """
    _, _, lin, K = linearize_rollouts(policy, task, s0, key)
    return sensitivity_along(lin, K, task)


def sensitivity_along(lin: Linearization, K: Float[Array, "T m n B"], task: Task) -> Float[Array, "T B"]:
    """`sensitivity` along rollouts that are already linearised.

    Args:
        lin: Derivatives along the rollouts.
        K: Gains of the policy.
        task: Task.

    Returns:
        The sensitivities, one column for each start.
    """
    _, h = centre_and_half(task.a_low, task.a_high)
    n = task.n
    loop = closed_loop(lin, K)

    def step(covariance, x):
        A, B, H = x
        m = jnp.sum(H * covariance, axis=(0, 1))
        noise = B * h[:, None]
        carried = matmul(matmul(A, covariance), jnp.swapaxes(A, 0, 1))
        return carried + matmul(noise, jnp.swapaxes(noise, 0, 1)), m

    last, m = jax.lax.scan(step, jnp.zeros_like(lin.H_T), (loop.A, loop.B, loop.H[:, :n, :n]))
    m_T = jnp.sum(lin.H_T * last, axis=(0, 1))
    return jnp.concatenate([m[1:], m_T[None]])


def growth(policy: Policy, task: Task, s0: State, key: PRNGKeyArray | None = None) -> Float[Array, " B"]:
    r"""Growth of perturbations per step along each rollout, $\rho_i = |\Phi_i|_F^{1/T}$ with $\Phi = \prod_t (A_t + B_t K_t)$.

    With a discount $\gamma$ the matrix M stays bounded for every horizon while $\gamma \rho^2 < 1$. The product is rescaled at
    every step, so that it cannot overflow.

    Args:
        policy: Policy or plan.
        task: Task.
        s0: Start states, leaves of shape [B, ...].
        key: Key of the noise in policy and dynamics; None without noise.

    Returns:
        The growth, below 1 where perturbations of the start die out.

    Cost: As `sensitivity`.
    Reference: Benettin et al. 1980 (the largest Lyapunov exponent is log rho as T grows).

    >>> from diffmbrl import Linear, tasks
    >>> task = tasks.lqr(horizon=50)
    >>> growth(Linear.zeros(task), task, task.starts(jax.random.key(0), 2)).round(2)
    Array([1.03, 1.03], dtype=float32)
    """
    _, _, lin, K = linearize_rollouts(policy, task, s0, key)
    A = closed_loop(lin, K).A
    tiny = jnp.finfo(A.dtype).tiny

    def step(product, A):
        product = matmul(A, product)
        size = jnp.maximum(jnp.sqrt(jnp.sum(product**2, axis=(0, 1))), tiny)
        return product / size, jnp.log(size)

    n, batch = A.shape[1], A.shape[3]
    start = jnp.broadcast_to(jnp.eye(n, dtype=A.dtype)[:, :, None], (n, n, batch)) / n**0.5
    _, logs = jax.lax.scan(step, start, A)
    return jnp.exp(jnp.mean(logs, axis=0))


def trust(m: Float[Array, "T B"], bound: Float[Array, ""]) -> Float[Array, "B T1"]:
    r"""Weights over time for each start: 1 while its sensitivity is usual, falling as it grows beyond.

    $$w_{i,t} = \min\Big(1,\; \kappa\,\frac{\mathrm{median}_j \max_{\tau<T} m_{j,\tau}}{\max_{\tau\le t} m_{i,\tau}}\Big)$$

    No step of any start then adds more than $\kappa$ times the usual to the trace of M. The measure is relative to the other
    starts, so it has no units, and changes nothing while most starts are sensitive: then a discount helps.

    Args:
        m: Sensitivities, one column for each start.
        bound: $\kappa$; infinity trusts everything.

    Returns:
        The weights; the terminal reward has that of the last step.

    >>> m = jnp.array([[1.0, 1.0, 1.0], [1.0, 1.0, 40.0], [1.0, 1.0, 40.0]])
    >>> trust(m, jnp.array(10.0)).tolist()
    [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.25, 0.25]]
    """
    peak = jax.lax.cummax(jnp.where(jnp.isnan(m), jnp.inf, m), axis=0)
    peak = jnp.concatenate(
        [jnp.zeros_like(peak[:1]), peak[:-1], peak[-2:-1] if m.shape[0] > 1 else jnp.zeros_like(peak[:1])]
    )
    usual = jnp.median(peak[-1])
    allowed = bound.astype(m.dtype) * usual
    # Without any curvature, or with most sensitivities infinite, no sensitivity is usual.
    trusted = (peak <= allowed) | ~(usual > 0) | ~jnp.isfinite(allowed)
    return jnp.where(trusted, 1.0, allowed / jnp.where(trusted, 1.0, peak)).T.astype(m.dtype)
