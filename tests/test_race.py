"""`diffmbrl learn` and `diffmbrl race`: one tiny run of an agent with a model and one without, and what is made of it."""

import io
import json
import math
import shutil
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffmbrl import tasks
from diffmbrl.agents import RandomAgent
from diffmbrl.agents.registry import AGENTS, AgentRow, make_agent, options
from diffmbrl.cli import main as cli
from diffmbrl.jobs import diagnose as diagnosing
from diffmbrl.jobs import learn as racing
from diffmbrl.jobs.configs import DiagnoseConfig, LearnConfig, RunOptions
from diffmbrl.jobs.learn import race_agents, resolve, restore_agent
from diffmbrl.policies import Linear
from diffmbrl.report import learning_curves, rebuild, summary_text
from diffmbrl.report.learn_report import sentences
from diffmbrl.runs import Progress, read_metrics
from diffmbrl.runs.arrays import fill, read_arrays, save_arrays
from tests.problems import of

SETTING = LearnConfig(
    task="lqr",
    agents=("random", "knows"),
    options={"warmup": 20, "every": "20"},
    real_steps=60,
    budget=100.0,
    seeds=2,
    evaluations=3,
    horizon=10,
    parameters={"mass": 1.5},
    noise=0.0,
    sensor_noise=0.0,
    key=0,
    x64=False,
)


class Knows(RandomAgent):
    """Its feedback is what it was and a little more at each update; its model is the truth, plus a bias."""

    bias: float = 0.0

    def init(self, task, key):
        return {"pi": Linear.zeros(task), "key": key, "bias": jnp.asarray(self.bias)}

    def best(self, carry, task):
        return carry["pi"]

    def update(self, carry, task, buffer, fresh, key):
        pi = carry["pi"]
        said = {"model_error": jnp.float32(0.5), "disagreement": jnp.float32(0.25), "gain": -pi.K[0, 0]}
        return carry | {"pi": Linear(pi.K - 0.5, pi.b)}, said

    def model(self, carry, task):
        return Biased(tasks.lqr(mass=1.5).dynamics, carry["bias"])


class Biased(eqx.Module):
    inner: eqx.Module
    bias: jax.Array

    def __call__(self, s, a, *, key=None):
        return self.inner(s, a) + self.bias


def _knows(task, *, warmup=20, every=20, bias=0.0):
    return Knows(warmup=warmup, every=every, bias=bias)


@pytest.fixture(scope="module", autouse=True)
def agents():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(AGENTS, "knows", AgentRow(_knows, "the truth, and a bias", 100))
        yield


@pytest.fixture(scope="module")
def run(agents, tmp_path_factory):
    printed = io.StringIO()
    folder = race_agents(SETTING, RunOptions(out=tmp_path_factory.mktemp("runs") / "tiny", stream=printed))
    return folder, printed.getvalue()


@pytest.fixture(scope="module")
def records(run):
    found, note = read_metrics(run[0] / "metrics.jsonl")
    assert note is None
    return found


def test_the_folder(run):
    folder, _ = run
    names = {path.name for path in folder.iterdir()}
    files = {"config.json", "provenance.json", "metrics.jsonl", "status.json", "report.html"}
    assert names == files | {"figures", "agents", "buffers", "checkpoints"}
    config = json.loads((folder / "config.json").read_text())
    assert config["job"] == "learn" and config["agents"] == ["random", "knows"] and config["real_steps"] == 60
    assert config["evaluations"] == {"random": 3, "knows": 3}
    assert json.loads((folder / "status.json").read_text())["status"] == "finished"
    wanted = {"return-steps", "return-seconds", "model-error", "disagreement", "foresight-error", "foresight-knows"}
    assert wanted <= {path.stem for path in (folder / "figures").iterdir()}
    assert all((folder / place / f"{name}.npz").exists() for place in ("agents", "buffers") for name in SETTING.agents)


def test_records_of_each_iteration(records):
    for name in SETTING.agents:
        rows = of(records, "iteration", method=name)
        assert [row["real_steps"] for row in rows] == [20, 40, 60]
        assert rows[0]["seconds"] == 0 and 0 < rows[1]["seconds"] < rows[2]["seconds"] <= rows[2]["wall"]
        assert all(np.shape(row["episodes"]) == (2, 2) for row in rows)  # of two seeds, two episodes of ten steps
        assert all(np.shape(row["evaluation"]) == (2, 3) and row["rejected"] == [0, 0] for row in rows)
        assert of(records, "stop", method=name)[0]["reason"] == "60 real steps"
    # The same warm-up, as both begin with random actions; and other seeds are other warm-ups.
    first = [of(records, "iteration", method=name)[0]["episodes"] for name in SETTING.agents]
    assert first[0] == first[1] and first[0][0] != first[0][1]
    # What changes from evaluation to evaluation is the policy, not the starts.
    random = [row["evaluation"] for row in of(records, "iteration", method="random")]
    knows = [row["evaluation"] for row in of(records, "iteration", method="knows")]
    assert random[0] == random[1] == random[2] and knows[0] != knows[1]


def test_a_true_model_foresees_the_truth(records):
    [found] = of(records, "foresight")
    assert found["method"] == "knows" and np.shape(found["error"]) == (2, 10)
    assert np.max(found["error"]) < 1e-5 and np.max(found["spread"]) < 1e-5
    for name in ("low", "middle", "high"):
        np.testing.assert_allclose(found[name], found["s"], atol=1e-5)


def test_progress_is_shown_live(run):
    lines = run[1].splitlines()
    assert lines[0] == "[1/2] random"
    [last] = [line for line in lines if line.startswith("[2/2] knows 60/60")]
    assert all(word in last for word in ("return -", "model error 0.500", "disagreement 0.250", "episode -", " s"))


def test_the_table_and_what_it_says(run):
    text = summary_text(run[0])
    rows = learning_curves.summarise(learning_curves.collect_curves(read_metrics(run[0] / "metrics.jsonl")[0]))
    assert {row.agent.label for row in rows} == {"random", "knows"} and "95% bootstrap interval" in text
    best = max(rows, key=lambda row: row.final.value)
    assert f"{best.agent.label} has the highest return" in text
    assert "Error of the rollouts of knows's model" in text
    assert max(len(line) for line in text.split("\n\n")[0].splitlines()) < 112


def test_the_report_is_rebuilt_from_its_data_alone(run, tmp_path):
    folder, _ = run
    for name in ("config.json", "provenance.json", "metrics.jsonl", "status.json"):
        shutil.copy(folder / name, tmp_path / name)
    page = rebuild(tmp_path)
    assert page.read_bytes() == (folder / "report.html").read_bytes()
    assert (tmp_path / "figures" / "return-steps.svg").read_bytes() == (
        folder / "figures" / "return-steps.svg"
    ).read_bytes()
    html = page.read_text()
    assert "http://" not in html and "<script" not in html and "the truth, and a bias" in html


def test_what_was_learned_comes_back(run, records):
    folder, _ = run
    agent, carry, _, keys = restore_agent(folder, "knows")
    assert (agent.warmup, agent.every) == (20, 20) and keys.shape == (2,)
    np.testing.assert_array_equal(carry["pi"].K, np.full((2, 1, 2), -1.0))
    assert jnp.issubdtype(carry["key"].dtype, jax.dtypes.prng_key)  # keys are keys again
    manifest, leaves = read_arrays(folder / "buffers", "knows")
    assert manifest["seeds"] == 2 and leaves[".rows.s"].shape == (2, 60, 2) and leaves[".added"].tolist() == [60, 60]
    for path in (*(folder / "agents").iterdir(), *(folder / "buffers").iterdir()):
        assert b"pickle" not in path.read_bytes()
    assert restore_agent(folder).carry == ()  # without a name the run's first


def test_a_policy_that_was_learned_is_diagnosed(run, monkeypatch):
    folder, _ = run
    blank = {"horizons": (2, 5), "scale": None, "hidden": (), "parameters": {}, "starts": 64, "std": 0.1, "key": 0}
    setting = DiagnoseConfig(task="lqr", policy=f"{folder}:knows:1", **blank)
    _, task, policy, origin = diagnosing.resolve(setting)
    assert origin == "knows, seed 1" and isinstance(policy, Linear) and task.horizon == 5
    np.testing.assert_array_equal(policy.K, np.full((1, 2), -1.0))
    assert diagnosing.resolve(replace(setting, policy=str(folder))).origin == "knows, seed 0"  # the best of the run
    for place, message in (
        (f"{folder}:knows:2", "the run has seeds 0 to 1, got 2"),
        (f"{folder}:knosw", "did you mean 'knows'"),
    ):
        with pytest.raises(ValueError, match=message):
            diagnosing.resolve(replace(setting, policy=place))
    with pytest.raises(ValueError, match="is of task 'lqr', not 'pendulum'"):
        diagnosing.resolve(replace(setting, task="pendulum"))
    monkeypatch.setattr(Knows, "best", lambda self, carry, task: Recalls())
    with pytest.raises(ValueError, match="agent 'knows' plans at every step"):
        diagnosing.resolve(setting)


class Recalls(eqx.Module):
    """A policy with a memory."""

    is_stateful = True


def test_what_is_not_as_it_was_written_is_refused(run, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(run[0], folder)
    with pytest.raises(ValueError, match="unknown agent of the run 'knosw'; did you mean 'knows'"):
        restore_agent(folder, "knosw")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"seeds": 3}))
    with pytest.raises(ValueError, match=r"does not fit: it has \[2\] .* needs \[3\]"):
        restore_agent(folder, "knows")
    (folder / "config.json").write_text(json.dumps(config | {"x64": True}))
    with pytest.raises(ValueError, match="are in float64: set jax_enable_x64"):
        restore_agent(folder)
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / "agents" / "knows.npz"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="SHA-256 is another"):
        restore_agent(folder, "knows")
    shutil.rmtree(folder / "agents")
    with pytest.raises(ValueError, match="has no agents"):
        restore_agent(folder)


def test_any_tree_of_arrays_is_saved(tmp_path):
    tree = {"key": jax.random.key(3), "n": (jnp.int32(2), jnp.zeros((0, 3))), "yes": jnp.asarray(True)}
    save_arrays(tmp_path / "arrays", "tree", tree, of="a test")
    manifest, leaves = read_arrays(tmp_path / "arrays", "tree")
    back = fill(jax.eval_shape(lambda: tree), leaves, "the tree")
    assert manifest["of"] == "a test" and jax.tree.structure(back) == jax.tree.structure(tree)
    assert jax.random.uniform(back["key"]) == jax.random.uniform(tree["key"]) and back["n"][0] == 2 and back["yes"]


def test_interrupted_there_is_a_run_with_what_was_learned(tmp_path, monkeypatch, capsys):
    """By Ctrl-C after the second of three iterations; the report shows what there is, and another is drawn from it."""
    update = Progress.update

    def interrupt(self, step, text=""):
        update(self, step, text)
        if step == 40:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "update", interrupt)
    monkeypatch.chdir(tmp_path)
    words = "learn lqr --agent knows --real-steps 60 --horizon 10 --param mass=1.5 --seeds 2 --evaluations 0 --out run"
    assert cli.main(words.split()) == 130
    assert capsys.readouterr().err == "diffmbrl: interrupted; to continue: diffmbrl resume run\n"
    run = tmp_path / "run"
    assert json.loads((run / "status.json").read_text())["status"] == "interrupted"
    found, _ = read_metrics(run / "metrics.jsonl")
    assert of(found, "stop")[0]["reason"] == "interrupted after 40 of 60 real steps"
    assert restore_agent(run).carry["pi"].K[0, 0, 0] == -0.5
    page = (run / "report.html").read_bytes()
    assert b"knows ended early: interrupted after 40 of 60 real steps." in page and b"of the latest episodes" in page
    assert cli.main(["report", str(run)]) == 0 and (run / "report.html").read_bytes() == page


def test_a_budget_ends_an_agent(tmp_path):
    setting = replace(SETTING, agents=("random",), budget=1e-9, evaluations=0)
    folder = race_agents(setting, RunOptions(out=tmp_path / "run", stream=io.StringIO()))
    found, _ = read_metrics(folder / "metrics.jsonl")
    assert [row["real_steps"] for row in of(found, "iteration")] == [20, 40]
    assert of(found, "stop")[0]["reason"] == "budget of 1e-09 s after 40 of 60 real steps"
    assert "random ended early" in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"task": "lqrr"}, "unknown task 'lqrr'; did you mean 'lqr'?"),
        ({"agents": ("randmo",)}, "unknown agent 'randmo'; did you mean 'random'?"),
        ({"agents": ("random", "random")}, "each agent can be named once, got random random"),
        ({"options": {"evrey": "5"}}, "unknown option of agent 'random' 'evrey'; did you mean 'every'?"),
        ({"options": {"every": "often"}}, "option every of agent 'random' must be a whole number, got 'often'"),
        ({"options": {"every": "0"}}, "agent 'random': every must be a whole number of at least 1, got 0"),
        ({"options": {"every": "200"}}, "agent 'random': warmup (100 steps) must be at least every (200 steps)"),
        ({"real_steps": 10}, "agent 'random': real_steps (10) must be at least the warm-up's 20 steps"),
        ({"real_steps": 0}, "real-steps must be at least 1, got 0"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"evaluations": -1}, "evaluations must be at least 0 starts, got -1"),
        ({"budget": 0.0}, "budget must be a positive number of seconds, got 0"),
        ({"budget": math.nan}, "budget must be a positive number of seconds, got nan"),
        ({"key": -1}, "key must be a whole number from 0 to 4294967295, got -1"),
        ({"noise": -1.0}, "std of the noise must be finite and not negative, got -1.0"),
        ({"sensor_noise": math.nan}, "std of the noise must be finite and not negative, got nan"),
        ({"horizon": 0}, "horizon must be a whole number of at least 1, got 0"),
        ({"parameters": {"mas": 1.0}}, "unknown parameter of task 'lqr' 'mas'; did you mean 'mass'?"),
    ],
)
def test_bad_settings_before_anything_is_written(change, message, tmp_path):
    with pytest.raises(ValueError) as refused:
        race_agents(replace(SETTING, **change), RunOptions(out=tmp_path / "run"))
    assert message in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_noise_of_the_process_and_of_the_sensor():
    system = resolve(replace(SETTING, noise=0.1, sensor_noise=0.2)).system
    s, a, key = jnp.ones(2), jnp.zeros(1), jax.random.key(0)
    assert not np.array_equal(system.sensor(s, key), s)
    assert not np.array_equal(system.plant.dynamics(s, a, key=key), system.plant.dynamics(s, a))
    assert resolve(SETTING).system.sensor(s, key) is s


def test_options_have_the_kind_of_their_default():
    assert options("random") == {"warmup": 100, "every": 100}
    assert make_agent("knows", tasks.lqr(), {"bias": "0.5", "every": "7"}).bias == 0.5
    # One folder's worth of steps by default: an agent's own, or those of a race.
    alone, several = (
        resolve(replace(SETTING, agents=names, real_steps=None)) for names in (("knows",), SETTING.agents)
    )
    assert alone.real_steps == 100 and several.real_steps == racing.REAL_STEPS


def lines(**agents):
    """Records of agents, each a list of evaluations at 10, 20, ... real steps, one number a seed."""
    for name, values in agents.items():
        for i, J in enumerate(values):
            evaluation = {} if J is None else {"evaluation": [[x] for x in J]}
            row = {
                "kind": "iteration",
                "method": name,
                "real_steps": 10 * (i + 1),
                "seconds": float(i),
                "wall": float(i),
            }
            yield row | {"episodes": [[float(i)], [] if i < 2 else [9.0]], "rejected": [0, i], "said": {}} | evaluation


def test_who_got_there_first():
    """To 90% of the way from 0 to 100: one at 20 real steps, one at 40, one never."""
    quick, good = [[0, 0], [92, 92], [80, 80], [96, 96]], [[0, 0], None, [50, 50], [100, 100]]
    found = learning_curves.collect_curves(list(lines(quick=quick, good=good, bad=[[0, 0], None, None, [9, 9]])))
    rows = learning_curves.summarise(found)
    assert learning_curves.target(found) == 90 and learning_curves.leader(found).method == "good"
    assert [row.there for row in rows] == [(20.0, 1.0), (40.0, 3.0), None]
    assert [row.best for row in rows] == [96, 100, 9] and [row.rejected for row in rows] == [6, 6, 6]
    said = " ".join(sentences(rows))
    assert (
        "first by quick after 20 real steps" in said
        and "(real steps of others: good 40)" in said
        and "not by bad" in said
    )


def test_without_evaluations_the_latest_episodes_count():
    """From where every seed has had one; a seed without a new one keeps its last."""
    [agent] = learning_curves.collect_curves(list(lines(plain=[None] * 4)))
    x, y = agent.curve
    assert x.tolist() == [30, 40] and y.tolist() == [[2, 9], [3, 9]]


def test_seeds_that_broke_count_as_the_worst(tmp_path):
    [agent] = learning_curves.collect_curves(list(lines(broken=[[1, 2], [3, math.nan]])))
    [row] = learning_curves.summarise([agent])
    assert row.final.value == -math.inf and math.isnan(learning_curves.target([agent]))
    assert (
        learning_curves.text([row])
        and learning_curves.summarise(learning_curves.collect_curves([{"kind": "agent", "method": "empty"}]))[0].there
        is None
    )


@pytest.mark.slow
def test_race_and_learn_from_the_command_line(folder, capsys):
    words = "race lqr --agents random --real-steps 200 --horizon 10 --seeds 1 --x64 --param mass=2"
    assert cli.main(words.split()) == 0
    out, err = capsys.readouterr()
    [run] = (folder / "runs").iterdir()
    assert run.name.startswith("lqr-learn-") and err == "" and out.splitlines()[-1] == f"report: {run / 'report.html'}"
    config = json.loads((run / "config.json").read_text())
    assert (config["x64"], config["parameters"], config["real_steps"]) == (True, {"mass": 2.0}, 200)
    assert read_arrays(run / "buffers", "random")[1][".rows.s"].dtype == np.float64
    assert "One seed" in out
    assert cli.main(["agents"]) == 0
    out = capsys.readouterr().out
    assert "random: random actions within the limits" in out and "    warmup=100 every=100\n" in out


@pytest.mark.parametrize(
    "words, message",
    [
        ("race lqr --lr 0.1", "Unrecognized or misplaced options: --lr"),
        ("race lqr --agents adam", "unknown agent 'adam'; did you mean '"),
        ("compare lqr --real-steps 100", "Unrecognized or misplaced options: --real-steps"),
        ("learn lqr", "--agent"),
        ("learn lqr --agent random --option every", "--option takes name=value, such as warmup=500; got 'every'"),
        (
            "learn lqr --agent random --option every=3 every=4",
            "--option every is given more than once: every=3 every=4",
        ),
        ("learn lqr --agent random --sedes 3", "Unrecognized options: --sedes, 3; did you mean '--seeds'?"),
        ("learn lqrr --agent random", "unknown task 'lqrr'; did you mean 'lqr'?"),
        ("learn lqr --agent random --real-steps 1.5", "1.5"),
    ],
)
def test_bad_words(words, message, folder, capsys):
    assert cli.main(words.split()) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and out == "" and list(folder.iterdir()) == []
