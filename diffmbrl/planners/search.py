"""Line searches of iLQR: which step length along a sweep is taken."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Trial(NamedTuple):
    """The plan that a step length led to, and what it earned; or, after a search, the last one tried."""

    alpha: Float[Array, ""]
    tried: Int[Array, ""]  # step lengths, this one included
    accepted: Bool[Array, ""]
    nonfinite: Int[Array, ""]
    J: Float[Array, ""]
    s: Float[Array, "T n"]
    a: Float[Array, "T m"]


Attempt = Callable[[Float[Array, ""]], Trial]


class Backtracking(eqx.Module):
    """1, 1/2, 1/4 ... one after another, up to `trials`; the first that is accepted.

    On a CPU cheaper than all at once, since the first mostly holds. A trial may be another tuple with alpha, tried, accepted
    and nonfinite.
    """

    trials: int = eqx.field(static=True, default=10)

    def __call__(self, attempt: Callable[[Float[Array, ""]], Any], rest: Any) -> Any:
        def next_length(trial: Any) -> Any:
            alpha = jnp.where(trial.tried == 0, 1.0, trial.alpha / 2).astype(rest.alpha.dtype)
            new = attempt(alpha)
            return new._replace(tried=trial.tried + 1, nonfinite=trial.nonfinite + new.nonfinite)

        return jax.lax.while_loop(lambda trial: ~trial.accepted & (trial.tried < self.trials), next_length, rest)


class Parallel(eqx.Module):
    """1, 1/2, 1/4 ... `trials` of them at once; of those accepted, the one that earns most.

    One pass over the horizon whatever the number, for a device with cores to spare.
    """

    trials: int = eqx.field(static=True, default=10)

    def __call__(self, attempt: Attempt, rest: Trial) -> Trial:
        each = jax.vmap(attempt)(0.5 ** jnp.arange(self.trials, dtype=rest.alpha.dtype))
        best = jnp.argmax(jnp.where(each.accepted, each.J, -jnp.inf))
        taken = jax.tree.map(lambda x: x[best], each)
        tried = jnp.full((), self.trials, jnp.int32)
        return taken._replace(tried=tried, nonfinite=jnp.sum(each.nonfinite, dtype=jnp.int32))
