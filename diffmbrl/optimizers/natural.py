"""The natural gradient: steps of equal change of the policy's distribution, whatever its parameters."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray

from diffmbrl.core import Info, State, Task, as_float, count_work
from diffmbrl.curvature import fisher
from diffmbrl.krylov import lanczos
from diffmbrl.rollout import expected


class NaturalGradient(eqx.Module):
    r"""The pathwise gradient in the Fisher metric of a Gaussian policy, with a path of trust-region radii.

    $$d(\delta) = -\sqrt{2\delta / (g^\top F_\lambda^{-1} g)}\;F_\lambda^{-1} g,\qquad F_\lambda = F + \lambda\,\rho_{max} I$$

    so that every candidate has a KL divergence of about $\delta$ from the policy it leaves, summed over an episode. The true
    return of each radius, from one vmapped rollout, picks; the return never falls. M, the dynamics' part of Gauss-Newton, is
    replaced by the identity in units of the noise: the comparison says what the dynamics' curvature is worth.

    Shapes: policy leaves any; `s0` [B, ...]. Cost: one BPTT gradient, `rank` products through the network alone, and B rollouts
    for each radius.
    Raises: `TypeError` for a policy that is not `Gaussian`.
    Reference: Amari 1998; Kakade 2001; Schulman et al. 2015, appendix C (the radius), there with sampled gradients.

    >>> import jax
    >>> from diffmbrl import Gaussian, Neural, solve, tasks
    >>> task = tasks.cartpole_balance(horizon=20)
    >>> key = jax.random.key(0)
    >>> policy = Gaussian.around(Neural.init(task, key=key), task, std=0.5)
    >>> policy, history = solve(NaturalGradient(), policy, task, task.starts(key, 8), None, steps=3)
    >>> bool(history.info.J[-1] > history.info.J[0])
    True
    """

    radii: Float[Array, " k"] = eqx.field(
        default_factory=lambda: jnp.logspace(-4, 3, 12, dtype=float), converter=as_float
    )
    damping: Float[Array, ""] = eqx.field(default_factory=lambda: as_float(1e-4), converter=as_float)
    rank: int = eqx.field(static=True, default=10)

    @property
    def kind(self) -> str:
        """It takes a batch of starts."""
        return "policy"

    def init(self, policy: Any, task: Task) -> Float[Array, ""]:
        return jnp.ones((), ravel_pytree(policy)[0].dtype)  # the factor on all radii

    def update(
        self, policy: Any, carry: Float[Array, ""], task: Task, s0: State, *, key: PRNGKeyArray | None
    ) -> tuple[Any, Float[Array, ""], Info]:
        theta, unravel = ravel_pytree(policy)
        model = fisher(policy, task, s0, key)
        space = lanczos(model.product, model.gradient, self.rank)
        space = space._replace(values=jnp.maximum(space.values, 0))
        top = jnp.max(space.values)
        damping = self.damping.astype(theta.dtype) * jnp.where(top > 0, top, 1.0)
        step, _ = space.step(damping)
        slope = jnp.maximum(-(model.gradient @ step), jnp.finfo(theta.dtype).tiny)
        radii = carry * self.radii.astype(theta.dtype)
        steps = jnp.sqrt(2 * radii / slope)[:, None] * step
        returns = jax.vmap(lambda d: expected(unravel(theta + d), task, s0, key))(steps)
        finite = jnp.isfinite(model.J) & jnp.all(jnp.isfinite(model.gradient))
        best = jnp.argmax(jnp.where(jnp.isfinite(returns), returns, -jnp.inf))
        accepted = finite & jnp.isfinite(returns[best]) & (returns[best] > model.J)
        policy = unravel(jnp.where(accepted, theta + steps[best], theta))
        moved = jnp.where(accepted, jnp.minimum(carry * 10, 1.0), carry / 10)
        batch_steps = jax.tree.leaves(s0)[0].shape[0] * task.horizon
        info = Info(
            J=model.J,
            gradient_norm=jnp.linalg.norm(model.gradient),
            accepted=accepted,
            damping=damping,
            inner_iterations=space.products,
            nonfinite=jnp.sum(~jnp.isfinite(returns), dtype=jnp.int32) + (~finite).astype(jnp.int32),
            work=count_work(
                # The gradient's rollout and its recomputation, the rollout that F stands on, the candidates.
                forward=batch_steps * (3 + radii.shape[0]),
                vjp=batch_steps,
                sequential=3 + 1 + 1,
            ),
        )
        return policy, jnp.where(finite, moved, carry), info
