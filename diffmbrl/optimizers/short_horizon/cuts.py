r"""The reach of a gradient inside a window: to its end, or to an earlier cut where the dynamics are stiff.

At a cut the segment ends with the critic's value, as the window does, and the next begins at the same state with the gradient
stopped. The environments continue, so every update sees the same number of steps. A rule has three functions:

    start(dtype) -> state               before the first update
    cuts(state, stiffness, since)       whether the step ends its segment, `since` steps after the segment's first
    after(state, stiffness) -> state    with the stiffness of all steps of the window, [N, h]

The stiffness of a step is $\|A_t\|_F / \sqrt n$, $A_t = \partial f / \partial s$: 1 if the state does not change.
Reference: Georgiev et al. 2024 (AHAC).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from diffmbrl.core import State, Task, is_concrete, parameter


class StiffCut(eqx.Module):
    """Cut each environment's gradient behind a step stiffer than a bound, such as a contact: AHAC's first form.

    Args:
        bound: Largest stiffness of a step that the gradient passes.

    Raises:
        ValueError: If the bound is not positive.

    >>> bool(StiffCut(2.0).cuts((), stiffness=jnp.array(3.0), since=jnp.array(0)))
    True
    """

    bound: Float[Array, ""] = parameter(2.0)

    def __check_init__(self):
        _positive("bound", self.bound)

    def start(self, dtype: DTypeLike) -> tuple[()]:
        """The state before the first update."""
        return ()

    def cuts(self, state: tuple[()], stiffness: Float[Array, ""], since: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether a step ends its segment."""
        return stiffness > self.bound

    def after(self, state: tuple[()], stiffness: Float[Array, "N h"]) -> tuple[()]:
        """The state after an update."""
        return ()


class AdaptiveHorizon(eqx.Module):
    r"""Cut all gradients every h steps, and adapt $h \leftarrow h + \eta\,(1 - \bar c / C)$ to the stiffness.

    $\bar c$ is the mean over environments of the stiffest of the window's steps: the horizon grows while the dynamics are soft
    and shrinks while they are stiff. This is AHAC's dual ascent with one multiplier, the horizon itself, where the paper adds
    up one for each step.

    Args:
        bound: Stiffness C at which the horizon stays.
        rate: $\eta$.
        initial: First horizon, in steps.
        low: Shortest horizon.
        high: Longest horizon, which only a window of at least as many steps reaches.

    Raises:
        ValueError: If bound or rate is not positive, or `1 <= low <= initial <= high` does not hold.

    >>> rule = AdaptiveHorizon(bound=2.0, rate=1.0)
    >>> float(rule.after(rule.start(jnp.float32), stiffness=jnp.ones((3, 4))))
    16.5
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

    def start(self, dtype: DTypeLike) -> Float[Array, ""]:
        """The first horizon."""
        return self.initial.astype(dtype)

    def cuts(self, state: Float[Array, ""], stiffness: Float[Array, ""], since: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether a step ends its segment."""
        return since + 1 >= jnp.round(state).astype(since.dtype)

    def after(self, state: Float[Array, ""], stiffness: Float[Array, "N h"]) -> Float[Array, ""]:
        """The next horizon, for the stiffness of all steps of the window."""
        met = jnp.mean(jnp.max(stiffness, axis=1))
        bound, rate, low, high = (x.astype(state.dtype) for x in (self.bound, self.rate, self.low, self.high))
        return jnp.clip(state + rate * (1 - met / bound), low, high)


def stiffness(task: Task, s: State, a: Float[Array, " m"]) -> Float[Array, ""]:
    """Frobenius norm of df/ds of the noiseless dynamics, over the root of n; its own derivative is 0.

    Args:
        task: Task.
        s: State.
        a: Action.

    Returns:
        The stiffness of the step.
    """
    s, a = jax.lax.stop_gradient((s, a))
    flat, unravel = ravel_pytree(s)
    with jax.default_matmul_precision("highest"):
        A = jax.jacfwd(lambda x: ravel_pytree(task.dynamics(unravel(x), a, key=None))[0])(flat)
    return jnp.sqrt(jnp.mean(jnp.sum(A**2, axis=0)))


def _positive(name: str, x: Array) -> None:
    if is_concrete(x) and not bool(jnp.all(x > 0)):
        raise ValueError(f"{name} must be positive, got {x}")
