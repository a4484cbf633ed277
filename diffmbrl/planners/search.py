"""Line searches of iLQR over step lengths 1, 1/2, 1/4 ..."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Trial(NamedTuple):
    """The plan of a step length and its return; after a search, the last one tried.

    Args:
        alpha: Step length.
        tried: Number of step lengths tried, this one included.
        accepted: Whether it satisfies the acceptance test.
        nonfinite: Number of trials whose return was not finite.
        J: Return.
        s: States, shape [T, n].
        a: Actions, shape [T, m].
    """

    alpha: Float[Array, ""]
    tried: Int[Array, ""]
    accepted: Bool[Array, ""]
    nonfinite: Int[Array, ""]
    J: Float[Array, ""]
    s: Float[Array, "T n"]
    a: Float[Array, "T m"]


Attempt = Callable[[Float[Array, ""]], Trial]


class Backtracking(eqx.Module):
    """Line search that tries 1, 1/2, 1/4 ... one after another, and takes the first that is accepted.

    It is cheaper than `Parallel` on a CPU, since the first step length mostly succeeds.

    Args:
        trials: Largest number of step lengths.
    """

    trials: int = eqx.field(static=True, default=10)

    def __call__(self, attempt: Callable[[Float[Array, ""]], Any], rest: Any) -> Any:
        def next_length(trial: Any) -> Any:
            alpha = jnp.where(trial.tried == 0, 1.0, trial.alpha / 2).astype(rest.alpha.dtype)
            new = attempt(alpha)
            return new._replace(tried=trial.tried + 1, nonfinite=trial.nonfinite + new.nonfinite)

        return jax.lax.while_loop(lambda trial: ~trial.accepted & (trial.tried < self.trials), next_length, rest)


class Parallel(eqx.Module):
    """Line search that tries 1, 1/2, 1/4 ... at once, and takes the accepted one with the largest return.

    It needs one pass over the horizon whatever the number, which suits a device with idle cores.

    Args:
        trials: Number of step lengths.
    """

    trials: int = eqx.field(static=True, default=10)

    def __call__(self, attempt: Attempt, rest: Trial) -> Trial:
        each = jax.vmap(attempt)(0.5 ** jnp.arange(self.trials, dtype=rest.alpha.dtype))
        best = jnp.argmax(jnp.where(each.accepted, each.J, -jnp.inf))
        taken = jax.tree.map(lambda x: x[best], each)
        tried = jnp.full((), self.trials, jnp.int32)
        return taken._replace(tried=tried, nonfinite=jnp.sum(each.nonfinite, dtype=jnp.int32))
