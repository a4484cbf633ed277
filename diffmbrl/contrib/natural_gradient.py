"""The natural gradient: steps of equal change of the policy's distribution in every parameterisation."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray

from diffmbrl.core import Policy, State, Task, as_float, restart
from diffmbrl.info import Info, count_evaluations
from diffmbrl.optimizers.damped_update import damped_update
from diffmbrl.optimizers.damping import Choice, Evaluate, best_of, scale
from diffmbrl.rollout import mean_return
from diffmbrl.second_order.curvature import fisher
from diffmbrl.second_order.krylov import Spectral, lanczos


class KLGrid(eqx.Module):
    """Take the best of a dozen steps along one direction, each to a KL divergence, by true returns from one vmapped rollout.

    All radii shrink tenfold when none of them improves the return, and grow back as steps are accepted again.

    Args:
        radii: KL divergences, summed over an episode.
        damping: Damping of the direction, relative to the largest eigenvalue.
    """

    radii: Float[Array, " k"] = eqx.field(
        default_factory=lambda: jnp.logspace(-4, 3, 12, dtype=float), converter=as_float
    )
    damping: Float[Array, ""] = eqx.field(default_factory=lambda: as_float(1e-4), converter=as_float)

    def start(self, dtype: jnp.dtype) -> Float[Array, ""]:
        """The factor on all radii before the first update."""
        return jnp.ones((), dtype)

    def choose(
        self, carry: Float[Array, ""], space: Spectral, J: Float[Array, ""], evaluate: Evaluate
    ) -> tuple[Array, Choice]:
        """The next carry, and the step."""
        damping = self.damping.astype(carry.dtype) * scale(space)
        step, _ = space.step(damping)
        slope = jnp.sum(space.coefficients**2 / (space.values + damping))  # -g'd
        radii = carry * self.radii.astype(carry.dtype)
        lengths = jnp.sqrt(2 * radii / jnp.maximum(slope, jnp.finfo(J.dtype).tiny))
        # F is not J's curvature: the model is linear.
        choice = best_of(lengths[:, None] * step, lengths * slope, radii, J, evaluate)
        return jnp.where(choice.accepted, jnp.minimum(carry * 10, 1.0), self.refuse(carry)), choice

    def refuse(self, carry: Float[Array, ""]) -> Float[Array, ""]:
        """The carry after a refused step."""
        return carry / 10


class NaturalGradient(eqx.Module):
    r"""The pathwise gradient in the Fisher metric of a Gaussian policy, with a grid of trust-region radii.

    $$d(\delta) = -\sqrt{2\delta / (g^\top F_\lambda^{-1} g)}\;F_\lambda^{-1} g,\qquad F_\lambda = F + \lambda\,\rho_{max} I$$

    so that every candidate has a KL divergence of about $\delta$ from the current policy, summed over an episode. True returns
    choose the radius, and the return never falls. The identity in units of the noise replaces M, the dynamics' part of
    Gauss-Newton: the comparison measures the value of the dynamics' curvature.

    Args:
        radii: Choice of the radius.
        rank: Dimension of the Krylov space.

    Raises:
        TypeError: If the policy is not `Gaussian`.

    Cost: One BPTT gradient, `rank` products through the network alone, and B rollouts for each radius.
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

    radii: KLGrid = eqx.field(default_factory=KLGrid)
    rank: int = eqx.field(static=True, default=10)

    @property
    def kind(self) -> str:
        """ "policy": it takes a batch of starts."""
        return "policy"

    def init(self, policy: Policy, task: Task) -> Float[Array, ""]:
        return self.radii.start(ravel_pytree(policy)[0].dtype)

    on_objective_change = restart

    def update(
        self, policy: Policy, carry: Float[Array, ""], task: Task, s0: State, *, key: PRNGKeyArray | None
    ) -> tuple[Policy, Float[Array, ""], Info]:
        model = fisher(policy, task, s0, key)
        space = lanczos(model.product, model.gradient, self.rank)
        space = space._replace(values=jnp.maximum(space.values, 0))
        steps = jax.tree.leaves(s0)[0].shape[0] * task.horizon

        def work(candidates):
            # The gradient's rollout and its recomputation, the rollout of F, the candidates.
            return count_evaluations(forward=steps * (3 + candidates), vjp=steps, sequential=3 + 1 + 1)

        return damped_update(self.radii, policy, carry, model, space, lambda pi: mean_return(pi, task, s0, key), work)
