"""Cost of the pieces, each as a multiple of the rollout that it differentiates.

Three tables: every primitive on cart-pole for B in 1, 64, 1024 and T in 100, 1000; the gradient and the Gauss-Newton product
at the settings of the targets; an iLQR iteration on three systems. Medians of interleaved rounds, compile time apart.
A rollout of a policy solver is the return of a batch; one of a planner is a single trajectory, called from Python.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import diffmbrl as d
from benchmarks.record import save, table
from benchmarks.timing import compile_seconds, medians
from benchmarks.trajectory_problems import PROBLEMS, problem
from diffmbrl.diagnostics import in_double
from diffmbrl.second_order.curvature import gauss_newton
from diffmbrl.second_order.linearize import linearize
from diffmbrl.second_order.riccati import riccati

INNER = 10  # products or iterations on the device between two looks from Python
LARGE = 500_000  # states B T from which an update of Gauss-Newton takes a minute: it is left out, its products are not


def run(*, quick: bool) -> None:
    every = _every_primitive((1, 64) if quick else (1, 64, 1024), (100,) if quick else (100, 1000))
    targets = _gradient_and_product((32,) if quick else (32, 256))
    planners = _ilqr()
    save("primitives", {"primitives": every, "gradient_and_product": targets, "ilqr": planners}, quick=quick)


def _every_primitive(batches: tuple[int, ...], horizons: tuple[int, ...]) -> dict[str, Any]:
    rows = []
    for horizon in horizons:
        for batch in batches:
            task, policy, s0 = _cartpole(horizon, batch, (64, 64))
            calls, compiling = _calls(task, policy, s0)
            seconds = medians(calls, rounds=5 if batch * horizon < LARGE else 2)
            product = max(seconds.pop("products") - seconds["model"], 0.0) / INNER
            rollout = seconds["rollout"]
            multiples = [seconds[name] / rollout for name in ("gradient", "model", "linearise", "riccati")]
            adam = seconds["adam update"] / rollout
            newton = seconds["gauss-newton update"] / rollout if "gauss-newton update" in seconds else "-"
            rows.append(
                [f"{batch}", f"{horizon}", rollout * 1e3, *multiples, product / rollout, adam, newton, compiling]
            )
            print(".", end="", flush=True)
    head = ["B", "T", "rollout ms", "BPTT", "model", "linearise", "Riccati", "product", "Adam", "GN k=30", "compile s"]
    print(f"\nMultiples of the rollout, cart-pole, MLP 2x64, float32\n\n{table(head, rows)}\n")
    return {"columns": head, "rows": rows}


def _calls(task, policy, s0):
    """The compiled calls, and the seconds that compiling took for all of them."""
    adam = d.OptaxSolver(optax.adam, learning_rate=1e-3)
    newton = d.GaussNewton()
    trajectory = jax.jit(d.rollouts)(policy, task, s0)
    lin = jax.jit(jax.vmap(linearize, in_axes=(None, 0)))(task, trajectory)
    carries = {"adam update": adam.init(policy, task), "gauss-newton update": newton.init(policy, task)}

    def products(policy, task, s0):
        model = gauss_newton(policy, task, s0)
        return jax.lax.fori_loop(0, INNER, lambda i, v: v + 1e-9 * model.product(v), model.gradient)

    functions = {
        "rollout": (d.episode_returns, policy, task, s0),
        "gradient": (d.BPTT(), policy, task, s0, None),
        "model": (lambda *x: gauss_newton(*x).gradient, policy, task, s0),
        "products": (products, policy, task, s0),
        "linearise": (jax.vmap(linearize, in_axes=(None, 0)), task, trajectory),
        "riccati": (jax.vmap(riccati, in_axes=(0, None)), lin, jnp.float32(1e-3)),
        "adam update": (partial(adam.update, key=None), policy, carries["adam update"], task, s0),
        "gauss-newton update": (partial(newton.update, key=None), policy, carries["gauss-newton update"], task, s0),
    }
    calls, seconds = {}, 0.0
    if trajectory.r.size >= LARGE:
        del functions["gauss-newton update"]
    for name, (function, *arguments) in functions.items():
        compiled = jax.jit(function)
        seconds += compile_seconds(compiled, *arguments)
        calls[name] = partial(compiled, *arguments)
    return calls, seconds


def _gradient_and_product(batches: tuple[int, ...]) -> dict[str, Any]:
    """Gradient over rollout (at most 5), product over gradient (at most .75 at B = 32, .95 at 256); T = 200."""
    rows = []
    for batch in batches:
        task, policy, s0 = _cartpole(200, batch, (64, 64))

        def repeated(count, policy, task, s0):
            model = gauss_newton(policy, task, s0)
            return jax.lax.fori_loop(0, count, lambda i, v: v + 1e-9 * model.product(v), model.gradient)

        functions = {
            "rollout": (d.episode_returns, policy, task, s0),
            "gradient": (d.BPTT(), policy, task, s0, None),
            "plain": (d.BPTT(remat=None), policy, task, s0, None),
            "few": (partial(repeated, 2), policy, task, s0),
            "many": (partial(repeated, 2 + INNER), policy, task, s0),
        }
        calls = {name: partial(jax.jit(f), *arguments) for name, (f, *arguments) in functions.items()}
        for call in calls.values():
            jax.block_until_ready(call())
        t = medians(calls, rounds=7)
        product = (t["many"] - t["few"]) / INNER
        rows.append(
            [
                f"{batch}",
                t["rollout"] * 1e3,
                t["gradient"] / t["rollout"],
                t["plain"] / t["rollout"],
                product / t["gradient"],
            ]
        )
    head = ["B", "rollout ms", "BPTT / rollout", "without checkpoint", "product / BPTT"]
    print(f"cart-pole, T = 200, MLP 2x64, float32\n\n{table(head, rows)}\n")
    return {"columns": head, "rows": rows}


def _ilqr() -> dict[str, Any]:
    """An iLQR iteration in rollouts (at most 8, 10 and 31): the rollout is one call, an iteration a tenth of a loop of ten."""
    rows = []
    with jax.enable_x64(True):
        for name in PROBLEMS:
            task = in_double(problem(name, 100))
            s0 = task.initial(jax.random.key(0))
            solver, zero = d.ILQR(), d.Affine.zeros(task)
            plan, history = d.solve(solver, zero, task, s0, None, 400, tolerance=1e-3)
            carry = solver.init(zero, task)

            def iterations(plan, carry, task, s0, solver=solver):
                def one(_, state):
                    plan, carry = state
                    return solver.update(plan, carry, task, s0, key=None)[:2]

                return jax.lax.fori_loop(0, INNER, one, (plan, carry))

            def many_rollouts(plan, task, s0):
                return jax.lax.fori_loop(0, INNER, lambda _, s: s + 1e-9 * d.rollout(plan, task, s).s_T, s0)

            rollout, loop, rolls = jax.jit(d.rollout), jax.jit(iterations), jax.jit(many_rollouts)
            open_loop = d.OpenLoop.zeros(task)
            compiling = compile_seconds(loop, zero, carry, task, s0)
            calls = {
                "rollout": partial(rollout, open_loop, task, s0),
                "rollouts": partial(rolls, open_loop, task, s0),
                "iterations": partial(loop, zero, carry, task, s0),
            }
            for call in calls.values():
                jax.block_until_ready(call())
            t = medians(calls, rounds=9)
            iteration, inside = t["iterations"] / INNER, t["rollouts"] / INNER
            cost = -float(d.episode_return(plan, task, s0))
            times = [t["rollout"] * 1e6, inside * 1e6, iteration * 1e6]
            rows.append(
                [name, cost, f"{history.updates}", *times, iteration / t["rollout"], iteration / inside, compiling]
            )
    head = [
        "system",
        "cost",
        "iterations",
        "rollout us",
        "in a loop us",
        "iteration us",
        "ratio",
        "in a loop",
        "compile s",
    ]
    print(f"iLQR, T = 100, float64, one start from zero actions\n\n{table(head, rows)}")
    return {"columns": head, "rows": rows}


def _cartpole(horizon: int, batch: int, hidden: tuple[int, ...]):
    task = d.tasks.cartpole_balance(horizon=horizon)
    policy = d.Neural.init(task, hidden=hidden, key=jax.random.key(0))
    return task, policy, task.starts(jax.random.key(1), batch)
