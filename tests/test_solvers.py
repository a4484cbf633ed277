"""What every solver promises, for every row of the table in solvers.py."""

from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffmbrl import (
    ILQR,
    Affine,
    Continuation,
    GaussNewton,
    MultiStart,
    Neural,
    OptaxSolver,
    Sequential,
    ShortHorizon,
    episode_return,
    mean_return,
    solve,
)
from diffmbrl.core import Solver, Task
from diffmbrl.diagnostics.spectrum import in_double
from diffmbrl.info import Info
from tests.problems import bent, changed, same, same_tree
from tests.solvers import ADAM, SOLVERS, Row

# The bent task has no noise unless asked: the key is there so that every test shares one compiled update.
KEY = jax.random.key(1)
BATCH, HORIZON, STEPS = 3, 8, 8
ROWS = {row.name: row for row in SOLVERS}

every_solver = pytest.mark.parametrize(
    "row", [pytest.param(row, marks=pytest.mark.slow) if row.slow else row for row in SOLVERS], ids=lambda row: row.name
)


class Case(NamedTuple):
    solver: Any
    policy: Any
    carry: Any
    task: Task
    s0: Any


def case(row: Row, *, double: bool = False, seed: int = 0) -> Case:
    """A row on the bent task: a small random network on three starts, or a plan of nothing from one."""
    task, solver = bent(horizon=HORIZON), in_double(row.solver) if double else row.solver
    key_policy, key_starts = jax.random.split(jax.random.key(seed))
    if row.kind == "plan":
        policy, s0 = Affine.zeros(task), task.initial(key_starts)
    else:
        policy, s0 = Neural.init(task, hidden=[4], key=key_policy), task.starts(key_starts, BATCH)
    return Case(solver, policy, solver.init(policy, task), task, s0)


def of_planners() -> list[Any]:
    """Those whose own tests have no horizon of one step are not slow."""
    rows = [row for row in SOLVERS if row.kind == "plan" and not isinstance(row.solver, Continuation)]
    return [row if row.name == "icem" else pytest.param(row, marks=pytest.mark.slow) for row in rows]


TRACES: list[Any] = []


@jax.jit
def update(solver, policy, carry, task, s0, key):
    TRACES.append(solver)
    return solver.update(policy, carry, task, s0, key=key)


@jax.jit
def reached(policy, task, s0):
    return episode_return(policy, task, s0) if s0.ndim == 1 else mean_return(policy, task, s0)


@cache
def solved(name: str) -> Any:
    solver, policy, _, task, s0 = case(ROWS[name])
    return solve(solver, policy, task, s0, KEY, STEPS)


def differ(one: Any, other: Any) -> bool:
    return any(np.any(x != y) for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def scaled(tree: Any, factor: float) -> Any:
    """Float leaves times a factor."""
    return jax.tree.map(lambda x: x * factor if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


@every_solver
def test_it_is_a_solver(row):
    assert isinstance(row.solver, Solver)
    assert row.solver.kind == row.kind


@every_solver
def test_it_improves_the_return(row):
    solver, policy, _, task, s0 = case(row)
    better, history = solved(row.name)
    assert (history.updates, history.stop) == (STEPS, f"{STEPS} updates")
    assert reached(better, task, s0) > reached(policy, task, s0) + 0.1
    assert not history.info.nonfinite.any()
    # Measured at the policy that the update was given, for the objective in force.
    first = solver.in_force(policy, task, s0, 0) if isinstance(solver, Continuation) else task
    same(history.info.J[0], reached(policy, first, s0), rtol=1e-5)


@every_solver
def test_it_never_makes_worse_what_it_promises_not_to(row):
    J = solved(row.name)[1].info.J
    if row.monotone:
        assert np.all(np.diff(J) >= -2e-6 * np.abs(J[:-1])), J
    else:
        assert J[-1] > J[0]


@every_solver
def test_accepted_says_whether_the_policy_changed(row):
    solver, policy, carry, task, s0 = case(row)
    for step in range(20):
        moved, carry, info = update(solver, policy, carry, task, s0, KEY)
        assert bool(info.accepted) == differ(moved, policy), step
        policy = moved


@every_solver
def test_the_loop_on_the_device_is_one_update_after_another(row):
    solver, policy, carry, task, s0 = case(row)
    history = solved(row.name)[1]
    for step in range(3):
        policy, carry, info = update(solver, policy, carry, task, s0, jax.random.fold_in(KEY, step))
        same(info.J, history.info.J[step], rtol=1e-4)
        assert info.accepted == history.info.accepted[step]


@pytest.mark.parametrize(
    "row", [row if row.name == "sgd" else pytest.param(row, marks=pytest.mark.slow) for row in SOLVERS], ids=list(ROWS)
)
def test_without_jit_it_does_the_same(row, x64):
    solver, policy, carry, task, s0 = case(row, double=True)
    eager, compiled = solver.update(policy, carry, task, s0, key=KEY), update(solver, policy, carry, task, s0, KEY)
    same_tree(eager[0], compiled[0], rtol=1e-6, atol=1e-8)
    eager, compiled = (info._replace(damping=0.0, model=None) for info in (eager[2], compiled[2]))
    same_tree(eager, compiled, rtol=1e-6)


# Rows with a control flow of their own: the others are made of these.
VMAPPED = {
    *("adam", "lbfgs", "gauss-newton", "ilqr", "icem"),
}


@pytest.mark.parametrize(
    "row",
    [row if row.name in VMAPPED else pytest.param(row, marks=pytest.mark.slow) for row in SOLVERS],
    ids=list(ROWS),
)
def test_a_vmap_over_seeds_is_a_loop(row, x64):
    cases = [case(row, double=True, seed=seed) for seed in range(2)]
    solver, task = cases[0].solver, cases[0].task
    policies, carries, starts = (
        jax.tree.map(lambda *xs: jnp.stack(xs), *(getattr(c, name) for c in cases))
        for name in ("policy", "carry", "s0")
    )
    together = jax.jit(jax.vmap(lambda p, c, s: solver.update(p, c, task, s, key=KEY)))
    for _ in range(2):
        out = together(policies, carries, starts)
        for lane in range(2):
            policy, carry, s0 = jax.tree.map(lambda x, lane=lane: x[lane], (policies, carries, starts))
            alone = update(solver, policy, carry, task, s0, KEY)
            lane_of = jax.tree.map(lambda x, lane=lane: x[lane], out)
            same_tree(lane_of[0], alone[0], rtol=1e-6, atol=1e-7)
            same_tree(lane_of[2]._replace(model=None), alone[2]._replace(model=None), rtol=1e-6)
            same_tree(_within(lane_of[2].model), _within(alone[2].model), rtol=1e-3, atol=1e-6)
        policies, carries, _ = out


def _within(model: Any) -> Any:
    """By how much the longest candidates throw the policy away is a matter of rounding; that they do is not."""
    return model if model is None else model._replace(improved=np.maximum(model.improved, -100.0))


@every_solver
def test_new_numbers_do_not_recompile(row):
    solver, policy, carry, task, s0 = case(row)
    policy, carry, _ = update(solver, policy, carry, task, s0, KEY)
    before = len(TRACES)
    policy, carry, _ = update(solver, policy, carry, task, s0, KEY)  # the second step of an L-BFGS, too
    update(solver, policy, carry, task, s0, jax.random.key(2))
    update(scaled(solver, 0.9), policy, carry, task, s0, KEY)  # dampings, learning rates, discounts
    update(solver, policy, carry, changed(task, mass=1.2, scale=2.0), s0, KEY)
    update(solver, policy, carry, changed(task, weights=0.9 ** np.arange(HORIZON + 1)), s0, KEY)
    other = case(row, seed=1)
    update(solver, other.policy, other.carry, other.task, other.s0, KEY)
    assert len(TRACES) == before


@pytest.mark.parametrize("make", [lambda: OptaxSolver(optax.adam, learning_rate=1e-2), GaussNewton, ILQR])
def test_a_solver_made_anew_does_not_recompile(make):
    kind = "plan" if make is ILQR else "policy"
    first, second = (case(Row("made anew", make(), kind)) for _ in range(2))
    update(*first, KEY)
    before = len(TRACES)
    update(*second, KEY)
    assert len(TRACES) == before


@every_solver
@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
def test_it_keeps_the_precision(row, double):
    with jax.enable_x64(double):
        c = case(row, double=double)
        policy, carry, info = update(*c, KEY)
        float_type = np.dtype(np.float64 if double else np.float32)
        assert jax.tree.map(_type, policy) == jax.tree.map(_type, c.policy)
        assert jax.tree.map(_type, carry) == jax.tree.map(_type, c.carry)
        assert {leaf.dtype for leaf in jax.tree.leaves(policy)} == {float_type}
        whole = np.dtype(np.int32)
        norm_type = float_type if row.gradients else None
        expected_types = Info(float_type, norm_type, np.dtype(bool), float_type, whole, whole, (whole,) * 4)
        plain = info._replace(model=None, violation=None, merit=None, final=None)
        assert [x.dtype for x in jax.tree.leaves(plain)] == jax.tree.leaves(expected_types)
        assert {x.dtype for x in jax.tree.leaves((info.violation, info.merit))} <= {float_type}
        assert info.final is None or info.final.dtype == bool
        assert all(x.shape == () for x in jax.tree.leaves(info._replace(model=None)))
        assert {x.dtype for x in jax.tree.leaves(info.model)} <= {float_type}


def _type(x: Any) -> tuple:
    return x.dtype, x.shape, x.weak_type


@every_solver
def test_hyperparameters_are_array_leaves(row):
    leaves = jax.tree.leaves(row.solver)
    # A random key has no weak type.
    assert all(isinstance(leaf, jax.Array) and not getattr(leaf, "weak_type", False) for leaf in leaves)


def test_learning_rates_are_lanes():
    _, policy, carry, task, s0 = case(ROWS["adam"])
    rates = [1e-3, 1e-2]
    solvers = jax.tree.map(lambda *xs: jnp.stack(xs), *(OptaxSolver(optax.adam, learning_rate=rate) for rate in rates))
    swept, _, _ = jax.jit(jax.vmap(lambda solver: solver.update(policy, carry, task, s0, key=KEY)))(solvers)
    for lane, rate in enumerate(rates):
        alone, _, _ = update(OptaxSolver(optax.adam, learning_rate=rate), policy, carry, task, s0, KEY)
        same_tree(jax.tree.map(lambda x, lane=lane: x[lane], swept), alone, rtol=1e-5, atol=1e-6)


BAD = {
    "dynamics": lambda task, s0: (changed(task, mass=np.nan), s0),
    "start": lambda task, s0: (task, s0.at[..., 0].set(np.nan) if s0.ndim == 1 else s0.at[1, 0].set(np.nan)),
    "reward": lambda task, s0: (changed(task, scale=np.inf), s0),
    "gradient": lambda task, s0: (changed(task, kink=100.0), s0),
}


@pytest.mark.parametrize("row", of_planners(), ids=lambda row: row.name)
def test_one_step_is_a_horizon(row):
    task = bent(horizon=1)
    s0, rest = task.initial(KEY), Affine.zeros(task)
    plan, history = solve(row.solver, rest, task, s0, KEY, STEPS)
    assert plan.a.shape == (1, 1) and np.all(np.isfinite(history.info.J)) and not history.info.nonfinite.any()
    assert episode_return(plan, task, s0) > episode_return(rest, task, s0)


@every_solver
@pytest.mark.parametrize("what", BAD)
def test_what_is_not_finite_is_rejected_and_counted(row, what):
    if what == "gradient" and not row.gradients:
        pytest.skip("it takes no gradient")
    solver, policy, carry, task, s0 = case(row)
    bad_task, bad_s0 = BAD[what](task, s0)
    moved, warm, _ = update(solver, policy, carry, task, s0, KEY)
    for given, before in [(policy, carry), (moved, warm)]:
        kept, after, info = update(solver, given, before, bad_task, bad_s0, KEY)
        assert not info.accepted and info.nonfinite >= 1 and not differ(kept, given)
        # Again, and then on the good problem, as if it had not been.
        kept, after, info = update(solver, given, after, bad_task, bad_s0, KEY)
        assert not info.accepted and info.nonfinite >= 1 and not differ(kept, given)
        # By the clock a rejected update counts.
        if not isinstance(solver, Continuation | Sequential):
            resumed, _, info = update(solver, given, after, task, s0, KEY)
            if isinstance(solver, ShortHorizon):
                # But for the clock, and that its episodes begin anew: any may have been in a state that was lost.
                before = before._replace(norm=np.full_like(before.norm, np.nan), updates=before.updates + 2)
            undisturbed, _, same_info = update(solver, given, before, task, s0, KEY)
            assert info.accepted == same_info.accepted and not info.nonfinite
            same_tree(resumed, undisturbed, rtol=1e-5, atol=1e-5)


# The loop is the same for every solver: a rule, a line search, a system, a plan, and one without a gradient.
NAMED = {"adam", "lbfgs", "gauss-newton", "ilqr", "icem"}


def test_the_return_is_finite_where_only_its_gradient_is_not():
    _, policy, _, task, s0 = case(ROWS["adam"])
    task, _ = BAD["gradient"](task, s0)
    assert np.isfinite(reached(policy, task, s0))
    gradient = jax.jit(jax.grad(reached))(policy, task, s0)
    assert any(np.isnan(leaf).any() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    "row",
    [row if row.name in NAMED else pytest.param(row, marks=pytest.mark.slow) for row in SOLVERS],
    ids=list(ROWS),
)
def test_solve_stops_and_names_what_is_not_finite(row):
    solver, policy, _, task, s0 = case(row)
    # A force divided by no mass, for a method that does not see the gradient of the kink.
    bad = changed(task, kink=100.0) if row.gradients else changed(task, mass=0.0)
    same_policy, history = solve(solver, policy, bad, s0, KEY, STEPS)
    assert history.updates == 1
    # The path of a leaf and the number of the update.
    where = "dJ/dtheta in " + ("plan." if row.kind == "plan" else "policy.") if row.gradients else "s[1] of start 0"
    assert history.stop.startswith(f"nonfinite: {where}")
    assert history.stop.endswith("(update 1)")
    assert not differ(same_policy, policy)


@every_solver
def test_work_is_counted(row):
    info = solved(row.name)[1].info
    batch = 1 if row.kind == "plan" else BATCH
    assert np.all(np.stack(info.work) >= 0)
    # At least a rollout and its derivatives, in whole passes.
    assert np.all(info.work.forward >= HORIZON * batch * (info.work.sequential > 0))
    assert np.all(info.work.forward % (HORIZON * batch) == 0)
    assert np.all((info.work.vjp > 0) | (info.work.jvp > 0) | ("lbfgs" in row.name) | (not row.gradients))
    assert np.all(info.inner_iterations >= 0)


@every_solver
def test_what_it_says_of_its_model_is_true(row):
    J, model, accepted = (getattr(solved(row.name)[1].info, name) for name in ("J", "model", "accepted"))
    if model is None:
        assert not row.models
        return
    assert row.models
    assert np.all(np.diff(model.ritz, axis=-1) >= 0) or "square root" in row.name
    assert np.all((model.negative >= 0) & (model.negative <= 1))
    if not isinstance(row.solver, Continuation | MultiStart):
        # The best candidate is the one that was taken, and the next update starts where it led.
        np.testing.assert_allclose(np.diff(J), np.max(model.improved, axis=-1)[:-1] * accepted[:-1], atol=2e-5)
    if np.all(np.isfinite(model.gap)):
        assert np.all((model.gap >= 0) & (model.gap <= 1.5))


def test_work_of_first_order_methods_is_exact():
    """A pass forward, its recomputation and a pass back, each of B T steps."""
    steps = BATCH * HORIZON
    info = solved("adam")[1].info
    assert set(info.work.forward) == {2 * steps}
    assert set(info.work.vjp) == {steps}
    assert set(info.work.jvp) == {0}
    assert set(info.work.sequential) == {3}
    assert set(info.inner_iterations) == {0}
    # L-BFGS evaluates once, then as often as its line search asks, and uses the last trial again.
    solver, policy, _, task, s0 = case(ROWS["lbfgs"])
    info = solve(solver, policy, task, s0, None, STEPS)[1].info
    evaluations = info.inner_iterations + np.eye(1, STEPS, dtype=int)[0]
    np.testing.assert_array_equal(info.work.vjp, steps * evaluations)
    np.testing.assert_array_equal(info.work.forward, 2 * steps * evaluations)


def test_work_of_second_order_methods_is_exact():
    steps = BATCH * HORIZON
    info = solved("gauss-newton, chunked")[1].info
    assert set(info.work.forward) == {steps * (2 + 12)}  # the path has twelve candidates
    assert set(info.work.jvp) == {steps * 3}
    assert set(info.work.sequential) == {2 + 2 * 8 + 1}
    assert set(solved("dense gauss-newton")[1].info.work.sequential) == {2 + 1 + 1}
    info = solved("ilqr")[1].info
    assert set(info.work.jvp) == {HORIZON * 3}
    trials = info.work.forward // HORIZON - 2
    assert trials.min() >= 1
    sweeps = info.inner_iterations - trials
    np.testing.assert_array_equal(info.work.sequential, 2 + trials + sweeps)


# What a line search leaves for the next update.


@pytest.fixture(scope="module")
def after_a_search():
    solver, policy, carry, task, s0 = case(ROWS["lbfgs"])
    task = changed(task, noise=0.3)
    policy, carry, _ = update(solver, policy, carry, task, s0, KEY)
    return solver, policy, carry, task, s0


@pytest.mark.parametrize("what", ["nothing", "mass", "weights", "starts", "key"])
def test_a_stored_gradient_is_used_for_its_own_objective_alone(after_a_search, what):
    solver, policy, carry, task, s0 = after_a_search
    key = KEY
    if what == "mass":
        task = changed(task, mass=0.81)
    elif what == "weights":
        task = changed(task, weights=task.weights.at[-1].set(0.99))
    elif what == "starts":
        s0 = s0.at[0, 0].add(0.01)
    elif what == "key":
        key = jax.random.key(2)
    _, _, info = update(solver, policy, carry, task, s0, key)
    J, gradient = jax.jit(jax.value_and_grad(mean_return))(policy, task, s0, key)
    same(info.J, J, rtol=1e-5)
    same(info.gradient_norm, optax.tree.norm(gradient), rtol=1e-3)
    evaluations = int(info.work.vjp) // (BATCH * HORIZON) - int(info.inner_iterations)
    assert evaluations == (0 if what == "nothing" else 1)


def test_a_rule_is_a_constructor():
    for wrong in (optax.adam(1e-2), 3):
        with pytest.raises(TypeError, match=r"rule must be a constructor such as optax\.adam.*; got (Gradient|int)"):
            OptaxSolver(wrong)


def test_hyperparameters_that_are_not_numbers_are_static():
    assert set(ADAM.hyperparameters) == {"learning_rate"}
    assert OptaxSolver(optax.lbfgs, memory_size=7).options == (("memory_size", 7),)
    assert jax.tree.structure(OptaxSolver(optax.adam, learning_rate=1.0)) == jax.tree.structure(
        OptaxSolver(optax.adam, learning_rate=2.0)
    )
