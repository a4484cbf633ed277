"""The runner of experiments, one of them in a tiny form, and what each must have."""

import importlib
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffmbrl as d
from diffmbrl.curvature import gauss_newton
from experiments import closed_loop, first_vs_second, imitation, record, second_order
from experiments.__main__ import EXPERIMENTS, main

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
