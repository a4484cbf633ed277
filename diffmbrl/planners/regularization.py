"""The damping of the Riccati sweeps of iLQR and multiple shooting: when it rises, when it falls."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from diffmbrl.core import parameter
from diffmbrl.second_order.riccati import RiccatiSolution


class Damping(eqx.Module):
    r"""A full step divides $\mu$ by `factor`; no step, or a sweep that is not positive definite, multiplies it by its square.

    It rises to `smallest` `factor`^4 at least and `largest` at most; below `smallest` it is nothing.

    Reference: Tassa, Erez, Todorov 2012, section II-F, without the quadratic growth.

    >>> float(Damping().raised(jnp.asarray(1.0)))
    16.0
    """

    smallest: Float[Array, ""] = parameter(1e-8)
    largest: Float[Array, ""] = parameter(1e8)
    factor: Float[Array, ""] = parameter(4.0)

    def raised(self, damping: Float[Array, ""]) -> Float[Array, ""]:
        raised = jnp.maximum(damping * self.factor**2, self.smallest * self.factor**4)
        return jnp.minimum(raised, self.largest).astype(damping.dtype)

    def lowered(self, damping: Float[Array, ""]) -> Float[Array, ""]:
        return jnp.where(damping / self.factor < self.smallest, 0.0, damping / self.factor).astype(damping.dtype)

    def after(self, damping: Float[Array, ""], accepted: Bool[Array, ""], tried: Int[Array, ""]) -> Float[Array, ""]:
        """What the next update begins with, after a search that took `tried` step lengths."""
        kept = jnp.where(tried <= 2, self.lowered(damping), damping)
        return jnp.where(accepted, kept, self.raised(damping)).astype(damping.dtype)

    def definite(
        self, sweep: Callable[[Array, Array], RiccatiSolution], damping: Float[Array, ""], *, plain: int = 0
    ) -> tuple[Float[Array, ""], RiccatiSolution, Int[Array, ""]]:
        """A sweep whose action Hessians are positive definite, as damped as that takes, and the number made, 20 at most.

        `sweep` is given the damping and the number of the sweep; the first 1 + `plain` have the damping of the start.
        """

        def again(state):
            _, found, count = state
            return ~found.definite & (count < 20)

        # One sweep in the program, whichever it is the turn of: it is what takes long to compile.
        def another(state):
            damping, _, count = state
            damping = jnp.where(count > plain, self.raised(damping), damping).astype(damping.dtype)
            return damping, sweep(damping, count), count + 1

        zero = jnp.zeros((), jnp.int32)
        shapes = jax.eval_shape(sweep, damping, zero)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.while_loop(again, another, (damping, nothing, zero))
