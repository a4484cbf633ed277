r"""How far a gradient reaches inside a window: to its end, or cut sooner where the dynamics are stiff.

Where it is cut, the segment ends with the critic's value, as the window does, and the next begins at the same state with the
gradient stopped. Environments step on as they were, so every update sees as many steps. A rule has three functions:

    start(dtype) -> state               before the first update
    cuts(state, stiffness, since)       whether the step ends its segment, `since` steps after the segment's first
    after(state, stiffness) -> state    with the stiffness of all steps of the window, [N, h]

The stiffness of a step is $\|A_t\|_F / \sqrt n$, $A_t = \partial f / \partial s$: 1 for dynamics that keep the state.
Reference: Georgiev et al. 2024 (AHAC).
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from diffmbrl.core import State, Task, is_concrete, parameter


class StiffCut(eqx.Module):
    """Each environment's gradient is cut behind a step stiffer than `bound`: a contact, in AHAC's first form.

    Raises: `ValueError` if the bound is not positive.
    """

    bound: Float[Array, ""] = parameter(2.0)

    def __check_init__(self):
        _positive("bound", self.bound)

    def start(self, dtype: Any) -> tuple[()]:
        return ()

    def cuts(self, state: tuple[()], stiffness: Float[Array, ""], since: Int[Array, ""]) -> Bool[Array, ""]:
        return stiffness > self.bound

    def after(self, state: tuple[()], stiffness: Float[Array, "N h"]) -> tuple[()]:
        return ()


class AdaptiveHorizon(eqx.Module):
    r"""All gradients are cut every h steps, h within `low` and `high`: $h \leftarrow h + \eta\,(1 - \bar c / C)$.

    $\bar c$ is the mean over environments of the stiffest of the window's steps, and C the `bound`: the horizon grows while the
    dynamics met are soft and shrinks while they are stiff. It is the dual ascent of AHAC with one multiplier, the horizon
    itself; the paper has one for each step and adds them up. Only a window of at least `high` steps can hold `high`.

    Raises: `ValueError` if bound or rate is not positive, or `1 <= low <= initial <= high` does not hold.
    """

    bound: Float[Array, ""] = parameter(2.0)
    rate: Float[Array, ""] = parameter(0.1)
    initial: Float[Array, ""] = parameter(16.0)
    low: Float[Array, ""] = parameter(4.0)
    high: Float[Array, ""] = parameter(64.0)

    def __check_init__(self):
        _positive("bound", self.bound)
        _positive("rate", self.rate)
        if is_concrete(self.low, self.initial, self.high) and not bool(
            jnp.all((self.low >= 1) & (self.low <= self.initial) & (self.initial <= self.high))
        ):
            raise ValueError(
                f"the horizon must start between its bounds, 1 <= low <= initial <= high; got low {self.low}, "
                f"initial {self.initial}, high {self.high}"
            )

    def start(self, dtype: Any) -> Float[Array, ""]:
        return self.initial.astype(dtype)

    def cuts(self, state: Float[Array, ""], stiffness: Float[Array, ""], since: Int[Array, ""]) -> Bool[Array, ""]:
        return since + 1 >= jnp.round(state).astype(since.dtype)

    def after(self, state: Float[Array, ""], stiffness: Float[Array, "N h"]) -> Float[Array, ""]:
        met = jnp.mean(jnp.max(stiffness, axis=1))
        bound, rate, low, high = (x.astype(state.dtype) for x in (self.bound, self.rate, self.low, self.high))
        return jnp.clip(state + rate * (1 - met / bound), low, high)


def stiffness(task: Task, s: State, a: Float[Array, " m"]) -> Float[Array, ""]:
    """|df/ds| of the noiseless dynamics, Frobenius over the root of n; nothing is differentiated through it."""
    s, a = jax.lax.stop_gradient((s, a))
    flat, unravel = ravel_pytree(s)
    with jax.default_matmul_precision("highest"):
        A = jax.jacfwd(lambda x: ravel_pytree(task.dynamics(unravel(x), a, key=None))[0])(flat)
    return jnp.sqrt(jnp.mean(jnp.sum(A**2, axis=0)))


def _positive(name: str, x: Array) -> None:
    if is_concrete(x) and not bool(jnp.all(x > 0)):
        raise ValueError(f"{name} must be positive, got {x}")
