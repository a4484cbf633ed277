r"""Measures of a learned model: prediction error over one and k steps, calibration, and the error of its Jacobians."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm
from jaxtyping import Array, Float

from diffmbrl.core import Dynamics
from diffmbrl.models.ensemble import Ensemble
from diffmbrl.models.protocols import DynamicsWithMemory, ProbabilisticDynamics


def step_errors(
    f: Dynamics, s: Float[Array, "N k1 n"], a: Float[Array, "N k m"], scale: Float[Array, " n"]
) -> Float[Array, " k"]:
    r"""Root mean square error of a model's own predictions after j = 1 ... k steps.

    $$\Big[\tfrac{1}{Nn} \sum_{i,d} (\hat s_{j,d} - s_{j,d})^2 / \sigma_d^2\Big]^{1/2},\qquad
    \hat s_0 = s_0,\quad \hat s_{j+1} = f(\hat s_j, a_j)$$

    Args:
        f: Model, evaluated at its mean; one with a memory starts with an empty one.
        s: N windows of k + 1 true states, shape [N, k + 1, n].
        a: Their actions, shape [N, k, m].
        scale: Unit of the error of each state variable, shape [n]: `normalizer.scale` relates it to a typical step,
            the states' standard deviation to a constant prediction. A variable of scale 0 is left out.

    Returns:
        The errors, shape [k]. Angles are compared as numbers, so a full turn counts as an error.

    >>> from diffmbrl import tasks
    >>> f = tasks.lqr().dynamics
    >>> step_errors(f, jnp.zeros((5, 4, 2)), jnp.zeros((5, 3, 1)), jnp.ones(2)).tolist()
    [0.0, 0.0, 0.0]
    """

    def one(s, a):
        def step(state, a):
            state = f(state, a)
            return state, _task_state(f, state)

        return jax.lax.scan(step, _first(f, s[0]), a)[1] - s[1:]

    known = scale > 0
    error = jax.vmap(one)(s, a) / jnp.where(known, scale, 1)
    squares = jnp.where(known, error**2, 0)
    return jnp.sqrt(jnp.sum(jnp.mean(squares, axis=0), axis=1) / jnp.maximum(jnp.sum(known), 1).astype(s.dtype))


def predictive_moments(
    f: Dynamics, s: Float[Array, " n"], a: Float[Array, " m"]
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    r"""Mean and standard deviation of a model's next state.

    Those of an ensemble are of its mixture: $\mu = \bar\mu_e$, $\sigma^2 = \overline{\sigma_e^2} + \mathrm{Var}_e(\mu_e)$.

    Args:
        f: Model; one without `moments` has a standard deviation of 0.
        s: State, shape [n].
        a: Action, shape [m].

    Returns:
        Mean and standard deviation, shapes [n] and [n].

    Reference: Lakshminarayanan et al. 2017, section 2.4.
    """
    if isinstance(f, Ensemble):
        mean, std = jax.vmap(lambda f: predictive_moments(f, s, a))(f.members)
        return jnp.mean(mean, axis=0), jnp.sqrt(jnp.mean(std**2, axis=0) + jnp.var(mean, axis=0))
    return f.moments(s, a) if isinstance(f, ProbabilisticDynamics) else (f(s, a), jnp.zeros_like(s))


def coverage(
    f: Dynamics,
    s: Float[Array, "N n"],
    a: Float[Array, "N m"],
    s_next: Float[Array, "N n"],
    levels: Float[Array, " L"],
) -> Float[Array, "L n"]:
    r"""Fraction of true next states inside the model's central intervals, for each level and state variable.

    The interval of level p is $\mu \pm \sigma\,\Phi^{-1}((1 + p)/2)$. A calibrated model covers the fraction p; an
    overconfident one covers less.

    Args:
        f: Model, or an ensemble, whose mixture is used.
        s: States, shape [N, n].
        a: Actions, shape [N, m].
        s_next: True next states, shape [N, n].
        levels: Probabilities p of the intervals, shape [L].

    Returns:
        Fractions, shape [L, n].

    Reference: Kuleshov et al. 2018, section 3.5.
    """
    mean, std = jax.vmap(lambda s, a: predictive_moments(f, s, a))(s, a)
    width = norm.ppf((1 + levels) / 2)
    inside = jnp.abs(s_next - mean) <= width[:, None, None] * std
    return jnp.mean(inside.astype(s.dtype), axis=1)


def model_jacobians(f: Dynamics, s: Float[Array, " n"], a: Float[Array, " m"]) -> Float[Array, "n n+m"]:
    """Jacobian [A, B] = df/d(s, a) of a model.

    Args:
        f: Model; one with a memory is differentiated at an empty one.
        s: State, shape [n].
        a: Action, shape [m].

    Returns:
        The Jacobian, shape [n, n + m].
    """

    def next_state(s, a):
        return _task_state(f, f(_first(f, s), a))

    return jnp.concatenate(jax.jacfwd(next_state, argnums=(0, 1))(s, a), axis=1)


def jacobian_error(
    f: Dynamics, true: Dynamics, s: Float[Array, "N n"], a: Float[Array, "N m"], scale: Float[Array, " d"]
) -> Float[Array, ""]:
    r"""Error of a model's Jacobians, relative to how much the true ones differ from the identity.

    $$\Big[\sum_i \|D^{-1}(F_i - F^*_i)\,E\|^2 \Big/ \sum_i \|D^{-1}(F^*_i - [I\; 0])\,E\|^2\Big]^{1/2},\qquad F = [A, B]$$

    Args:
        f: Model.
        true: True dynamics.
        s: States, shape [N, n].
        a: Actions, shape [N, m].
        scale: Typical size of each state variable and action, shape [n + m]: E = diag(scale), D its first n entries.

    Returns:
        The relative error, shape [].
    """
    n = s.shape[1]
    mine, theirs = (jax.vmap(lambda s, a, g=g: model_jacobians(g, s, a))(s, a) for g in (f, true))
    stays = jnp.eye(n, scale.shape[0], dtype=s.dtype)

    def size(F):
        return jnp.sum((F * scale / scale[:n, None]) ** 2)

    return jnp.sqrt(size(mine - theirs) / size(theirs - stays))


def _first(f: Dynamics, s: Array) -> Any:
    """The model's state at the beginning of a rollout from s."""
    return f.start(s) if isinstance(f, DynamicsWithMemory) else s


def _task_state(f: Dynamics, state: Any) -> Array:
    """The task's state in a state of the model."""
    return state.s if isinstance(f, DynamicsWithMemory) else state
