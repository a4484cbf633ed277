"""The table of methods: every row makes a solver, alone and continued, and a wrong name meets the nearest right one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffmbrl import Continuation, MultiStart, tasks
from diffmbrl.core import Solver
from diffmbrl.gradients.registry import ESTIMATORS
from diffmbrl.methods import METHODS, estimated, method, schedule, solver
from diffmbrl.optimizers.clipped import clipped_muon

every_method = pytest.mark.parametrize("name", METHODS)
TASK = tasks.lqr(horizon=7)


def test_short_names():
    assert [method(name) for name in ("newton", "auto")] == [
        (name, METHODS[name]) for name in ("krylov-newton", "explored-newton")
    ]


@every_method
def test_the_contract_of_a_row(name):
    row = METHODS[name]
    assert row.order in (0, 1, 2) and row.kind in ("policy", "plan")
    assert row.steps >= 5
    assert list(row.rates) == sorted(set(row.rates)) and all(rate > 0 for rate in row.rates)
    made = row.make(row.rates[0] if row.rates else None, row.steps, TASK)
    assert isinstance(made, Solver) and made.kind == row.kind
    assert made.init.__doc__ is None or made.init
    # Lanes are stacked: all rates make one structure.
    structures = {jax.tree.structure(row.make(rate, row.steps, TASK)) for rate in row.rates or [None]}
    assert len(structures) == 1


@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if row.continuation == "none"])
def test_without_a_schedule_of_its_own(name):
    made = solver(METHODS[name], TASK, rate=None, steps=50, continuation="default")
    assert not isinstance(made, Continuation) and schedule(made) is None


@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if row.continuation != "none"])
def test_continued_by_default(name):
    row = METHODS[name]
    rate = row.rates[0] if row.rates else None
    continued = solver(row, TASK, rate=rate, steps=row.steps, continuation="default")
    assert isinstance(continued, MultiStart) == (row.race > 0)
    inner = continued.solver if row.race else continued
    assert isinstance(inner, Continuation) and continued.kind == row.kind
    stages = schedule(continued)
    assert sum(updates for _, updates, _ in stages) == row.steps
    assert stages[-1][0] == 1.0
    discounts = {
        "growing": [1.0] * 7,
        "discounts": [0.8, 0.9, 0.95, 0.98, 1.0],
        "trust": [0.221984, 0.48058, 0.749304, 1.0, 1.0, 1.0],  # gamma^(100 / 7) of .9, .95, .98
    }
    assert [discount for discount, _, _ in stages] == discounts[row.continuation]
    bounds = [10.0, 10.0, 10.0, 10.0, 30.0, None] if row.continuation == "trust" else [None] * len(stages)
    assert [bound for _, _, bound in stages] == bounds
    plain = solver(row, TASK, rate=rate, steps=row.steps, continuation="none")
    assert not isinstance(plain, Continuation) and schedule(plain) is None


def test_a_race_is_over_after_a_fifth_of_the_updates():
    made = solver(METHODS["krylov-newton"], TASK, rate=None, steps=50, continuation="default")
    assert isinstance(made, MultiStart) and made.updates == 10


@pytest.mark.parametrize("name", ["adam", "gauss-newton"])
def test_all_policy_methods_can_be_given_the_same_schedule(name):
    for continuation, trusted, measured in (
        ("discounts", False, False),
        ("trust", True, False),
        ("measured", False, True),
    ):
        made = solver(METHODS[name], TASK, rate=1e-2, steps=50, continuation=continuation)
        assert (made.trusts is not None, made.kappa is not None) == (trusted, measured)


def test_a_rate_is_used():
    row = METHODS["adam"]
    made = [solver(row, TASK, rate=rate, steps=10, continuation="none") for rate in (1e-3, 1e-2)]
    assert [round(float(each.hyperparameters["learning_rate"]), 6) for each in made] == [1e-3, 1e-2]


@pytest.mark.parametrize("name", ["adam-decay", "muon", "soap"])
def test_the_rate_falls_to_nothing_over_the_number_of_updates(name):
    made = solver(METHODS[name], TASK, rate=1e-2, steps=40, continuation="default").solver
    assert float(made.anneal) == 40.0
    assert [round(float(made.annealed(jnp.int32(k))), 6) for k in (0, 20, 40, 50)] == [1.0, 0.5, 0.0, 0.0]


def test_muon_takes_the_second_axis_of_a_matrix_for_its_inputs():
    """Steps of one spectral norm times sqrt(out / in) for a wide layer, 1 for a narrow one; vectors are Adam's."""
    params = {"up": jnp.ones((16, 4)), "down": jnp.ones((4, 16)), "b": jnp.ones(3)}
    gradients = {
        name: jax.random.normal(jax.random.key(k), x.shape) for k, (name, x) in enumerate(sorted(params.items()))
    }
    rule: Any = clipped_muon(1.0)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = rule.update(gradients, rule.init(params), params)
    largest = {name: float(np.linalg.norm(updates[name], 2)) for name in ("up", "down")}
    # Newton and Schulz's five turns leave singular values between .7 and 1.2.
    assert 1.4 < largest["up"] < 2.4 and 0.7 < largest["down"] < 1.2, largest
    np.testing.assert_allclose(np.abs(updates["b"]), np.abs(updates["b"][0]), rtol=1e-4)


def test_underscores_are_hyphens():
    assert method("gauss_newton") == method("gauss-newton") == ("gauss-newton", METHODS["gauss-newton"])


@pytest.mark.parametrize(
    "wrong, nearest", [("adm", "adam"), ("l-bfgs", "lbfgs"), ("gauss-newton-lmm", "gauss-newton-lm"), ("ILQR", "ilqr")]
)
def test_the_nearest_name(wrong, nearest):
    with pytest.raises(ValueError, match=f"unknown method '{wrong}'; did you mean '{nearest}'") as refusal:
        method(wrong)
    assert all(name in str(refusal.value) for name in METHODS)


def test_the_nearest_continuation():
    with pytest.raises(ValueError, match="unknown continuation 'nne'; did you mean 'none'"):
        solver(METHODS["adam"], TASK, rate=1e-2, steps=10, continuation="nne")


def test_fewer_updates_than_stages():
    with pytest.raises(ValueError, match="5 stages need at least 5 updates, got 4"):
        solver(METHODS["adam"], TASK, rate=1e-2, steps=4, continuation="default")
    assert solver(METHODS["ilqr"], TASK, rate=None, steps=4, continuation="default").lengths.tolist() == [1] * 4


def test_every_estimator_goes_into_a_first_order_method():
    rows = dict(estimated("adam", METHODS["adam"], list(ESTIMATORS)))
    assert list(rows) == ["adam" if name == "bptt" else f"adam+{name}" for name in ESTIMATORS]
    for (name, chosen), row in zip(ESTIMATORS.items(), rows.values(), strict=True):
        made = row.make(1e-2, 10, TASK)
        assert jax.tree.structure(made.gradient) == jax.tree.structure(chosen.make(TASK))
        np.testing.assert_allclose(made.hyperparameters["learning_rate"], 1e-2)
        assert (row.estimator, row.draws, row.differentiates) == (name, chosen.draws, chosen.differentiates)


def test_methods_that_take_no_estimator_stay_as_they_are_or_say_why():
    for name in ("krylov-newton", "ilqr", "cem"):
        assert estimated(name, METHODS[name], ["truncated", "evolution"]) == [(name, METHODS[name])]
    assert estimated("lbfgs", METHODS["lbfgs"], ["bptt"]) == [("lbfgs", METHODS["lbfgs"])]
    with pytest.raises(ValueError, match="lbfgs takes no --estimator evolution: its line search differentiates"):
        estimated("lbfgs", METHODS["lbfgs"], ["bptt", "evolution"])
    with pytest.raises(ValueError, match="unknown estimator 'truncate'; did you mean 'truncated'"):
        estimated("krylov-newton", METHODS["krylov-newton"], ["truncate"])
