"""The results file of the benchmarks of optimisers: what was run is not run again, and no process loses another's."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import arms, record
from benchmarks.arms import Case, Ledger

CASE = Case("lqr", 10, "lbfgs", "default", 4)
MEASURED = {"train": 1.0, "test": 2.0, "success": 1.0, "gradients": 3.0, "sequential": 4.0, "cpu": 5.0, "compile": 6.0}


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Case, int]]:
    """Results go to a folder of their own, from runs that cost nothing; the list says which were made."""
    made: list[tuple[Case, int]] = []

    def run(case: Case, first: int, quick: bool, looks: int) -> list[dict[str, Any]]:
        made.append((case, first))
        return [case._asdict() | MEASURED | {"seed": first + k} for k in range(arms.TOGETHER)]

    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(arms, "_run", run)
    return made


def kept() -> list[dict[str, Any]]:
    return json.loads(record.path("some", quick=False).read_text())["result"]["seeds"]


def test_what_is_in_the_file_is_not_run_again(measured: list[tuple[Case, int]]) -> None:
    for first in (0, 5, 0):
        Ledger("some", quick=False).run(CASE, first=first)
    assert measured == [(CASE, 0), (CASE, 5)]
    assert [run["seed"] for run in kept()] == list(range(10))
    Ledger("some", quick=False).run(CASE._replace(horizon=20))
    assert len(kept()) == 15 and len(measured) == 3


def test_a_rate_of_the_table_is_chosen_by_the_training_cost(
    measured: list[tuple[Case, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = dict(zip(arms.METHODS["adam"].rates, (3.0, float("nan"), 1.0, 2.0), strict=True))
    free = arms._run

    def run(case: Case, *rest: Any) -> list[dict[str, Any]]:
        return [found | {"train": costs[case.rate]} for found in free(case, *rest)]

    monkeypatch.setattr(arms, "_run", run)
    ledger = Ledger("some", quick=False)
    assert ledger.tuned(CASE._replace(arm="adam")).rate == list(costs)[2]
    assert ledger.tuned(CASE).rate is None and len(measured) == len(costs)


def test_processes_that_save_at_the_same_moment_lose_nothing(measured: list[tuple[Case, int]]) -> None:
    cases = [CASE._replace(horizon=horizon) for horizon in range(10, 34)]
    # Each its own ledger, as in a process of its own: what one holds in memory is old when it saves.
    ledgers = [Ledger("some", quick=False) for _ in cases]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda ledger, case: ledger.run(case), ledgers, cases))
    assert sorted((run["horizon"], run["seed"]) for run in kept()) == [(c.horizon, k) for c in cases for k in range(5)]


def test_a_table_added_at_the_end_keeps_what_others_found_meanwhile(measured: list[tuple[Case, int]]) -> None:
    mine, theirs = Ledger("some", quick=False), Ledger("some", quick=False)
    mine.run(CASE)
    theirs.run(CASE._replace(horizon=20))
    mine.save(targets={"columns": ["a"], "rows": [[1.0]]})
    result = json.loads(record.path("some", quick=False).read_text())["result"]
    assert len(result["seeds"]) == 10 and len(result["rows"]) == 2 and result["targets"]["rows"] == [[1.0]]


def test_what_says_the_same_keeps_its_provenance(
    measured: list[tuple[Case, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = iter(range(9))
    monkeypatch.setattr(record, "collect_provenance", lambda **_: {"time": next(moments)})

    def written(seconds: float) -> str:
        return record.save("some", {"rows": [[seconds, (1, np.int64(2), "a")]]}, quick=False).read_text()

    texts = [written(seconds) for seconds in (1.0, 1.0, float("inf"), float("inf"), 2.0)]
    assert [json.loads(text)["provenance"]["time"] for text in texts] == [0, 0, 1, 1, 2]
    assert texts[0] == texts[1] and texts[2] == texts[3]


def test_a_quick_run_keeps_to_itself(measured: list[tuple[Case, int]]) -> None:
    Ledger("some", quick=False).run(CASE)
    quick = Ledger("some", quick=True)
    quick.run(CASE)
    assert len(measured) == 2 and len(quick.seeds) == 5 and len(kept()) == 5
    assert record.path("some", quick=True).exists()
