"""Run the missing points of a sweep in this process, in several, or on a cluster, and collect the results.

    runs/<name>-sweep/     config.json, provenance.json, status.json; metrics.jsonl, figures/, report.html: the results
        points/<hash>/     a folder for each point, like a run's

A point is finished when its status.json says so, and is then not run again, whatever else of the file changes. An unfinished
point is run again from the start.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from diffmbrl.choices import validate_choice
from diffmbrl.jobs.sweep.groups import Group, groups
from diffmbrl.jobs.sweep.points import SweepFile, SweepPoint, make_point
from diffmbrl.jobs.sweep.work import run
from diffmbrl.report import rebuild
from diffmbrl.runs import check_out, create, provenance, read_config, read_metrics, set_status
from diffmbrl.runs.folder import ROOT, write_atomic, write_json
from diffmbrl.runs.metrics import to_json

Say = Callable[[str], None]


def sweep(
    asked: SweepFile,
    *,
    out: Path | None = None,
    processes: int = 1,
    slurm: dict[str, Any] | None = None,
    say: Say = print,
) -> tuple[Path, bool]:
    """Run the missing points of a sweep, and collect the results of all.

    A group that fails does not stop the others.

    Args:
        asked: The sweep.
        out: Its folder; by default `runs/<name>-sweep`.
        processes: 1 runs the groups in this process, a larger number runs that many processes at a time, 0 runs nothing.
        slurm: Parameters of submitit: submit the groups as jobs of a cluster instead, and return.
        say: Called with each line of progress.

    Returns:
        The folder, and whether every point is finished.

    Raises:
        ValueError: If a point or the folder is wrong, before anything is written; if submitit is missing.
    """
    if processes < 0:
        raise ValueError(f"processes must be at least 0, got {processes}")
    folder = ROOT / f"{asked.name}-sweep" if out is None else Path(out)
    missing = [point for point in asked.points if not finished(folder, point)]
    todo = groups(asked, missing)  # checks every point
    submitit = None if slurm is None else _submitit()
    _open(asked, folder)
    before = len(asked.points) - len(missing)
    say(
        f"{len(asked.points)} points, {before} of them finished before; {len(todo)} groups that compile together to run"
    )
    if slurm is not None:
        _submit(submitit, folder, todo, slurm, say)
    elif processes == 1:
        _here(asked, folder, todo, say)
    elif processes > 1:
        _apart(folder, todo, processes, say)
    complete = collect_points(asked, folder)
    rebuild(folder)
    return folder, complete


def finished(folder: Path, point: SweepPoint) -> bool:
    """Whether a point is finished: its status.json says so, and its records exist.

    Args:
        folder: The sweep's folder.
        point: The point.

    Returns:
        False if the point is missing, unfinished, or its files cannot be read.
    """
    try:
        status = json.loads((folder / "points" / point.name / "status.json").read_text(encoding="utf-8"))
        return status["status"] == "finished" and (folder / "points" / point.name / "metrics.jsonl").is_file()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def collect_points(asked: SweepFile, folder: Path) -> bool:
    """Write the sweep's metrics.jsonl, a line for each point, and its status.

    Args:
        asked: The sweep.
        folder: Its folder.

    Returns:
        Whether every point is finished.
    """
    lines = [_collected(asked, folder, point) for point in asked.points]
    text = "".join(json.dumps(to_json(line), ensure_ascii=False) + "\n" for line in lines)
    write_atomic(folder / "metrics.jsonl", text)
    ended = sum(line["status"] == "finished" for line in lines)
    reason = None if ended == len(lines) else f"{ended} of {len(lines)} points are finished"
    set_status(folder, "finished" if reason is None else "interrupted", reason=reason)
    return reason is None


def run_points(folder: Path, names: list[str]) -> None:
    """Run points of a sweep's folder that compile together, as a process of its own or a job of a cluster.

    Args:
        folder: The sweep's folder.
        names: The names of the points.

    Raises:
        ValueError: If `folder` holds no sweep, or its sweep has no such point.
    """
    asked = _reread(folder, names)
    jax.config.update("jax_enable_x64", asked.x64)
    for group in groups(asked, list(asked.points)):
        run(asked, group, folder / "points", provenance.collect_provenance())


def _reread(folder: Path, names: list[str]) -> SweepFile:
    """The sweep of a folder's config with these points only; the name of each must be the hash of its setting."""
    config = read_config(folder)
    if config.get("job") != "sweep":
        raise ValueError(f"{str(folder)!r} is a run, but not of a sweep")
    try:
        found = tuple(make_point(config["of"], config["x64"], point["setting"]) for point in config["points"])
        asked = SweepFile(config["name"], config["of"], config["x64"], config["lanes"], tuple(config["varied"]), found)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{str(folder)!r} does not hold what a sweep writes ({type(error).__name__}: {error})"
        ) from None
    for name in names:
        validate_choice("point of the sweep", name, [point.name for point in found])
    return asked._replace(points=tuple(point for point in found if point.name in names))


def _open(asked: SweepFile, folder: Path) -> None:
    """Create the sweep's folder, or update the config of an existing one."""
    common = {key: value for key, value in asked.points[0].setting.items() if key not in asked.varied}
    listed = [{"name": point.name, "setting": point.setting} for point in asked.points]
    config = {"name": asked.name, "of": asked.job, "x64": asked.x64, "lanes": asked.replicas, "varied": asked.varied}
    config |= {"common": common, "points": listed}
    if not (folder / "config.json").is_file():
        create(folder, asked.name, "sweep", config)
    elif read_config(folder).get("job") != "sweep":
        check_out(folder)
        raise ValueError(f"{str(folder)!r} is a run, but not of a sweep: choose another folder")
    else:
        write_json(folder / "config.json", {"task": asked.name, "job": "sweep", **config})
        write_json(folder / "provenance.json", provenance.collect_provenance())
        set_status(folder, "running")


def _here(asked: SweepFile, folder: Path, todo: list[Group], say: Say) -> None:
    facts = provenance.collect_provenance()
    for i, group in enumerate(todo, start=1):
        say(f"[{i}/{len(todo)}] {_words(group)}")
        try:
            run(asked, group, folder / "points", facts)
        except (ValueError, TypeError, RuntimeError, FloatingPointError) as error:
            say(f"[{i}/{len(todo)}] failed: {' '.join(str(error).split())[:300]}")
        except KeyboardInterrupt:
            collect_points(asked, folder)
            rebuild(folder)
            raise


def _apart(folder: Path, todo: list[Group], processes: int, say: Say) -> None:
    """Run each group in a process of its own, `processes` at a time."""

    def one(numbered: tuple[int, Group]) -> None:
        i, group = numbered
        say(f"[{i}/{len(todo)}] {_words(group)}")
        done = subprocess.run(_command(folder, group), capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            say(f"[{i}/{len(todo)}] failed: {last[:300]}")

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(one, enumerate(todo, start=1)))


def _command(folder: Path, group: Group) -> list[str]:
    """The command that runs a group on any machine that sees the folder."""
    return [sys.executable, "-m", "diffmbrl.jobs.sweep", str(folder.resolve()), *(point.name for point in group.points)]


def _submit(submitit: Any, folder: Path, todo: list[Group], parameters: dict[str, Any], say: Say) -> None:
    """Submit each group as a job; submitit's own files are in `jobs/`."""
    executor = submitit.AutoExecutor(folder=str(folder / "jobs"), cluster=parameters.get("cluster"))
    executor.update_parameters(**{name: x for name, x in parameters.items() if name != "cluster"})
    for group in todo:
        job = executor.submit(submitit.helpers.CommandFunction(_command(folder, group)))
        say(f"job {job.job_id}: {_words(group)}")
    say("to collect the finished points: the same command with --processes 0 in place of --slurm")


def _submitit() -> Any:
    try:
        import submitit  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError("--slurm needs submitit: pip install 'diffmbrl[slurm]'") from None
    return submitit


def _words(group: Group) -> str:
    first = group.points[0].setting
    who = first.get("method") or first["agent"]
    many = f"{len(group.points)} points" if len(group.points) > 1 else "1 point"
    return f"{who} on {first['task']}: {many} x {group.seeds} seeds"


def _collected(asked: SweepFile, folder: Path, point: SweepPoint) -> dict[str, Any]:
    """The line of a point: its varied settings, its status and its last evaluation."""
    path = folder / "points" / point.name
    line: dict[str, Any] = {"kind": "point", "point": point.name}
    line["setting"] = {name: point.setting[name] for name in asked.varied}
    try:
        line |= json.loads((path / "status.json").read_text(encoding="utf-8"))
        facts = json.loads((path / "provenance.json").read_text(encoding="utf-8"))
        line["commit"] = (facts.get("git") or {}).get("commit")
        evaluations = [record for record in read_metrics(path / "metrics.jsonl")[0] if record["kind"] == "eval"]
    except (OSError, ValueError):
        return line | {"status": line.get("status", "missing")}
    return line | ({"last": evaluations[-1]} if evaluations else {})
