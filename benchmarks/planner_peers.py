"""Peers of iLQR on the problems of `trajectory_problems`, where they are installed (`pip install diffmbrl[bench]`).

A peer is `solver(name, task)`, which returns `solve(iterations) -> costs`: from x0 and zero actions, the cost after each
iteration, the starting cost first; None where the peer has no model of the system.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.trajectory_problems import DT, PROBLEMS, G
from diffmbrl.core import Task

Solve = Callable[[int], Any]
LOCKED = 1e8  # weight of the torque of a joint without a motor: Crocoddyl's compiled actuation has one at every joint


def crocoddyl(name: str, task: Task) -> Solve | None:
    """SolverDDP of Crocoddyl on Pinocchio's rigid bodies with its semi-implicit Euler step: compiled C++ throughout.

    The same trajectory costs the same to 13 digits. There is no compiled model of the quadrotor with this attitude.
    """
    import crocoddyl  # pyright: ignore[reportMissingImports]
    import pinocchio  # pyright: ignore[reportMissingImports]

    if name not in ("pendulum", "cart-pole", "acrobot"):
        return None
    _, start, goal, W, R, W_T = PROBLEMS[name]
    model, motors = _bodies(pinocchio, name)
    R = [R[0] if motor else LOCKED for motor in motors]
    state = crocoddyl.StateMultibody(model)
    actuation = crocoddyl.ActuationModelFull(state)

    def costs(W, R):
        total = crocoddyl.CostModelSum(state, model.nv)
        parts = [("state", W, crocoddyl.ResidualModelState(state, np.array(goal, float), model.nv))]
        if R is not None:
            parts.append(("action", R, crocoddyl.ResidualModelControl(state, model.nv)))
        for part, weights, residual in parts:
            activation = crocoddyl.ActivationModelWeightedQuad(np.array(weights, float))
            total.addCost(part, crocoddyl.CostModelResidual(state, activation, residual), 1.0)
        return total

    running, final = (
        crocoddyl.IntegratedActionModelEuler(
            crocoddyl.DifferentialActionModelFreeFwdDynamics(state, actuation, sums), step
        )
        for sums, step in [(costs(W, R), DT), (costs(W_T, None), 0.0)]
    )
    problem = crocoddyl.ShootingProblem(np.array(start, float), [running] * task.horizon, final)
    problem.nthreads = 1
    solver, actions = crocoddyl.SolverDDP(problem), [np.zeros(model.nv)] * task.horizon
    states = list(problem.rollout(actions))
    first = problem.calc(states, actions)

    def solve(iterations: int, *, record: bool = False) -> Any:
        log = crocoddyl.CallbackLogger()
        solver.setCallbacks([log] if record else [])
        solver.solve(states, actions, iterations, False)
        return np.array([first, *log.costs]) if record else solver.cost

    return solve


def _bodies(pinocchio: Any, name: str) -> tuple[Any, list[bool]]:
    """The rigid bodies, and which joints have a motor."""
    model, here = pinocchio.Model(), pinocchio.SE3.Identity()
    model.gravity.linear = np.array([0, 0, -G])

    def add(parent, joint, mass, drop, inertia=0.0, at=here):
        number = model.addJoint(parent, joint, at, f"joint{model.njoints}")
        body = pinocchio.Inertia(mass, np.array([0, 0, -drop]), inertia * np.eye(3))
        model.appendBodyToJoint(number, body, here)
        return number

    if name == "pendulum":
        add(0, pinocchio.JointModelRX(), 1.0, 1.0)
        return model, [True]
    if name == "cart-pole":
        cart = add(0, pinocchio.JointModelPY(), 1.0, 0.0)
        add(cart, pinocchio.JointModelRX(), 0.1, 0.5)
        return model, [True, False]
    first = add(0, pinocchio.JointModelRX(), 1.0, 0.5, 1.0)
    elbow = pinocchio.SE3(np.eye(3), np.array([0, 0, -1.0]))
    add(first, pinocchio.JointModelRX(), 1.0, 0.5, 1.0, elbow)
    return model, [False, True]


def diffilqrax(name: str, task: Task) -> Solve | None:
    """`ilqr_solver` of diffilqrax, compiled by JAX, with its defaults."""
    from diffilqrax import ilqr, typs  # pyright: ignore[reportMissingImports]

    def cost(t, x, u, theta):
        return -task.reward(x, u)

    def final(x, theta):
        return -task.terminal(x)

    def dynamics(t, x, u, theta):
        return task.dynamics(x, u)

    system = typs.System(cost, final, dynamics, typs.ModelDims(n=task.n, m=task.m, horizon=task.horizon, dt=task.dt))
    params = typs.iLQRParams(task.initial(jax.random.key(0)), jnp.zeros(()))
    actions = jnp.zeros((task.horizon, task.m))
    compiled: dict[int, Any] = {}

    def solve(iterations: int, *, record: bool = False) -> Any:
        if iterations not in compiled:
            compiled[iterations] = jax.jit(
                lambda params, actions: ilqr.ilqr_solver(system, params, actions, max_iter=iterations)[1:3]
            )
        found = compiled[iterations](params, actions)
        return np.asarray(found[1]) if record else jax.block_until_ready(found[0])

    return solve


PEERS = {"crocoddyl": crocoddyl, "diffilqrax": diffilqrax}
