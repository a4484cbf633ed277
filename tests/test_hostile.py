"""What comes from elsewhere, a folder or a name that somebody else made, is refused, escaped or handled, and says so."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from diffmbrl.cli import main as cli
from diffmbrl.jobs import learn as race
from diffmbrl.jobs.configs import LearnConfig
from diffmbrl.report import rebuild
from diffmbrl.runs import config as configs
from diffmbrl.runs import folder as folders
from diffmbrl.runs import metrics

ATTACK = "<script>alert('&')</script>"
PLAN = "plan lqr --planner ilqr --horizon 4 --iterations 2 --out run"


def refused(words: list[str], capsys) -> str:
    """The one line on stderr, and exit code 2."""
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("diffmbrl: ") and err.count("\n") == 1 and "Traceback" not in err, err
    return err


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    assert cli.main([*PLAN.replace("--out run", "").split(), "--out", str(path)]) == 0
    return path


@pytest.fixture
def run(finished, folder) -> Path:
    """One that was interrupted at its end."""
    shutil.copytree(finished, folder / "run")
    folders.set_status(folder / "run", "interrupted")
    return folder / "run"


def changed(run: Path, **change) -> None:
    folders.write_json(run / "config.json", json.loads((run / "config.json").read_text()) | change)


def test_it_can_be_resumed_as_it_is(run, capsys):
    assert cli.main(["resume", "run"]) == 0
    assert "resumed from checkpoint 1" in capsys.readouterr().out


CONFIGS = {
    "unknown key": ({"tempo": 3}, "config.json has 'tempo', which the installed diffmbrl does not know"),
    "text for a number": ({"horizon": "9"}, 'config.json has horizon = "9"; expected int | None'),
    "a number for text": ({"planner": 3}, "config.json has planner = 3; expected str"),
    "true for a number": ({"starts": True}, "config.json has starts = true; expected int"),
    "true for a parameter": ({"parameters": {"mass": True}}, "config.json has parameters"),
    "deep nonsense": ({"parameters": {"mass": {}}}, "config.json has parameters"),
    "unknown task": ({"task": "../../lqr"}, "unknown task '../../lqr'"),
    "unknown planner": ({"planner": "../ilqr"}, "unknown planner '../ilqr'"),
    "nan": ({"parameters": {"mass": "nan"}}, "mass of task 'lqr' must be a finite positive number, got nan"),
    "a job that has no checkpoints": ({"job": "diagnose"}, "a run of 'diagnose' cannot be resumed, only one of compare"),
    "a job out of its folder": ({"job": "../compare"}, "a run of '../compare' cannot be resumed"),
    "another size": ({"horizon": 5}, "does not fit this run: for"),
    "x64 in words": ({"x64": "yes"}, "x64 = 'yes'"),
}  # fmt: skip


@pytest.mark.parametrize("change, wanted", CONFIGS.values(), ids=CONFIGS)
def test_a_config_that_does_not_fit(change, wanted, run, capsys):
    changed(run, **change)
    before = (run / "metrics.jsonl").read_bytes()
    assert wanted in refused(["resume", "run"], capsys)
    assert wanted.startswith("does not fit") or (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000, "\xff"])
def test_a_config_that_is_none(text, run, capsys):
    (run / "config.json").write_bytes(text.encode("latin-1"))
    assert "'run' is not a run: its config.json holds no object" in (err := refused(["resume", "run"], capsys)) or (
        "'run' is not a run: it has no config.json that can be read" in err
    )


def test_a_missing_field_and_no_folder(run, capsys):
    whole = json.loads((run / "config.json").read_text())
    del whole["noise"]
    folders.write_json(run / "config.json", whole)
    assert "config.json has no 'noise': it does not fit the installed diffmbrl" in refused(["resume", "run"], capsys)
    assert "'nowhere' is not a run" in refused(["resume", "nowhere"], capsys)
    assert "checkpoint-every must be a number of seconds of at least 0, got -1" in refused(
        ["resume", "run", "--checkpoint-every", "-1"], capsys
    )


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "checkpoints", "checkpoints/1"])
def test_links_are_refused(name, run, capsys):
    (run / name).rename(run.parent / "elsewhere")
    (run / name).symlink_to(run.parent / "elsewhere")
    assert "is a symbolic link" in refused(["resume", "run"], capsys)


def test_a_broken_last_line_is_told_by_the_report_and_cut_by_resume(run, capsys):
    whole = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(whole + b'{"kind": "resu\xff')
    assert cli.main(["report", "run"]) == 0
    assert "is cut short and was left out" in (run / "report.html").read_text()
    assert cli.main(["resume", "run"]) == 0
    records, note = metrics.read_metrics(run / "metrics.jsonl")
    assert note is None and len(records) == len(whole.splitlines())


def test_all_checkpoints_damaged(run, capsys):
    (run / "checkpoints" / "1" / "host.json").unlink()
    assert "is valid: checkpoint 1: host.json is missing" in refused(["resume", "run"], capsys)


def test_names_do_not_lead_out_of_the_folder(folder, capsys):
    path = folders.create(None, "../../etc/passwd", "../x", {})
    assert path.resolve().parent == folder / "runs"
    for words in ("compare ../lqr", "compare lqr --methods ../adam", "learn lqr --agent ../mbpo"):
        assert "unknown" in refused(words.split(), capsys)
    (folder / "agents").mkdir()
    (folder / "agents" / "a.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps({"x64": False, "agents": ["../../x"], "job": "learn"}))
    with pytest.raises(ValueError, match=r"unknown agent of the run '\.\./secret'"):
        race.restore_agent(folder, "../secret")


def test_out_is_where_the_caller_says_and_nowhere_else(folder, monkeypatch, capsys):
    (folder / "inner").mkdir()
    monkeypatch.chdir(folder / "inner")
    assert cli.main(PLAN.replace("--out run", "--out ../run").split()) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["inner", "run"] and not any((folder / "inner").iterdir())
    (folder / "link").symlink_to(folder / "inner" / "gone")
    assert "is not a folder" in refused(PLAN.replace("run", "../link").split(), capsys)


def test_what_is_rendered_is_escaped_or_refused(run, capsys):
    changed(run, planner=ATTACK)
    assert cli.main(["render", "run"]) == 0
    capsys.readouterr()
    text = (run / "animation.html").read_text()
    assert ATTACK not in text and "&lt;script&gt;alert(" in text
    changed(run, task=ATTACK)
    assert f"unknown task '{ATTACK}'" in refused(["render", "run"], capsys)
    changed(run, task="lqr", parameters=3)
    assert "does not hold what a run of 'plan' writes (" in refused(["render", "run"], capsys)
    changed(run, job=ATTACK)
    assert "leave something that moves" in refused(["render", "run"], capsys)


@pytest.mark.parametrize("job", ["compare", "learn", "plan", "diagnose", ATTACK])
def test_html_is_escaped_in_the_report_of_every_job(job, tmp_path):
    config = {"task": ATTACK, "job": job, "starts": 2, "planner": ATTACK, ATTACK: [ATTACK, {ATTACK: ATTACK}]}
    entry = {"time": ATTACK, "remarks": [ATTACK], "versions": {ATTACK: ATTACK}}
    folders.write_json(tmp_path / "config.json", config)
    folders.write_json(tmp_path / "provenance.json", {"command": ATTACK, "resumed": [entry], "git": {"commit": ATTACK}})
    with metrics.Writer(tmp_path / "metrics.jsonl") as writer:
        writer.write({"kind": "note", "text": ATTACK})
        writer.write({"kind": "stop", "method": ATTACK, "rate": None, "reason": ATTACK})
    text = rebuild(tmp_path).read_text()
    assert "<script" not in text and "resumed once" in text
    assert "&lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;" in text


def test_a_report_of_what_no_run_writes(tmp_path):
    folders.write_json(tmp_path / "config.json", {"task": "lqr", "job": "plan"})
    (tmp_path / "metrics.jsonl").write_text('{"kind": "result"}\n{"no": "kind"}\n')
    with pytest.raises(ValueError, match="does not hold what a run of 'plan' writes"):
        rebuild(tmp_path)


def test_types_of_a_setting():
    setting = LearnConfig("lqr", ("a",), {"x": "1"}, None, float("inf"), 2, {"a": 3}, 5, {"m": 1.0}, 0.0, 0.1, 7, True)
    written = json.loads(json.dumps(metrics.to_json({"task": "lqr", "job": "learn", **asdict(setting)})))
    assert configs.config_from_json(LearnConfig, written) == setting
