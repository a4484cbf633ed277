"""Run folders: what is written is read back, what is bad is refused first, and the report is a function of its data."""

import io
import json
import math
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from diffmbrl.report import arms, report, table, verdict, words
from diffmbrl.runs import folder, metrics, provenance, statistics
from diffmbrl.runs.progress import Progress
from tests.problems import some_slow

STAGES = [[0.8, 20], [0.9, 20], [0.95, 20], [0.98, 20], [1.0, 120]]
CONFIG = {"horizon": 100, "seeds": 5, "starts": 32, "held_out": 256, "x64": False, "methods": ["adam", "gauss-newton"]}
FACTS = {
    "time": "2025-03-01T12:00:00+00:00",
    "command": "diffmbrl compare cartpole-balance --seeds 5",
    "git": {"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": False},
    "versions": {"python": "3.11.7", "diffmbrl": "0.1.0", "jax": "0.10.2"},
    "device": {"platform": "cpu", "kind": "cpu", "count": 1},
    "x64": False,
}


def synthetic(*, seeds: int = 5, seed: int = 0) -> list[dict]:
    """Records like those of a comparison on cart-pole: a swept method, a quasi-Newton one, a second-order one, a planner."""
    random = np.random.default_rng(seed)
    records = []
    table_ = [  # method, order, kind, rate, updates, seconds, steps per update (forward, jvp, vjp, sequential), first, last
        *[("adam", 1, "policy", r, 400, 21.0, (3200, 0, 3200, 2), 280.0, c) for r, c in RATES.items()],
        ("lbfgs", 1, "policy", None, 200, 9.0, (6400, 0, 4800, 4), 280.0, 0.84),
        ("gauss-newton", 2, "policy", None, 60, 14.0, (41600, 96000, 99200, 3), 280.0, 0.79),
        ("ilqr", 2, "plan", None, 40, 6.5, (38400, 102400, 3200, 14), 60.0, 0.71),
    ]
    for method, order, kind, rate, updates, seconds, work, first, last in table_:
        plan = kind == "plan"
        stages = None if plan else [[d, math.ceil(u * updates / 200)] for d, u in STAGES]
        key = {"method": method, "rate": rate}
        arm = {"order": order, "policy_kind": kind, "compile_seconds": 3.1 + order, "parameters": 385}
        records.append({"kind": "arm", **key, "label": method, **arm, "continuation": stages})
        lucky = np.exp(0.12 * random.standard_normal(seeds))
        bad = 40.0 if method == "gauss-newton" else 1.15
        for done in np.unique(np.r_[0, np.linspace(0, updates, 22).astype(int)[1:]]):
            part = done / updates
            noise = np.exp(0.1 * (1 - part) * random.standard_normal(seeds)) * lucky
            train = last + (first - last) * np.exp(-9 * part) * noise + last * (lucky - 1)
            test = 1.15 * train + (bad if 0.1 < part < 0.5 else 0) * (random.random(seeds) < 0.2)
            entry = {
                "kind": "eval",
                **key,
                "update": int(done),
                "seconds": seconds * part,
                "train": -train,
                "test": -test,
            }
            names = ("forward", "jvp", "vjp", "sequential")
            entry |= {name: np.full(seeds, w * done) for name, w in zip(names, work, strict=True)}
            entry |= {"success": np.clip(1.02 - test / 300, 0, 1), "gradient_norm": train * 3, "J": -train * 0.7}
            entry |= {
                "damping": np.full(seeds, 1e-3),
                "accepted": np.full(seeds, 0.9),
                "nonfinite": np.zeros(seeds, int),
            }
            records.append(entry | {"lanes": 4 * seeds if rate else seeds})
        t = np.arange(100)
        for when, slope in (("start", 0.09), ("end", 0.03 / order)):
            values = 0.02 * np.exp(slope * (100 - t)) * np.exp(0.05 * random.standard_normal(100))
            records.append({"kind": "gradient_profile", **key, "when": when, "values": values})
            if not plan:
                decay = np.logspace(4 if when == "start" else 2, -7, 60) * (1 + order * (when == "end"))
                records.append({"kind": "spectrum", **key, "when": when, "values": decay})
        records.append({"kind": "stop", **key, "reason": f"{updates} updates"})
    return records


RATES = {0.0003: 31.0, 0.001: 4.2, 0.003: 1.1, 0.01: 0.97, 0.03: 6.0}


def write_run(path: Path, records: list[dict], *, config: dict | None = None) -> Path:
    """A run folder as the main job leaves it, with fixed facts."""
    path.mkdir(parents=True, exist_ok=True)
    folder.write_json(path / "config.json", {"task": "cartpole-balance", "job": "compare", **(config or CONFIG)})
    folder.write_json(path / "provenance.json", FACTS)
    with metrics.Writer(path / "metrics.jsonl") as writer:
        for record in records:
            writer.write(record)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    path = write_run(tmp_path_factory.mktemp("runs") / "run", synthetic())
    report.rebuild(path)
    return path


def test_metrics_come_back_as_they_were(tmp_path):
    record = {
        "kind": "eval",
        "J": np.array([1.5, np.nan, np.inf, -np.inf]),
        "vjp": jnp.arange(3),
        "rate": np.float32(0.5),
    }
    with metrics.Writer(tmp_path / "m.jsonl") as writer:
        writer.write(record | {"best": np.bool_(True), "nested": {"x": math.nan}, "none": None})
        writer.write({"kind": "note", "text": "nan"})
    lines = (tmp_path / "m.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["J"] == [1.5, "nan", "inf", "-inf"]
    (entry, note), damage = metrics.read_metrics(tmp_path / "m.jsonl")
    np.testing.assert_array_equal(entry["J"], [1.5, np.nan, np.inf, -np.inf])
    assert entry["vjp"] == [0, 1, 2]
    assert entry["rate"] == 0.5
    assert entry["best"] is True
    assert entry["none"] is None
    assert math.isnan(entry["nested"]["x"])
    assert note["text"] == "nan", "words stay words"
    assert damage is None


def test_each_line_is_on_disk_at_once(tmp_path):
    writer = metrics.Writer(tmp_path / "m.jsonl")
    writer.write({"kind": "note", "text": "a"})
    assert len(metrics.read_metrics(tmp_path / "m.jsonl")[0]) == 1
    writer.close()
    with pytest.raises(ValueError, match="needs a kind"):
        writer.write({"J": 1.0})


def test_a_truncated_last_line_is_left_out_and_told(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"kind": "note", "text": "a"}\n{"kind": "ev')
    records, note = metrics.read_metrics(path)
    assert len(records) == 1
    assert note == "the last line of m.jsonl (line 2) is cut short and was left out"
    with metrics.Writer(path) as writer:  # appending does not glue two lines together
        writer.write({"kind": "note", "text": "b"})
    records, note = metrics.read_metrics(path)
    assert [record["text"] for record in records] == ["a", "b"]
    assert note == "m.jsonl: unreadable lines left out: 2"


@pytest.mark.parametrize(
    ("values", "mean", "low", "high"),
    [
        ([3.0], 3.0, math.nan, math.nan),
        ([1.0, 2.0], 1.5, 1.0, 2.0),
        ([1.0, 2.0, 6.0], 3.0, 1.0, 6.0),
        ([0.0, 1.0, 3.0, 100.0], 2.0, 0.0, 100.0),
        ([5.0] * 5, 5.0, 5.0, 5.0),
        ([1.0, 2.0, math.nan], -math.inf, -math.inf, 2.0),
    ],
    ids=["one", "two", "three", "four", "equal", "a broken seed is the worst"],
)
def test_estimates_of_few_seeds(values, mean, low, high):
    np.testing.assert_allclose(statistics.estimate(np.array(values)), (mean, low, high))


def test_interquartile_mean_is_the_trimmed_mean():
    stats = pytest.importorskip("scipy.stats")
    x = np.random.default_rng(0).standard_normal((3, 4, 13))
    np.testing.assert_allclose(statistics.interquartile_mean(x), stats.trim_mean(x, 0.25, axis=-1))
    assert statistics.interquartile_mean(np.array([1.0, 2.0, 3.0, 4.0, math.nan])) == 2.0, "[-inf, 1, 2, 3, 4]"


def test_interval_of_five_seeds_is_the_exact_bootstrap():
    x = np.array([0.0, 1.0, 2.0, 4.0, 8.0])
    every = np.stack(np.meshgrid(*[x] * 5), axis=-1).reshape(-1, 5)  # all 3125 resamples
    low, high = np.quantile(statistics.interquartile_mean(every), [0.025, 0.975], method="inverted_cdf")
    np.testing.assert_allclose(statistics.interval(x), (low, high), atol=0.34)  # one step of a third
    assert x.min() < low < high < x.max()
    again = statistics.interval(np.stack([x, 10 * x]))
    np.testing.assert_allclose(again[0], statistics.interval(x)[0] * np.array([1, 10]))


def test_folders_are_named_by_their_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = folder.create(None, "a/../task", "compare", {"seeds": 5, "rate": math.nan})
    assert re.fullmatch(r"runs/a-..-task-compare-[0-9a-f]{8}", str(first))
    assert folder.create(None, "a/../task", "compare", {"seeds": 5, "rate": math.nan}) == Path(f"{first}-2")
    other = folder.create(None, "a/../task", "compare", {"seeds": 6})
    assert other.name not in (first.name, f"{first.name}-2")
    assert {p.name for p in first.iterdir()} == {"config.json", "provenance.json", "status.json", "figures"}
    assert json.loads((first / "config.json").read_text()) == {
        "task": "a/../task",
        "job": "compare",
        "seeds": 5,
        "rate": "nan",
    }
    facts = json.loads((first / "provenance.json").read_text())
    assert facts["seeds"] == 5
    assert facts["versions"]["jax"]
    assert facts["device"]["count"] >= 1
    assert facts["matmul_precision"] == "default" or facts["matmul_precision"]
    assert folder.create(tmp_path / "deep" / "out", "t", "j", {}) == tmp_path / "deep" / "out"


def test_bad_out_folders_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    bad = {
        "full": "is not empty",
        "file": "is not a folder",
        "file/below/out": "leads through",
        "dangling": "is not a folder",
        "x" * 300: "cannot write to",
        "/proc/out": "cannot write to",
    }
    for name, why in bad.items():
        with pytest.raises(ValueError, match=why) as error:
            folder.create(Path(name), "task", "compare", {})
        assert name in str(error.value)
        assert "\n" not in str(error.value)
    folder.check_out(None)
    folder.check_out(Path("empty"))
    folder.check_out(Path("new/deep"))
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "runs").write_text("in the way")
    with pytest.raises(ValueError, match="'runs' is not a folder"):
        folder.check_out(None)


def test_status_tells_how_the_run_ended(tmp_path):
    def status(path):
        return json.loads((path / "status.json").read_text())

    path = folder.create(tmp_path / "a", "t", "j", {})
    assert status(path)["status"] == "running"
    assert status(path)["ended"] is None
    with folder.running(path) as facts:
        facts["checkpoints"] = {"written": 3}
    assert status(path)["status"] == "finished" and status(path)["checkpoints"] == {"written": 3}
    assert status(path)["started"]
    with pytest.raises(RuntimeError), folder.running(path):
        raise RuntimeError("boom")
    assert (status(path)["status"], status(path)["reason"]) == ("failed", "RuntimeError: boom")
    with pytest.raises(KeyboardInterrupt), folder.running(path):
        raise KeyboardInterrupt
    assert status(path)["status"] == "interrupted"
    with pytest.raises(ValueError, match="status must be one of"):
        folder.set_status(path, "done")
    assert not [p for p in path.iterdir() if p.name.startswith(".")], "no temporary file stays"


def test_provenance_of_a_checkout_and_of_an_installed_copy(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert provenance.git(package) is None
    git("init")
    assert provenance.git(package) is None, "inside a repository, but not of it"
    git("add", ".")
    git("commit", "-m", "first")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "x").write_text("")
    facts = provenance.git(package)
    assert facts is not None
    assert re.fullmatch("[0-9a-f]{40}", facts["commit"])
    assert facts["dirty"] is False
    (package / "__init__.py").write_text("x = 1")
    facts = provenance.git(package)
    assert facts is not None
    assert facts["dirty"] is True


def test_the_command_line_can_be_typed_again():
    assert provenance.command(["/a/b/diffmbrl", "compare", "my task"]) == "diffmbrl compare 'my task'"
    assert provenance.command(["/a/diffmbrl/__main__.py", "tasks"]) == "python -m diffmbrl tasks"
    assert provenance.command(["script.py"]) == "python script.py"


def test_plain_progress_is_a_line_a_second():
    now = [0.0]
    out = io.StringIO()
    with Progress(2, stream=out, clock=lambda: now[0]) as progress:
        progress.arm("adam", 100)
        for step in range(1, 101):
            now[0] += 0.03
            progress.update(step, f"J {step}")
        progress.note("a note")
    lines = out.getvalue().splitlines()
    assert lines[0] == "[1/2] adam"
    assert lines[-2:] == ["[1/2] adam 100/100  J 100", "a note"]
    assert 4 <= len(lines) <= 6


def test_progress_on_a_terminal_shows_text_as_it_is():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    with Progress(1, stream=out) as progress:
        progress.arm("adam [bold]", 2)
        progress.update(2, "[1, 2]")
    assert "adam [bold]" in out.getvalue()
    assert "[1, 2]" in out.getvalue()


def test_the_best_rate_and_the_first_order_reference_are_found():
    summary = table.summarise(arms.collect_arms(synthetic()))
    assert [row.arm.method for row in summary.rows] == ["adam", "lbfgs", "gauss-newton", "ilqr"]
    assert len(summary.arms) == 8
    assert summary.rows[0].arm.rate == 0.01
    assert summary.reference is not None
    assert summary.reference.method == "lbfgs"
    adam, lbfgs, newton, _ = summary.rows
    assert adam.reach is None
    assert lbfgs.reach is not None
    assert newton.reach is not None
    assert newton.reach.update <= newton.iterations
    assert newton.reach.dynamics <= newton.forward + newton.jvp + newton.vjp
    assert newton.visited.value == newton.test.value


def test_best_visited_is_the_held_out_return_where_training_was_best():
    evaluations = [
        {"kind": "eval", "method": "m", "rate": None, "update": u, "seconds": u, "train": train, "test": test}
        for u, train, test in [(0, [-9, -9], [-9, -9]), (1, [-1, -5], [-2, -6]), (2, [math.nan, -4], [-100, -7])]
    ]
    (row,) = table.summarise(arms.collect_arms(evaluations)).rows
    assert row.visited.value == (-2 - 7) / 2
    assert row.train.value == -math.inf
    assert row.reach is None
    assert math.isnan(row.success)


def test_the_verdict_says_what_the_numbers_say():
    summary = table.summarise(arms.collect_arms(synthetic()))
    said = verdict.sentences(summary)
    assert said[0].startswith("gauss-newton has the best held-out return: -0.9")
    assert "lbfgs overlaps it, so these seeds do not separate them" in said[0]
    assert any("adam did not reach it" in line for line in said)
    assert any("gauss-newton needed the fewest sequential rollouts" in line for line in said)
    assert any("plans each start separately" in line for line in said)
    worse = [r | {"test": 30 * r["test"]} if r["kind"] == "eval" and r["method"] == "lbfgs" else r for r in synthetic()]
    said = verdict.sentences(table.summarise(arms.collect_arms(worse)))
    assert any(line.startswith("lbfgs overfits its training starts") for line in said)


def test_the_text_table_fits_a_log():
    text = table.text(table.summarise(arms.collect_arms(synthetic())))
    assert max(map(len, text.splitlines())) <= 120
    assert "adam, rate 0.01" in text
    assert "ilqr*" in text
    assert text.isascii()
    assert table.text(table.summarise([])) == "No arm was recorded."


def test_numbers_read_well():
    assert [words.format_number(x) for x in (0.0, -0.0123, 1234.5, 5e-9, math.inf)] == [
        "0.00",
        "-0.0123",
        "1,234",
        "5e-09",
        "inf",
    ]
    assert [words.format_count(x) for x in (9999, 99999, 999999, math.nan)] == ["9,999", "100k", "1000k", "-"]


class Resources(HTMLParser):
    """Collects what a page would load and run, and checks that its tags are balanced."""

    VOID = frozenset({"meta", "br"})

    def __init__(self):
        super().__init__()
        self.tags, self.open, self.links, self.ids = set(), [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [value for key, value in attrs if key in ("src", "href", "xlink:href", "data", "action")]
        self.ids += [value for key, value in attrs if key == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_stands_alone(run):
    text = (run / "report.html").read_text()
    page = Resources()
    page.feed(text)
    assert page.open == []
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert len(page.ids) == len(set(page.ids)), "ids of different figures must not collide"
    assert set(re.findall(r"url\(([^)]*)\)", text)) <= {f"#{name}" for name in page.ids}
    assert "diffmbrl compare cartpole-balance --seeds 5" in text
    assert "256 held-out" in text
    names = {p.stem for p in (run / "figures").iterdir()}
    assert {"return-iterations", "return-evaluations", "return-seconds", "return-sequential", "rates"} <= names
    assert {"gradient-start", "gradient-end", "spectrum-start", "spectrum-end"} <= names
    assert {p.suffix for p in (run / "figures").iterdir()} == {".png", ".svg"}


def test_rebuilding_gives_the_same_bytes(run):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    report.rebuild(run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_text_is_escaped(tmp_path):
    attack = "<script>alert('&')</script>"
    records = [
        r | ({"label": attack} if r["kind"] == "arm" else {}) for r in synthetic(seeds=1) if r["method"] == "lbfgs"
    ]
    records += [{"kind": "note", "text": attack}, {"kind": "stop", "method": "lbfgs", "rate": None, "reason": attack}]
    path = write_run(
        tmp_path / "run", records, config={"task": attack, "job": attack, attack: [attack, {attack: attack}]}
    )
    text = report.rebuild(path).read_text()
    assert "<script" not in text
    assert "&lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;" in text


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "case",
    some_slow(
        ["one seed", "two seeds", "positive", "mixed", "non-finite", "no success", "one evaluation"],
        *("two seeds", "positive", "mixed", "no success", "one evaluation"),
    ),
)
def test_unusual_runs_have_a_report(case, tmp_path):
    seeds = {"one seed": 1, "two seeds": 2}.get(case, 5)
    records = [r for r in synthetic(seeds=seeds) if r["method"] != "lbfgs"]
    changes = {
        "positive": lambda r: {"train": -1 / r["train"], "test": -1 / r["test"]},
        "mixed": lambda r: {"train": 1 + r["train"], "test": 1 + r["test"]},
        "non-finite": lambda r: {"test": np.where(np.arange(5) < 3, np.nan, r["test"]), "nonfinite": [3] * 5},
        "no success": lambda _: {"success": None},
    }
    change = changes.get(case, lambda _: {})
    records = [r | change(r) if r["kind"] == "eval" else r for r in records]
    if case == "one evaluation":
        records = [r for r in records if r["kind"] != "eval" or r["update"] == 0]
    text = report.rebuild(write_run(tmp_path / "run", records)).read_text()
    said = {
        "one seed": "One seed: no interval",
        "two seeds": "With 2 seeds",
        "non-finite": "is not finite on 3 of 5 seeds",
    }
    assert said.get(case, "held-out") in text


def test_missing_pieces_are_told(tmp_path):
    records = [r for r in synthetic() if r["method"] != "gauss-newton" or r["kind"] in ("arm", "stop")]
    records = [
        r | {"reason": "nonfinite: a[3]"} if r["kind"] == "stop" and r["method"] != "adam" else r for r in records
    ]
    path = write_run(tmp_path / "run", records)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "ev')
    (path / "provenance.json").unlink()
    text = report.rebuild(path).read_text()
    assert "gauss-newton has no evaluation (nonfinite: a[3])" in text
    assert "lbfgs stopped: nonfinite: a[3]." in text
    assert "is cut short and was left out" in text
    assert "provenance.json is missing" in text
    empty = write_run(tmp_path / "empty", [])
    assert "nothing to compare" in report.rebuild(empty).read_text()


def test_what_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is not a run: it has no config\.json"):
        report.rebuild(tmp_path)
    path = write_run(tmp_path / "run", [])
    (path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot read"):
        report.rebuild(path)
