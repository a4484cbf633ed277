"""What the README shows is run."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert example is not None
    exec(compile(example.group(1), "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["L-BFGS", "Gauss-Newton"]
    # An untrained policy earns about -130 here: both must have learned.
    assert all(float(re.search(r"(-\d+\.\d+) on held-out", line).group(1)) > -60 for line in lines)  # type: ignore[union-attr]


def test_pictures_and_folders_named_exist() -> None:
    root = Path(__file__).parents[1]
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (root / picture).is_file()
    for name in re.findall(r"`((?:diffmbrl|tests|benchmarks|experiments)/[\w/.]+)`", README):
        assert (root / name).exists()
