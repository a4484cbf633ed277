"""A NaN at one step of the dynamics, the reward, the policy or the model: every job stops or rejects as told, and names it."""

import io
import json
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffmbrl.agents import RandomAgent
from diffmbrl.agents.ensemble_trainer import EnsembleTrainer
from diffmbrl.agents.registry import AGENTS as REGISTRY
from diffmbrl.agents.registry import AgentRow as AgentRow
from diffmbrl.cli import main as cli
from diffmbrl.core import Task, restart
from diffmbrl.jobs import compare, plan
from diffmbrl.jobs import learn as race
from diffmbrl.jobs.configs import CompareConfig, LearnConfig, PlanConfig, RunOptions
from diffmbrl.report import rebuild
from diffmbrl.runs import metrics
from diffmbrl.tasks import TASKS
from tests.agents import AGENTS
from tests.problems import some_slow

STEP = 3
NEVER = 1000


def spoilt(x: Any, clock: Any, at: int) -> Any:
    return jnp.where(clock == at, jnp.nan, x)


class Moves(eqx.Module):
    """x' = .9 x + a beside a clock."""

    at: Any

    def __call__(self, s, a, *, key=None):
        return jnp.stack([spoilt(0.9 * s[0] + a[0], s[1], self.at), s[1] + 1])


class Costs(eqx.Module):
    at: Any

    def __call__(self, s, a):
        return spoilt(-(s[0] ** 2) - a[0] ** 2, s[1], self.at)


class Sees(eqx.Module):
    """What a policy is given, from which its action follows."""

    at: int = eqx.field(static=True)

    def __call__(self, s):
        return spoilt(s[:1], s[1], self.at)


class Origin(eqx.Module):
    def __call__(self, key):
        return jnp.stack([jax.random.uniform(key), jnp.zeros(())])


def clocked(*, horizon: int = 6, dynamics: float = NEVER, reward: float = NEVER, policy: float = NEVER) -> Task:
    """Each part is NaN at the step that it is given."""
    return Task(
        name="clocked", dynamics=Moves(jnp.asarray(float(dynamics))), reward=Costs(jnp.asarray(float(reward))),
        initial=Origin(), features=Sees(int(policy)), a_low=[-jnp.inf], a_high=[jnp.inf], horizon=horizon, dt=1.0,
    )  # fmt: skip


class Numbed(RandomAgent):
    """Acts by the features alone."""

    def policy(self, carry, task) -> Any:
        return Follows(task.features)


class Follows(eqx.Module):
    features: Any

    def __call__(self, s, *, key=None):
        return self.features(s)


class Forgets(eqx.Module):
    """A planner whose plan is NaN at one step after every update."""

    inner: Any
    kind = "plan"

    def init(self, plan, task):
        return self.inner.init(plan, task)

    on_objective_change = restart

    @property
    def keeps_limits(self):
        return self.inner.keeps_limits

    def first_plan(self, task):
        return self.inner.first_plan(task)

    def shift(self, carry):
        return self.inner.shift(carry)

    def update(self, plan, carry, task, s0, *, key=None):
        plan, carry, info = self.inner.update(plan, carry, task, s0, key=key)
        return eqx.tree_at(lambda p: p.a, plan, plan.a.at[STEP].set(jnp.nan)), carry, info


@pytest.fixture
def patched(monkeypatch) -> Any:
    """The task in the registry, two small agents, and no figures."""
    monkeypatch.setitem(TASKS, "clocked", TASKS["lqr"]._replace(make=clocked, states=("x [m]", "clock [1]")))
    monkeypatch.setitem(REGISTRY, "random", AgentRow(lambda task: RandomAgent(warmup=12, every=12), "", 36))
    monkeypatch.setitem(REGISTRY, "numbed", AgentRow(lambda task: Numbed(warmup=12, every=12), "", 36))
    monkeypatch.setattr("diffmbrl.jobs.job.rebuild", lambda folder: folder)
    return monkeypatch


def numbers(spoils: dict[str, int]) -> dict[str, float | str]:
    """Parameters as the command line gives them."""
    return {name: float(step) for name, step in spoils.items()}


def compared(out: Path, **spoils: int) -> None:
    setting = CompareConfig(
        "clocked", ("adam",), 6, numbers(spoils), (4,), 2, 2, 3, 100.0, (1e-2,), "none", False, 0
    )  # fmt: skip
    compare.compare_methods(setting, RunOptions(out=out, stream=io.StringIO()))


def planned(out: Path, *, mpc: bool = False, mismatch: float = 1.0, **spoils: int) -> None:
    factors = {} if mismatch == 1 else {"dynamics": mismatch}
    horizon, steps = (4, 6) if mpc else (6, None)
    setting = PlanConfig("clocked", "ilqr", mpc, horizon, steps, 3, numbers(spoils), factors, 0.0, 0, 1, 0, False)
    plan.make_plan(setting, RunOptions(out=out, stream=io.StringIO()))


def learned(out: Path, agent: str = "random", nonfinite: str = "reject", real_steps: int = 36, **spoils: int) -> None:
    setting = LearnConfig(
        "clocked", (agent,), {}, real_steps, 100.0, 2, 0, 6, numbers(spoils), 0.0, 0.0, 0, False, nonfinite=nonfinite
    )  # fmt: skip
    race.race_agents(setting, RunOptions(out=out, stream=io.StringIO()))


def said(folder: Path) -> str:
    """How every arm ended, and what was named on the way."""
    records = metrics.read_metrics(folder / "metrics.jsonl")[0]
    ends = [r.get("reason") or r.get("stop") for r in records if r["kind"] in ("stop", "result")]
    return " | ".join([*map(str, ends), *(name for r in records for name in r.get("nonfinite_in", []))])


NAMES = {"dynamics": f"s[{STEP + 1}]", "reward": f"r[{STEP}]", "policy": f"a[{STEP}]"}


@pytest.mark.parametrize("what", some_slow(NAMES, "dynamics"))
def test_compare_stops_the_lane_and_names_it(what, tmp_path, patched):
    compared(tmp_path / "run", **{what: STEP})
    assert f"nonfinite: {NAMES[what]} of start 0, seed 0; the others: 3 updates" in said(tmp_path / "run")


@pytest.mark.parametrize("mpc", [False, True], ids=["plan", "mpc"])
@pytest.mark.parametrize("what", some_slow(NAMES, "dynamics"))
def test_plan_stops_and_a_controller_goes_on_and_both_name_it(what, mpc, tmp_path, patched):
    if what == "policy":  # a plan has no features: its planner spoils it
        honest = plan.setting.solver
        patched.setattr(plan.setting, "solver", lambda *given, **options: Forgets(honest(*given, **options)))
    planned(tmp_path / "run", mpc=mpc, **({} if what == "policy" else {what: STEP}))
    if mpc:
        assert said(tmp_path / "run").startswith(f"nonfinite: {NAMES[what]} of the plant; 6 steps, ")
    else:
        update = 2 if what == "policy" else 1
        assert said(tmp_path / "run") == f"nonfinite: {NAMES[what]} of start 0 (update {update})"


def test_a_controller_rejects_what_its_model_says_and_names_the_steps(tmp_path, patched):
    planned(tmp_path / "run", mpc=True, mismatch=100.0, dynamics=STEP)
    assert "plant" not in said(tmp_path / "run")  # which is never spoilt
    assert "nonfinite: rollouts of the model at 3 steps, the first of them 1, were rejected" in said(tmp_path / "run")


@pytest.mark.parametrize("nonfinite", some_slow(["reject", "stop"], "stop"))
@pytest.mark.parametrize("what", NAMES)
def test_learn_stops_or_rejects_and_names_it(what, nonfinite, tmp_path, patched):
    agent = "numbed" if what == "policy" else "random"

    def job() -> None:
        learned(tmp_path / "run", agent, nonfinite, **{what: STEP})

    first = f"{NAMES[what]} of episode {3 if what == 'policy' else 0}, seed 0"
    status = tmp_path / "run" / "status.json"
    if nonfinite == "stop":
        with pytest.raises(FloatingPointError, match="met a non-finite value"):
            job()
        ended = json.loads(status.read_text())
        assert ended["status"] == "failed" and first in ended["reason"]
    else:
        job()
        assert json.loads(status.read_text())["status"] == "finished"
        rows = [r for r in metrics.read_metrics(tmp_path / "run" / "metrics.jsonl")[0] if r["kind"] == "iteration"]
        assert np.sum([r["rejected"] for r in rows]) > 0
        page = rebuild(tmp_path / "run").read_text()
        assert f"{agent}: not finite: " in page and first in page
    assert first in said(tmp_path / "run")


@pytest.mark.slow
def test_learn_refuses_a_model_that_comes_out_not_finite_and_names_the_leaf(tmp_path, patched):
    """The fit after 40 of 80 real steps is spoilt: the agent stays as it was, and goes on at the next."""
    [row] = [row for row in AGENTS if row.name == "bptt"]
    patched.setitem(REGISTRY, "fitted", AgentRow(lambda task: row.make(task), "", 80))
    honest = EnsembleTrainer.fit

    def fit(self, members, buffer, key):
        members, best, told = honest(self, members, buffer, key)
        members = jax.tree.map(lambda x: jnp.where(buffer.size == 40, jnp.nan, x), members)
        return members, best, told

    patched.setattr(EnsembleTrainer, "fit", fit)
    learned(tmp_path / "run", "fitted", real_steps=80)
    rows = [r for r in metrics.read_metrics(tmp_path / "run" / "metrics.jsonl")[0] if r["kind"] == "iteration"]
    assert [r["refused"] for r in rows[1:]] == [[0, 0], [1, 1], [0, 0]]
    [named] = [r["nonfinite_in"] for r in rows if "nonfinite_in" in r]
    assert len(named) == 2
    assert named[0].startswith("carry.members.") and named[0].endswith(" in update 2, seed 0")


def test_the_command_says_so_in_one_line_and_fails(patched, capsys, folder):
    patched.setitem(TASKS, "clocked", TASKS["clocked"]._replace(make=lambda horizon=6: clocked(reward=STEP)))
    words = "learn clocked --agent random --seeds 2 --real-steps 36 --evaluations 0 --nonfinite"
    assert cli.main([*words.split(), "stop", "--out", "run"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith(f"diffmbrl: agent 'random' met a non-finite value: r[{STEP}] of episode 0, seed 0")
    assert cli.main([*words.split(), "ignore"]) == 2
    assert "ignore" in capsys.readouterr().err
