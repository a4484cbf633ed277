"""The doctor's report, and that it finds a gradient that is wrong."""

import jax
import numpy as np
import pytest

from diffmbrl.cli import main as cli
from diffmbrl.jobs import doctor
from diffmbrl.xla import OPTION, THRESHOLD


def row(text: str, name: str) -> str:
    """The lines of the report under one name."""
    return "\n".join(line for line in text.splitlines() if line.startswith(name))


@pytest.fixture(scope="module")
def report():
    return doctor.check_installation()


def test_a_healthy_installation(report):
    healthy, text = report
    assert healthy
    assert text.endswith("All is well.")
    for name in ("diffmbrl", "jax", "jaxlib", "python"):
        assert f"{name} " in row(text, "versions")
    assert "missing" not in row(text, "versions")
    assert "(cpu)" in row(text, "devices")
    assert "float32 (x64 off)" in row(text, "precision")
    assert str(jax.config.jax_compilation_cache_dir) in row(text, "compilation cache")
    assert f"compiled whole up to {THRESHOLD} bytes" in row(text, "small loops")
    assert all(line.endswith("PASS") for line in row(text, "gradient").splitlines())
    assert len(row(text, "gradient").splitlines()) == 2


def test_in_double_precision_one_gradient_is_enough(x64):
    healthy, text = doctor.check_installation()
    assert healthy
    assert "float64 (x64 on)" in row(text, "precision")
    assert row(text, "gradient").count("PASS") == 1


@pytest.mark.parametrize("precision, at_most", [("float32", 1e-4), ("float64", 1e-8)])
def test_the_errors_are_those_of_the_precision(precision, at_most):
    error = doctor.gradient_error(precision)
    assert 0 < error < at_most
    assert error < doctor.TOLERANCES[precision]


@pytest.mark.parametrize("wrong", [lambda g: 1.02 * g, lambda g: -g, lambda g: g.at[0].set(np.nan)])
def test_a_wrong_gradient_is_found(wrong, monkeypatch, capsys):
    right = doctor._by_autodiff
    monkeypatch.setattr(doctor, "_by_autodiff", lambda *problem: wrong(right(*problem)))
    healthy, text = doctor.check_installation()
    assert not healthy
    assert row(text, "gradient").count("FAIL") == 2
    assert "do not trust" in text
    assert cli.main(["doctor"]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_an_error_on_the_way_is_reported(monkeypatch):
    def broken(*problem):
        raise RuntimeError("no such instruction\nin the middle of something")

    monkeypatch.setattr(doctor, "_by_autodiff", broken)
    healthy, text = doctor.check_installation()
    assert not healthy
    assert "RuntimeError: no such instruction FAIL" in row(text, "gradient")


def test_cache_state(tmp_path):
    assert doctor.cache_state(None).startswith("off: ")
    assert doctor.cache_state(str(tmp_path / "later")) == f"{tmp_path / 'later'}: 0 files, 0.0 MiB, not made yet"
    (tmp_path / "program").write_bytes(b"0" * 2**20)
    assert doctor.cache_state(str(tmp_path)) == f"{tmp_path}: 1 files, 1.0 MiB"
    assert not (tmp_path / "later").exists()
    below = tmp_path / "program" / "cache"
    assert "cannot be written (Not a directory)" in doctor.cache_state(str(below))


def test_small_loops():
    assert doctor.small_loops(f"--xla_backend_extra_options={OPTION}=17", "cpu").endswith("up to 17 bytes a step")
    assert doctor.small_loops(f"--a --xla_backend_extra_options=x=1,{OPTION}=17,y=2 --b", "cpu").endswith(
        "17 bytes a step"
    )
    missing = doctor.small_loops("--xla_backend_extra_options=x=1", "cpu")
    assert missing.startswith("not compiled whole") and f"{OPTION}={THRESHOLD}" in missing
    assert "compiled as gpu does" in doctor.small_loops("", "gpu")


def test_from_the_command_line(capsys):
    assert cli.main(["doctor"]) == 0
    assert "PASS" in capsys.readouterr().out
