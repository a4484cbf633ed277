"""Adaptive damping of the Riccati sweeps of iLQR and multiple shooting."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from diffmbrl.core import parameter
from diffmbrl.second_order.riccati import RiccatiSolution


class Damping(eqx.Module):
    r"""Rule for the damping $\mu$ of Riccati sweeps.

    A full step divides $\mu$ by `factor`. A failed step, or a sweep that is not positive definite, multiplies it by the
    square of `factor`, to at least `smallest` `factor`^4. A damping below `smallest` becomes 0.

    Args:
        smallest: Smallest damping above 0.
        largest: Largest damping.
        factor: Factor by which a full step divides the damping; its square multiplies it.

    Reference: Tassa, Erez, Todorov 2012, section II-F, without the quadratic growth.

    >>> float(Damping().raised(jnp.asarray(1.0)))
    16.0
    """

    smallest: Float[Array, ""] = parameter(1e-8)
    largest: Float[Array, ""] = parameter(1e8)
    factor: Float[Array, ""] = parameter(4.0)

    def raised(self, damping: Float[Array, ""]) -> Float[Array, ""]:
        """Return the damping after a failed step."""
        raised = jnp.maximum(damping * self.factor**2, self.smallest * self.factor**4)
        return jnp.minimum(raised, self.largest).astype(damping.dtype)

    def lowered(self, damping: Float[Array, ""]) -> Float[Array, ""]:
        """Return the damping after a full step."""
        return jnp.where(damping / self.factor < self.smallest, 0.0, damping / self.factor).astype(damping.dtype)

    def after(self, damping: Float[Array, ""], accepted: Bool[Array, ""], tried: Int[Array, ""]) -> Float[Array, ""]:
        """Return the damping of the next update, after a line search of `tried` step lengths."""
        next_damping = jnp.where(tried <= 2, self.lowered(damping), damping)
        return jnp.where(accepted, next_damping, self.raised(damping)).astype(damping.dtype)

    def definite(
        self, sweep: Callable[[Array, Array], RiccatiSolution], damping: Float[Array, ""], *, plain: int = 0
    ) -> tuple[Float[Array, ""], RiccatiSolution, Int[Array, ""]]:
        """Raise the damping until the action Hessians of a sweep are positive definite, in 20 sweeps at most.

        Args:
            sweep: Function of the damping and the number of the sweep.
            damping: First damping, of the first 1 + `plain` sweeps.
            plain: Number of further sweeps with the first damping.

        Returns:
            Damping and sweep that were reached, and the number of sweeps.
        """

        def again(state):
            _, found, count = state
            return ~found.definite & (count < 20)

        # One sweep in the program for all turns, because a sweep takes long to compile.
        def another(state):
            damping, _, count = state
            damping = jnp.where(count > plain, self.raised(damping), damping).astype(damping.dtype)
            return damping, sweep(damping, count), count + 1

        zero = jnp.zeros((), jnp.int32)
        shapes = jax.eval_shape(sweep, damping, zero)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.while_loop(again, another, (damping, nothing, zero))
