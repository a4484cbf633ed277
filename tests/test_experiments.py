"""The runner of experiments, one of them in a tiny form, and what each must have."""

import importlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import diffmbrl as d
from diffmbrl.diagnostics.lyapunov import mean_exponents
from diffmbrl.diagnostics.products import log_singular_values, products
from diffmbrl.second_order.curvature import gauss_newton
from diffmbrl.tasks.integrate import rk4, semi_implicit
from experiments import (
    closed_loop,
    double_pendulum,
    early_actions,
    first_vs_second,
    imitation,
    jacobian_products,
    landscapes,
    record,
    second_order,
)
from experiments.__main__ import EXPERIMENTS, main
from experiments.programs import forget_programs

TINY = first_vs_second.QUICK._replace(horizons=(4,), seeds=2, starts=2, hidden=(2,), rates=(1e-3, 1e-1), looks=2)


@pytest.mark.parametrize("arguments", [[], ["imitatoin"], ["imitation", "--slow"]])
def test_bad_arguments_end_with_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: python -m experiments" in capsys.readouterr().err


def test_redrawing_what_was_not_measured_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run `python -m experiments imitation` first"):
        record.redraw("imitation", quick=True, folder=tmp_path)


@pytest.mark.parametrize("name", sorted(EXPERIMENTS))
def test_every_row_has_its_pieces(name: str) -> None:
    module = importlib.import_module(f"experiments.{name}")
    assert module.__doc__ and len(module.__doc__.split("\n")[0]) > 20
    assert module.EXPECTED.endswith(".")
    assert module.FULL != module.QUICK
    assert all(callable(getattr(module, piece)) for piece in ("measure", "conclude", "paint"))


def test_tiny_run_keeps_its_parts_and_redraws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_vs_second, "QUICK_METHODS", ("adam",))
    path = record.run("first_vs_second", quick=True, size=TINY, folder=tmp_path)
    saved = json.loads(path.read_text())
    assert saved["choices"]["starts"] == 2 and saved["provenance"]["x64"] is True
    run = saved["numbers"]["horizons"]["4"]["adam"]
    assert np.shape(run["train"]) == (len(run["update"]), 2) and np.isfinite(run["train"]).all()
    assert np.shape(run["train_by_rate"]) == (2, 2)
    # The rate shown is the better one, and its curve ends where the sweep says.
    best = int(np.argmin(np.median(run["train_by_rate"], axis=1)))
    assert run["rate"] == run["rates"][best] and run["train"][-1] == run["train_by_rate"][best]
    final = f"{np.median(run['test'][-1]):.3g}"
    assert f"adam {final}" in saved["found"]
    assert (tmp_path / "first_vs_second-quick.png").stat().st_size > 1000

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(first_vs_second, "train", fail)
    again = record.run("first_vs_second", quick=True, size=TINY, folder=tmp_path)
    assert json.loads(again.read_text())["numbers"] == saved["numbers"]
    (tmp_path / "first_vs_second-quick.png").unlink()
    record.redraw("first_vs_second", quick=True, folder=tmp_path)
    assert (tmp_path / "first_vs_second-quick.png").exists()
    with pytest.raises(AssertionError, match="measured again"):
        record.run("first_vs_second", quick=True, size=TINY, fresh=True, folder=tmp_path)


def test_an_interrupted_run_spoils_no_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished = {"closed_loop.json": "of an earlier run", "closed_loop.png": "its figure"}
    for name, content in finished.items():
        (tmp_path / name).write_text(content)
    controller = {"cost": [[1.0, 1.0]] * 2, "success": [[1.0, 1.0]] * 2}
    numbers = {"radii": [0.1, 1.0], "nominal": [1.0, 1.0]} | dict.fromkeys(
        ("plan", "feedback", "MPC", "policy"), controller
    )

    def interrupted(size: Any, parts: record.Parts) -> Iterator[Any]:
        yield {"first": numbers}
        raise KeyboardInterrupt

    def whole(size: Any, parts: record.Parts) -> Iterator[Any]:
        yield {"first": numbers}
        yield {"first": numbers, "second": numbers}

    monkeypatch.setattr(closed_loop, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        record.run("closed_loop", quick=False, folder=tmp_path)
    assert {name: (tmp_path / name).read_text() for name in finished} == finished
    assert list(json.loads((tmp_path / "closed_loop-so-far.json").read_text())["numbers"]) == ["first"]
    monkeypatch.setattr(closed_loop, "measure", whole)
    path = record.run("closed_loop", quick=False, folder=tmp_path)
    assert list(json.loads(path.read_text())["numbers"]) == ["first", "second"]
    assert {file.name for file in tmp_path.iterdir()} == {
        f"closed_loop{suffix}" for suffix in (".json", ".png", ".svg")
    }


def test_compiled_programs_are_kept_until_they_are_too_many() -> None:
    traces = []

    @jax.jit
    def f(x: Any) -> Any:
        traces.append(x)
        return x + 1

    f(1.0)
    forget_programs(beyond=1_000_000)
    f(1.0)
    assert len(traces) == 1
    if Path("/proc/self/maps").exists():
        forget_programs(beyond=0)
        f(1.0)
        assert len(traces) == 2


def test_conclusions_follow_the_numbers() -> None:
    def run(cost: float) -> dict:
        return {"test": [[2.0], [cost]], "train": [[2.0], [cost]], "sequential": [0, 10], "cpu": [0, 1.0]}

    said = imitation.conclude({"t": {"Gauss-Newton": run(1.0), "imitate planner": run(1.5)}})
    assert "Gauss-Newton ends lower than imitate planner" in said
    said = imitation.conclude({"t": {"Gauss-Newton": run(float("nan")), "imitate planner": run(1.5)}})
    assert "Gauss-Newton ends no lower than imitate planner" in said


def test_how_far_a_closed_loop_holds_follows_the_numbers() -> None:
    def controller(*costs: float) -> dict:
        return {"cost": [[cost, cost] for cost in costs], "success": [[1.0, 1.0]] * len(costs)}

    found = {
        "radii": [0.1, 1.0, 2.0],
        "nominal": [1.0, 1.0],
        "plan": controller(9, 9, 9),
        "policy": controller(1, 1, 1),
    }
    found |= {"feedback": controller(1, 1, 5), "MPC": controller(1, float("inf"), 1)}
    said = closed_loop.conclude({"t": found})
    assert "plan holds nowhere" in said and "feedback holds to 1 " in said
    assert "MPC holds to 0.1 " in said and "policy holds to 2 " in said


def test_every_arm_of_imitation_makes_a_solver() -> None:
    task = d.tasks.lqr(horizon=6)
    for arm in imitation.arms(imitation.QUICK, task).values():
        for rate in arm.rates or [None]:
            made = arm.make(rate, arm.steps)
            assert isinstance(made, d.Continuation) and made.discounts[0] == np.float32(0.8)


@pytest.mark.slow
def test_imitation_of_a_gradient_step_regresses_onto_it(x64: None) -> None:
    task = d.tasks.lqr(horizon=6)
    policy = d.Linear(jnp.array([[0.1, -0.2]]), jnp.array([0.3]))
    s0 = task.starts(jax.random.key(0), 5)
    solver = imitation.GradientImitation()
    moved, _, info = jax.jit(partial(solver.update, key=None))(policy, solver.init(policy, task), task, s0)
    step = np.concatenate([np.ravel(moved.K - policy.K), np.ravel(moved.b - policy.b)])
    columns, g = jax.jit(_columns)(policy, task, s0)
    G, g = np.asarray(columns).reshape(3, -1).T, np.asarray(g).ravel()
    N = G.T @ G / 5
    expected = -np.linalg.solve(N + imitation.DAMPING * np.linalg.eigvalsh(N)[-1] * np.eye(3), G.T @ g)
    assert bool(info.accepted)
    np.testing.assert_allclose(step / np.linalg.norm(step), expected / np.linalg.norm(expected), atol=1e-9)


def _columns(policy, task, s0):
    """The columns of G, one for each parameter, and g."""
    model = gauss_newton(policy, task, s0)
    return jax.vmap(model.push)(jnp.eye(3)), model.g


def test_growth_of_a_constant_loop_is_its_spectral_radius(x64: None) -> None:
    A = jnp.diag(jnp.array([1.25, 0.5]))
    growth = second_order._growth(jnp.tile(A[None, :, :, None], (400, 1, 1, 1)))
    # The Frobenius norm of the identity it starts from adds 2^(1/800) at most.
    assert float(growth[0]) == pytest.approx(1.25, rel=2e-3)


def test_tangents_of_the_double_pendulum_are_slopes_and_energy_is_that_of_two_masses(x64: None) -> None:
    start, goal, h = double_pendulum._state("released"), jnp.array([jnp.pi, 0.0]), 1e-3
    offsets = jnp.array([0.0, 1e-6, -1e-6])
    run = jax.jit(double_pendulum._simulate, static_argnames=("every", "looks"))
    cost, slope, error = run(double_pendulum._pendulum(semi_implicit, h), start, goal, offsets, every=50, looks=6)
    np.testing.assert_allclose(slope[:, 0], (cost[:, 1] - cost[:, 2]) / 2e-6, rtol=1e-6, atol=1e-8)
    exact = run(double_pendulum._pendulum(rk4, h), start, goal, offsets, every=50, looks=6)
    # Of first order: its angles are off by about h times the rates; and RK4 keeps the energy.
    np.testing.assert_allclose(cost[:, 0], exact[0][:, 0], atol=0.02)
    assert float(exact[2].max()) < 1e-10 < 1e-4 < float(error.max())

    def positions(q):
        first, second = q[0], q[0] + q[1]
        tip = jnp.stack([jnp.sin(first), jnp.cos(first)])
        return jnp.stack([tip, tip + jnp.stack([jnp.sin(second), jnp.cos(second)])])

    q, v = jnp.array([0.7, -1.9]), jnp.array([2.0, -3.0])
    speed = jax.jvp(positions, (q,), (v,))[1]
    wanted = 0.1 * (jnp.sum(speed**2) / 2 + 9.81 * jnp.sum(positions(q)[:, 1]))
    np.testing.assert_allclose(double_pendulum.energy(jnp.concatenate([q, v])), wanted, rtol=1e-12)


def test_variances_of_gradients_of_a_known_cost() -> None:
    rng = np.random.default_rng(0)
    eps, sigma = rng.normal(size=200_000), 0.5
    # The cost x^2 / 2 at a mean of 1: FoBG is 1 + sigma eps, ZoBG eps^2 + sigma eps^3 / 2.
    x = np.append(1 + sigma * eps, 1.0)[None]
    found = double_pendulum._statistics(x**2 / 2, x, np.zeros_like(x), eps, sigma)
    for name, wanted in [("pathwise variance", sigma**2), ("score variance", 2 + 15 * sigma**2 / 4)]:
        np.testing.assert_allclose(found[name], wanted, rtol=0.03)
    for name in ("pathwise", "score"):
        np.testing.assert_allclose(found[f"{name} mean"], 1, atol=5 * float(found[f"{name} error"][0]))


def test_roughness_is_of_neighbours() -> None:
    x = np.linspace(-1, 1, 400)
    assert landscapes._roughness(x**2) < 1e-3
    assert landscapes._roughness(np.random.default_rng(0).normal(size=4000)) == pytest.approx(1, rel=0.05)
    assert landscapes._roughness(np.ones(9)) == 0


def test_what_is_said_of_constant_jacobians(x64: None) -> None:
    """One with a radius below 1 whose product first grows, and a turn of radius 1."""
    A = jnp.stack([jnp.array([[0.9, 5.0], [0.0, 0.9]]), jnp.array([[0.0, -1.0], [1.0, 0.0]])])
    loop = jnp.broadcast_to(A[:, None], (2, 40, 2, 2))
    factors = jax.vmap(products)(loop)
    found = jacobian_products._summary(
        loop,
        factors,
        jax.vmap(log_singular_values)(factors),
        jax.vmap(lambda x: mean_exponents(x, 1.0))(factors.growth),
    )
    t = found["t"]
    np.testing.assert_allclose(found["one step, summed"], np.stack([t * np.log(0.9), 0 * t], 1), atol=1e-7)
    np.testing.assert_allclose(found["radius"], found["one step, summed"], atol=1e-6)
    assert found["largest"][8, 0] > 2 and abs(found["largest"][8, 1]) < 1e-12
    # Jordan blocks converge as 1/T only; the turn does not grow.
    np.testing.assert_allclose(found["exponents"][1], 0, atol=1e-12)
    numbers = {"fit": {"change": 0.1, "Jacobian": 0.2}, **{who: {"1.0": found} for who in jacobian_products.DYNAMICS}}
    said = jacobian_products.conclude({"stable": numbers})
    assert "errs by 10.0% in the change of the state and 20.0% in its Jacobian" in said and "(T = 40)" in said


@pytest.mark.slow
def test_parts_in_time_are_of_the_gradient(x64: None) -> None:
    size = early_actions.QUICK._replace(horizons=(6,), seeds=2, starts=3, hidden=(3,))
    found = early_actions._profiles("lqr", 6, size)
    task = d.tasks.lqr(horizon=6)
    keys = jax.random.split(jax.random.key(0), (2, 2))
    policy = d.Neural.init(task, hidden=(3,), key=keys[0, 0], output_scale=size.scale)
    gradient = jax.grad(d.mean_return)(policy, task, task.starts(keys[0, 1], 3))
    total = np.linalg.norm(ravel_pytree(gradient)[0])
    assert found["gradient over parts"][0] * found["part"][:, 0].sum() == pytest.approx(total)
    assert found["closed loop"].shape == (6, 2) and 0 <= found["half"][0] < 1
    assert "lqr, T = 6" in early_actions.conclude({"lqr": {"6": found}})
