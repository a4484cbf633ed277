r"""Notation and vocabulary; no algorithm.

    s, a, r    state, action, reward                      T, B      horizon, number of start states
    f, pi      dynamics s' = f(s, a), policy a = pi(s)    n, m      state and action dimension
    theta      the policy's parameters, P of them         J         return, maximised
    A_t, B_t   df/ds, df/da                               K_t, G_t  dpi/ds, dpi/dtheta
    w_t        weight of time step t in the return        phi       terminal reward

$$J(\pi) = E_{s_0}\Big[\sum_{t<T} w_t\, r(s_t, a_t) + w_T\, \phi(s_T)\Big],\quad a_t = \pi(s_t),\; s_{t+1} = f(s_t, a_t)$$

Control texts minimise a cost; here the reward is maximised, and the sign changes in one place, `linearize.py`.
Everything is a callable `equinox.Module` whose leaves are all arrays, so plain `jit`, `grad`, `vmap`, `ravel_pytree` and
optax accept it. Write for one stream, `vmap` for many.
"""

from diffmbrl.core.protocols import (
    Dynamics,
    GradientEstimator,
    Planner,
    PlanPolicy,
    Policy,
    Reward,
    Solver,
    State,
    Stateful,
    is_plan,
    is_planner,
    is_stateful,
    restart,
)
from diffmbrl.core.task import Box, Identity, NoTerminal, Task, Trajectory, reweighted
from diffmbrl.core.trees import all_finite, as_float, cond_once, is_concrete, parameter, where

__all__ = [
    "Box",
    "Dynamics",
    "GradientEstimator",
    "Identity",
    "NoTerminal",
    "PlanPolicy",
    "Planner",
    "Policy",
    "Reward",
    "Solver",
    "State",
    "Stateful",
    "Task",
    "Trajectory",
    "all_finite",
    "as_float",
    "cond_once",
    "is_concrete",
    "is_plan",
    "is_planner",
    "is_stateful",
    "parameter",
    "restart",
    "reweighted",
    "where",
]
