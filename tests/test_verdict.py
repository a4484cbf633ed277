"""The verdict's numbers: what is measured, how it is scored, and what is said of it."""

import jax
import numpy as np
import pytest

from diffmbrl.agents.registry import AGENTS
from diffmbrl.agents.registry import make_agent as make_agent
from diffmbrl.tasks import make
from experiments import verdict
from tests.problems import some_slow

TINY = verdict.Size(("pendulum",), (verdict.RANDOM,), 300, 2, 3, 2)


@pytest.mark.parametrize(
    "row", some_slow([row for row in verdict.ROWS if verdict.ROWS[row].agent in AGENTS], "1.5: MPC")
)
def test_every_row_makes_its_agent(row: str) -> None:
    given = verdict.ROWS[row]
    agent = make_agent(given.agent, make("pendulum"), given.options(9))
    assert agent.warmup >= agent.every >= 1


@pytest.mark.slow
def test_a_run_has_all_looks_and_the_same_starts_each_time() -> None:
    run = verdict._learn("pendulum", verdict.ROWS[verdict.RANDOM], TINY)
    assert run["steps"] == [100, 200, 300]
    J = np.array(run["J"])
    assert J.shape == (3, 2) and np.all(J < 0)
    # Random actions learn nothing: the same starts and noise give the same returns.
    assert np.all(J[0] == J) and J[0, 0] != J[0, 1]
    assert run["seconds"][0] == 0 and np.all(np.diff(run["seconds"]) > 0)
    assert (run["rejected"], run["refused"]) == (0, 0)
    assert not jax.config.jax_enable_x64


def test_an_iterations_time_is_the_median_without_compilation_and_looks() -> None:
    # The first record is the warm-up's and the second has the compilation in it; a look costs 10.
    looked = [True, False, False, True, False]
    assert verdict._per_iteration(np.array([90.0, 1.0, 11.0, 2.0]), looked) == 1.5
    assert verdict._per_iteration(np.array([90.0, 11.0, 12.0]), [True] * 4) == 11.5
    assert np.isnan(verdict._per_iteration(np.array([90.0]), [True, True]))


def run(*J: float, steps=(10, 20)) -> dict:
    return {"steps": list(steps), "seconds": [0.0, 2.0], "wall": [0.0, 3.0], "J": [[x, x, x] for x in J], "rejected": 0}


def test_scores_conclusion_and_figure_follow_the_numbers() -> None:
    found = {"random": run(-10, -10), "hybrid": run(-10, -2), "2.0: Adam": run(-10, -9), "PPO": run(-4, float("nan"))}
    scored = verdict.scores(found)
    np.testing.assert_allclose(scored["hybrid"][:, 0], [0, 1])
    np.testing.assert_allclose(scored["2.0: Adam"][:, 0], [0, 1 / 8])
    said = verdict.conclude({"t": found})
    assert "hybrid -2 (3 of 3 seeds, 90% after 20 steps and 2 s)" in said
    assert "2.0: Adam -9 (0 of 3 seeds)" in said and "PPO -inf (0 of 3 seeds, not finite on 3)" in said
    assert "Not measured: " in said and "MBPO" in said
    assert len(verdict.paint({"t": found}).axes) == 2
    # Until random actions are measured there is no scale, and nothing is said.
    assert "hybrid -2" not in verdict.conclude({"t": {"hybrid": run(-10, -2)}})
    verdict.paint({"t": {"hybrid": run(-10, -2)}})
