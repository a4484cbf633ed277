"""Peers of iLQR on the problems of `trajectory_problems`, where they are installed (`pip install diffmbrl[bench]`).

A peer is `solver(name, task)`, which returns `solve(iterations) -> costs`: from x0 and zero actions, the cost after each
iteration, the starting cost first; None where the peer has no model of the system.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import diffmbrl as d
from benchmarks.trajectory_problems import DT, PROBLEMS, G
from diffmbrl.core import Task

Solve = Callable[[int], Any]
MOST_OF_IPOPT = 150  # iterations
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


def casadi(name: str, task: Task) -> Solve | None:
    """CasADi's multiple shooting with IPOPT: the same dynamics and costs as symbols, exact Hessians, states at zero actions.

    The cost of an iterate is that of following its actions. Its tolerance is 1e-8, its evaluations are not compiled to C.
    """
    import casadi as ca  # pyright: ignore[reportMissingImports]

    s0 = np.asarray(task.initial(jax.random.key(0)))
    n, m, T = task.n, task.m, task.horizon
    x, u = ca.SX.sym("x", n), ca.SX.sym("u", m)  # pyright: ignore[reportAttributeAccessIssue]
    after, reward, final = (
        _symbolic(function, arguments, ca)
        for function, arguments in [(task.dynamics, (x, u)), (task.reward, (x, u)), (task.terminal, (x,))]
    )
    step, last = ca.Function("step", [x, u], [after, -reward]), ca.Function("last", [x], [-final])
    X, U = ca.MX.sym("X", n, T + 1), ca.MX.sym("U", m, T)  # pyright: ignore[reportAttributeAccessIssue]
    nexts, stages = step.map(T)(X[:, :T], U)
    problem = {
        "x": ca.veccat(X, U),
        "f": ca.sum2(stages) + last(X[:, T]),
        "g": ca.veccat(X[:, 0] - s0, nexts - X[:, 1:]),
    }
    rest = d.rollout(d.OpenLoop(jnp.zeros((T, m))), task, jnp.asarray(s0))
    start = np.concatenate([np.asarray(rest.s).ravel(), np.asarray(rest.s_T), np.zeros(T * m)])
    follow = jax.jit(lambda actions: d.episode_return(d.OpenLoop(actions), task, jnp.asarray(s0)))
    made: dict[int, Any] = {}

    def run(iterations: int) -> Any:
        if iterations not in made:
            quiet = {"print_time": False, "ipopt": {"print_level": 0, "sb": "yes", "max_iter": iterations}}
            made[iterations] = ca.nlpsol("solver", "ipopt", problem, quiet)
        return made[iterations](x0=start, lbg=0, ubg=0)["x"]

    def solve(iterations: int, *, record: bool = False) -> Any:
        if not record:
            return run(iterations)
        costs = []
        for count in range(min(iterations, MOST_OF_IPOPT) + 1):
            actions = np.asarray(run(count)).ravel()[n * (T + 1) :].reshape(T, m)
            costs.append(-float(follow(jnp.asarray(actions))))
            if made[count].stats()["success"]:
                break
        return np.array(costs)

    return solve


def _symbolic(function: Any, arguments: tuple, ca: Any) -> Any:
    """A function of small arrays as an expression of CasADi: its jaxpr evaluated on arrays of symbols."""

    def array(x: Any, shape: tuple) -> np.ndarray:
        out = np.empty(shape, object)
        for i, index in enumerate(np.ndindex(*shape)):
            out[index] = x[i]
        return out

    def each(f: Callable) -> Callable:
        def mapped(*xs):
            xs = np.broadcast_arrays(*xs)
            return array([f(*(x[i] for x in xs)) for i in np.ndindex(*xs[0].shape)], xs[0].shape)

        return mapped

    rules: dict[str, Callable] = {
        "add": lambda p: each(lambda a, b: a + b),
        "sub": lambda p: each(lambda a, b: a - b),
        "mul": lambda p: each(lambda a, b: a * b),
        "div": lambda p: each(lambda a, b: a / b),
        "neg": lambda p: each(lambda a: -a),
        "sin": lambda p: each(ca.sin),
        "cos": lambda p: each(ca.cos),
        "square": lambda p: each(lambda a: a * a),
        "integer_pow": lambda p: each(lambda a: a ** p["y"]),
        "convert_element_type": lambda p: lambda a: a,
        "squeeze": lambda p: lambda a: np.squeeze(a, p["dimensions"]),
        "reshape": lambda p: lambda a: a.reshape(p["new_sizes"]),
        "slice": lambda p: lambda a: a[tuple(map(slice, p["start_indices"], p["limit_indices"], p["strides"] or ()))]
        if p["strides"]
        else a[tuple(map(slice, p["start_indices"], p["limit_indices"]))],
        "concatenate": lambda p: lambda *a: np.concatenate(a, p["dimension"]),
        "stack": lambda p: lambda *a: np.stack(a, p["axis"]),
        "broadcast_in_dim": lambda p: lambda a: np.broadcast_to(
            a.reshape([a.shape[p["broadcast_dimensions"].index(i)] if i in p["broadcast_dimensions"] else 1
                       for i in range(len(p["shape"]))]), p["shape"]),
        "reduce_sum": lambda p: lambda a: np.asarray(a.sum(p["axes"]), object)
        if len(p["axes"]) < a.ndim
        else array([a.sum()], ()),
    }  # fmt: skip

    def evaluate(jaxpr, consts, *inputs):
        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))

        def read(v):
            value = v.val if hasattr(v, "val") else known[v]
            return value if isinstance(value, np.ndarray) and value.dtype == object else np.asarray(value, object)

        for equation in jaxpr.eqns:
            values = [read(v) for v in equation.invars]
            inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
            if inner is not None:
                out = evaluate(inner.jaxpr, inner.consts, *values)
            else:
                out = [rules[equation.primitive.name](equation.params)(*values)]
            known.update(zip(equation.outvars, out, strict=True))
        return [read(v) for v in jaxpr.outvars]

    traced = jax.make_jaxpr(function)(*(jnp.zeros(x.numel()) for x in arguments))
    inputs = [array([x[i] for i in range(x.numel())], (x.numel(),)) for x in arguments]
    return ca.vertcat(*evaluate(traced.jaxpr, traced.consts, *inputs)[0].ravel())


PEERS = {"crocoddyl": crocoddyl, "diffilqrax": diffilqrax, "casadi": casadi}
