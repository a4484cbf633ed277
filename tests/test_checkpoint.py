"""Checkpoints: what is saved comes back as it was, and what was damaged, forged or not written whole is found and named."""

import errno
import io
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffmbrl.info import Quadratic
from diffmbrl.runs import manifest as manifests
from diffmbrl.runs import metrics
from diffmbrl.runs.checkpoint import newest_valid, restore_checkpoint, save_checkpoint, verify
from diffmbrl.runs.session import Session, underway


class Module(eqx.Module):
    w: jax.Array
    key: jax.Array


TREE = {
    "module": Module(jnp.arange(6.0).reshape(2, 3), jax.random.split(jax.random.key(1), 3)),
    "other": jax.random.key(2, impl="rbg"),
    "tuple": (jnp.array(True), jnp.bfloat16(1.5), None),
    "none": jnp.zeros((0, 4), jnp.int32),
    "host": {"total": np.full((2, 2), np.nan), "count": np.int64(2**40)},
}
HOST = {"done": 3, "spent": 0.1 + 0.2, "words": "<b>"}


@pytest.fixture
def place(tmp_path) -> Path:
    """A run's folder of three checkpoints, with records of 2, 4 and 6 lines."""
    with metrics.Writer(tmp_path / "metrics.jsonl") as writer:
        for step in (1, 2, 3):
            for line in range(2):
                writer.write({"kind": "eval", "step": step, "line": line})
            save_checkpoint(tmp_path / "checkpoints", step, TREE, HOST | {"step": step}, metrics=writer.mark())
    return tmp_path / "checkpoints"


def test_a_tree_comes_back_as_it_was(place):
    kept, wrong = newest_valid(place)
    assert (kept.step, wrong) == (3, []) and kept.host == HOST | {"step": 3}
    for like in (TREE, jax.eval_shape(lambda: TREE | {"host": None}) | {"host": TREE["host"]}):
        back = restore_checkpoint(kept, like)
        assert jax.tree.structure(back) == jax.tree.structure(TREE)
        for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(TREE), strict=True):
            assert x.dtype == y.dtype and isinstance(x, jax.Array) == isinstance(y, jax.Array)
            numbers = jax.random.key_data if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else np.asarray
            np.testing.assert_array_equal(numbers(x), numbers(y))
    assert jax.random.uniform(back["other"]) == jax.random.uniform(TREE["other"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"more": jnp.zeros(2)}, r"for \['more'\] it has nothing, needed is float32\[2\]"),
        ({"none": jnp.zeros((0, 4))}, r"for \['none'\] it has int32\[0, 4\], needed is float32\[0, 4\]"),
        ({"other": jax.random.key(0)}, r"for \['other'\] it has key<rbg>\[\], needed is key<fry>\[\]"),
        (
            {"module": Module(jnp.zeros((3, 2)), TREE["module"].key)},
            r"\['module'\].w it has float32\[2, 3\], .*\[3, 2\]",
        ),
    ],
)
def test_what_does_not_fit_is_named(place, change, message):
    with pytest.raises(ValueError, match=message):
        restore_checkpoint(newest_valid(place)[0], TREE | change)


def test_another_precision_does_not_fit(place, x64):
    with pytest.raises(ValueError, match=r"float32\[2, 3\], needed is float64\[2, 3\]"):
        restore_checkpoint(newest_valid(place)[0], TREE | {"module": Module(jnp.zeros((2, 3)), TREE["module"].key)})


def test_only_arrays(tmp_path):
    with pytest.raises(TypeError, match=r"a checkpoint holds arrays; \['x'\] is float"):
        save_checkpoint(tmp_path / "checkpoints", 1, {"x": 1.0}, {})
    with pytest.raises(TypeError, match=r"is ndarray"):
        save_checkpoint(tmp_path / "checkpoints", 1, {"x": np.array([{}], object)}, {})


def test_the_latest_few_are_kept(place):
    save_checkpoint(place, 4, {}, {})
    assert sorted(path.name for path in place.iterdir()) == ["2", "3", "4"]
    assert restore_checkpoint(newest_valid(place)[0], {}) == {}


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
    "linked": lambda path: (path.unlink(), path.symlink_to("/etc/hostname")),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_every_damaged_file_is_named_and_the_one_before_used(how, place):
    for name in names(place / "3"):
        shutil.copytree(place / "3", place.parent / "whole")
        DAMAGE[how](place / "3" / name)
        kept, wrong = newest_valid(place)
        assert kept.step == 2, name
        assert len(wrong) == 1 and wrong[0].startswith(f"checkpoint 3: {name} "), wrong
        shutil.rmtree(place / "3")
        (place.parent / "whole").rename(place / "3")
    assert newest_valid(place) == (verify(place / "3"), [])


def test_no_byte_of_the_manifest_changes_unseen(place):
    path = place / "3" / "manifest.json"
    data = path.read_bytes()
    for at in range(0, len(data), 29):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(ValueError, match=r"checkpoint 3: manifest\.json"):
            verify(place / "3")


def forged(folder: Path, **change) -> None:
    """A manifest that is whole in itself."""
    manifest = json.loads((folder / "manifest.json").read_text()) | change
    del manifest["own"]
    (folder / "manifest.json").write_bytes(manifests.sealed(manifest))


def test_nothing_leads_out_of_the_folder(place):
    files = json.loads((place / "3" / "manifest.json").read_text())["files"]
    for name in ("../2/host.json", "/etc/hostname"):
        forged(place / "3", files=files | {name: {"bytes": 1, "sha256": ""}})
        with pytest.raises(ValueError, match=f"manifest.json: '{name}' leads out of the folder"):
            verify(place / "3")
    forged(place / "3", files=files)
    assert verify(place / "3").step == 3
    (place / "3" / "arrays" / "more.pkl").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"arrays/more\.pkl is not in the manifest"):
        verify(place / "3")
    (place / "3" / "arrays" / "more.pkl").unlink()
    forged(place / "3", format=2)
    with pytest.raises(ValueError, match="is of another format than this version reads"):
        verify(place / "3")
    forged(place / "3", format=1, step=2)
    with pytest.raises(ValueError, match=r"manifest\.json is of checkpoint 2"):
        verify(place / "3")


def test_links_in_place_of_folders(place, tmp_path):
    (place / "3").rename(tmp_path / "elsewhere")
    (place / "3").symlink_to(tmp_path / "elsewhere")
    kept, wrong = newest_valid(place)
    assert kept.step == 2 and wrong == ["checkpoint 3: its folder is a symbolic link"]
    (place / "2" / "arrays").rename(tmp_path / "arrays")
    (place / "2" / "arrays").symlink_to(tmp_path / "arrays")
    assert newest_valid(place)[1][1] == "checkpoint 2: arrays is a symbolic link"
    place.rename(tmp_path / "moved")
    place.symlink_to(tmp_path / "moved")
    for use in (newest_valid, lambda p: save_checkpoint(p, 9, {}, {})):
        with pytest.raises(ValueError, match="is a symbolic link: a run's checkpoints are in its own folder"):
            use(place)


def test_records_that_a_checkpoint_goes_on_from(place):
    path = place.parent / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind": "ev')  # what a killed run leaves is no damage
    assert newest_valid(place)[0].step == 3
    path.write_bytes(whole[:-1])
    kept, wrong = newest_valid(place)
    assert kept.step == 2 and "its metrics.jsonl has" in wrong[0]
    path.write_bytes(b"X" + whole[1:])
    with pytest.raises(ValueError, match=r"no checkpoint in .* is valid: checkpoint 3: .* checkpoint 2: .*SHA-256"):
        newest_valid(place)


def test_none_at_all(tmp_path):
    assert newest_valid(tmp_path / "checkpoints") == (None, [])


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["os.fsync", "os.rename", "pathlib.Path.write_bytes", "pathlib.Path.mkdir"])
def test_a_full_disk_leaves_what_was_there(where, place, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(where, full)
        with pytest.raises(OSError, match=r"checkpoint 4 cannot be written to .*: No space left on device"):
            save_checkpoint(place, 4, TREE, HOST)
    assert sorted(path.name for path in place.iterdir()) == ["1", "2", "3"]
    assert newest_valid(place)[0].step == 3


def test_a_disk_that_is_full(tmp_path):
    """Not a pretended one: orbax, which writes from threads of its own, fails too."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    try:
        save_checkpoint(disk / "checkpoints", 1, {"x": jnp.arange(5.0)}, {})
        noise = jax.random.normal(jax.random.key(0), (200_000,))
        with pytest.raises(OSError, match=r"checkpoint 2 cannot be written to .*: No space left on device"):
            save_checkpoint(disk / "checkpoints", 2, {"x": noise}, {})
        assert [path.name for path in (disk / "checkpoints").iterdir()] == ["1"]
        assert restore_checkpoint(newest_valid(disk / "checkpoints")[0], {"x": jnp.zeros(5)})["x"][4] == 4
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_folder_that_cannot_be_written():
    folder, user = Path(tempfile.mkdtemp()), os.geteuid()  # pytest's own may be entered by nobody else
    folder.chmod(0o555)
    try:
        if user == 0:
            os.seteuid(65534)  # root may write anywhere
        with pytest.raises(OSError, match=r"checkpoint 1 cannot be written to .*: Permission denied"):
            save_checkpoint(folder / "checkpoints", 1, {}, {})
    finally:
        os.seteuid(user)
        folder.rmdir()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A folder whose arms are loops that count to three."""
    (tmp_path / "provenance.json").write_text("{}")
    return tmp_path


def count(session: Session, arms: int, stop: tuple[int, int] | None = None, error=KeyboardInterrupt) -> list:
    """The looks that are made; stopped after the second number of one arm."""
    made = []
    for arm in session.arms(range(arms)):
        done = 0 if session.restored is None else session.restored["done"]
        state = {"x": jnp.float32(0)} if session.restored is None else session.restore({"x": jnp.float32(0)})
        assert state["x"] == done
        while done < 3:
            done += 1
            session.write({"kind": "eval", "arm": arm, "done": done})
            session.save({"x": jnp.float32(done)}, done=done)
            made.append((arm, done))
            if stop == (arm, done):
                session.write({"kind": "stop", "reason": "stopped"})
                raise error
    return made


def test_a_session_goes_on_where_it_was(run):
    with pytest.raises(KeyboardInterrupt) as caught, underway(run, 2, report=str, stream=io.StringIO()) as session:
        count(session, 2, stop=(1, 2))
    assert caught.value.__notes__ == [f"to continue: diffmbrl resume {run}"]
    with underway(run, 2, report=str, stream=io.StringIO(), resumed=True) as session:
        assert count(session, 2) == [(1, 3)]
    records = metrics.read_metrics(run / "metrics.jsonl")[0]
    assert [(x["arm"], x["done"]) for x in records] == [(arm, done) for arm in (0, 1) for done in (1, 2, 3)]


def test_a_checkpoint_when_it_is_time(run):
    with underway(run, 1, report=str, stream=io.StringIO(), every=0.0) as session:
        count(session, 1)
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["1", "2", "3"]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["3"]


def test_damaged_ones_are_set_aside_and_told(run):
    with pytest.raises(ZeroDivisionError), underway(run, 1, report=str, stream=io.StringIO(), every=0.0) as session:
        count(session, 1, stop=(0, 2), error=ZeroDivisionError)
    flip(run / "checkpoints" / "2" / "host.json")
    printed = io.StringIO()
    with underway(run, 1, report=str, stream=printed, every=0.0, resumed=True) as session:
        assert count(session, 1) == [(0, 2), (0, 3)]
    first, *_, last = printed.getvalue().splitlines()
    assert first == "left out as damaged: checkpoint 2: host.json is not what was written: its SHA-256 is another"
    assert last == "resumed from checkpoint 1"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["3", "damaged-2"]
    [entry] = json.loads((run / "provenance.json").read_text())["resumed"]
    assert entry["checkpoint"] == 1 and entry["remarks"][0] == first


def test_a_run_stops_on_a_full_disk(run, monkeypatch):
    said = (
        r"checkpoint 2 cannot be written .*: No space left on device; checkpoint 1 is valid; free the disk, then: diff"
    )
    with pytest.raises(OSError, match=said), underway(run, 1, report=str, stream=io.StringIO(), every=0.0) as session:  # noqa: PT012
        session.save({"x": jnp.float32(1)}, done=1)
        monkeypatch.setattr("os.rename", full)
        session.save({"x": jnp.float32(2)}, done=2)
    monkeypatch.undo()
    status = json.loads((run / "status.json").read_text())
    assert status["status"] == "failed" and "No space left on device" in status["reason"]
    spent = status["checkpoints"]
    assert spent["written"] == 1 and 0 < spent["seconds"] <= spent["of"]
    assert newest_valid(run / "checkpoints")[0].host["numbers"] == {"done": 1}


def test_a_quadratic_is_a_tree_too(tmp_path):
    """What the first update said of its model, numpy's arrays in a named tuple with nothing in one of its places."""
    first = Quadratic(*(np.ones((2, k), np.float32) for k in range(len(Quadratic._fields))))
    save_checkpoint(tmp_path / "checkpoints", 1, {"first": first}, {})
    back = restore_checkpoint(newest_valid(tmp_path / "checkpoints")[0], {"first": first})["first"]
    assert isinstance(back, Quadratic) and [x.shape for x in back] == [x.shape for x in first]
