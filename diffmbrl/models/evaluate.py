r"""How good a learned model is: prediction over one and k steps, calibration, and its Jacobians beside the true ones."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm
from jaxtyping import Array, Float

from diffmbrl.core import Dynamics
from diffmbrl.models.ensemble import Ensemble
from diffmbrl.models.recurrent import DynamicsWithMemory


def step_errors(
    f: Dynamics, s: Float[Array, "N k1 n"], a: Float[Array, "N k m"], scale: Float[Array, " n"]
) -> Float[Array, " k"]:
    r"""$\Big[\tfrac{1}{Nn} \sum_{i,d} (\hat s_{j,d} - s_{j,d})^2 / \sigma_d^2\Big]^{1/2}$ after j = 1 ... k steps of f's own.

    N windows of k + 1 true states; $\hat s_0 = s_0$ and then f's own predictions, at its mean; a model with a memory starts
    with an empty one. `scale` is what an error is divided by, in each state variable: `normalizer.scale` for a share of typical
    steps, the states' deviation for a share of what there is to know. Variables of scale 0 are left out. Angles count turns.

    >>> from diffmbrl import tasks
    >>> f = tasks.lqr().dynamics
    >>> step_errors(f, jnp.zeros((5, 4, 2)), jnp.zeros((5, 3, 1)), jnp.ones(2)).tolist()
    [0.0, 0.0, 0.0]
    """

    def one(s, a):
        def step(state, a):
            state = f(state, a)
            return state, _observed(f, state)

        return jax.lax.scan(step, _start(f, s[0]), a)[1] - s[1:]

    known = scale > 0
    error = jax.vmap(one)(s, a) / jnp.where(known, scale, 1)
    squares = jnp.where(known, error**2, 0)
    return jnp.sqrt(jnp.sum(jnp.mean(squares, axis=0), axis=1) / jnp.maximum(jnp.sum(known), 1).astype(s.dtype))


def predictive_moments(
    f: Any, s: Float[Array, " n"], a: Float[Array, " m"]
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    r"""Mean and standard deviation of what a model says of the next state.

    Of an ensemble those of the mixture: $\mu = \bar\mu_e$, $\sigma^2 = \overline{\sigma_e^2} + \mathrm{Var}_e(\mu_e)$.
    Reference: Lakshminarayanan et al. 2017, section 2.4.
    """
    if not isinstance(f, Ensemble):
        return f.moments(s, a) if hasattr(f, "moments") else (f(s, a), jnp.zeros_like(s))
    mean, std = jax.vmap(lambda f: predictive_moments(f, s, a))(f.members)
    return jnp.mean(mean, axis=0), jnp.sqrt(jnp.mean(std**2, axis=0) + jnp.var(mean, axis=0))


def coverage(
    f: Any,
    s: Float[Array, "N n"],
    a: Float[Array, "N m"],
    s_next: Float[Array, "N n"],
    levels: Float[Array, " L"],
) -> Float[Array, "L n"]:
    r"""The share of next states within the interval that should hold the share `levels` of them, for each state variable.

    The interval is the normal one, $\mu \pm \sigma\,\Phi^{-1}((1 + p)/2)$, of the model or of an ensemble's mixture. A model
    that is calibrated covers what it says; one that is too sure covers less.
    Reference: Kuleshov et al. 2018, section 3.5.
    """
    mean, std = jax.vmap(lambda s, a: predictive_moments(f, s, a))(s, a)
    width = norm.ppf((1 + levels) / 2)
    inside = jnp.abs(s_next - mean) <= width[:, None, None] * std
    return jnp.mean(inside.astype(s.dtype), axis=1)


def model_jacobians(f: Dynamics, s: Float[Array, " n"], a: Float[Array, " m"]) -> Float[Array, "n n+m"]:
    """[A, B] = df/d(s, a), of a model with a memory at an empty one."""

    def next_state(s, a):
        return _observed(f, f(_start(f, s), a))

    return jnp.concatenate(jax.jacfwd(next_state, argnums=(0, 1))(s, a), axis=1)


def jacobian_error(
    f: Dynamics, true: Dynamics, s: Float[Array, "N n"], a: Float[Array, "N m"], scale: Float[Array, " d"]
) -> Float[Array, ""]:
    r"""$\Big[\sum_i \|D^{-1}(F_i - F^*_i)\,E\|^2 \Big/ \sum_i \|D^{-1}(F^*_i - [I\; 0])\,E\|^2\Big]^{1/2}$, F = [A, B].

    `scale` [n + m] is that of states and actions, E = diag(scale) and D its part for states: in units in which all vary alike.
    The error is a share of how far the true Jacobians are from those of a state that stays as it is.
    """
    n = s.shape[1]
    mine, theirs = (jax.vmap(lambda s, a, g=g: model_jacobians(g, s, a))(s, a) for g in (f, true))
    stays = jnp.eye(n, scale.shape[0], dtype=s.dtype)

    def size(F):
        return jnp.sum((F * scale / scale[:n, None]) ** 2)

    return jnp.sqrt(size(mine - theirs) / size(theirs - stays))


def _start(f: Dynamics, s: Float[Array, " n"]) -> Any:
    """The state of f at s, with an empty memory if it has one."""
    return f.start(s) if isinstance(f, DynamicsWithMemory) else s


def _observed(f: Dynamics, state: Any) -> Float[Array, " n"]:
    """The state of f without its memory."""
    return state.s if isinstance(f, DynamicsWithMemory) else state
