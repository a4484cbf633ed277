"""What the README shows is run."""

import ast
import re
from pathlib import Path

import pytest

from diffmbrl.cli.tables import BEGIN, END, registry_tables, written

README = (Path(__file__).parents[1] / "README.md").read_text()


EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(example: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    exec(compile(example, "README.md", "exec"), {})
    return capsys.readouterr().out.splitlines()


@pytest.mark.slow
def test_policies_of_the_example_learn(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(EXAMPLES[0], capsys)
    assert [line.split(":")[0] for line in lines] == ["L-BFGS", "Gauss-Newton"]
    # An untrained policy earns about -130 here: both must have learned.
    assert all(float(re.search(r"(-\d+\.\d+) on held-out", line).group(1)) > -60 for line in lines)  # type: ignore[union-attr]


@pytest.mark.slow
def test_plans_of_the_example_reach_their_goal(capsys: pytest.CaptureFixture[str]) -> None:
    ends, state = run(EXAMPLES[1], capsys)
    assert "nonfinite" not in ends and float(re.findall(r"cost (\d\.\d+)", ends)[0]) < 1.5, ends
    height = [float(x) for x in re.findall(r"-?\d+\.?\d*", state)[:2]]
    assert max(map(abs, height)) < 0.5


def test_estimators_of_the_example_differ(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(EXAMPLES[2], capsys)
    numbers = {line.split(":")[0]: [float(x) for x in re.findall(r"-?\d[\d.e+]*", line)] for line in lines}
    (J, exact, _), (same_J, windows, _), (_, _, spread) = (numbers[name] for name in ("exact", "windows", "score"))
    assert same_J == J and exact != windows and spread > 0


@pytest.mark.slow
def test_agents_of_the_example_learn_from_real_steps(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(EXAMPLES[3], capsys)
    assert [int(line.split()[0]) for line in lines] == [200, 250, 300]
    assert all("model error" in line for line in lines[1:])


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_what_an_example_imports_exists(number: int) -> None:
    imports = [part for part in ast.parse(EXAMPLES[number]).body if isinstance(part, ast.Import | ast.ImportFrom)]
    assert imports
    exec(compile(ast.Module(imports, []), "README.md", "exec"), {})


def test_tables_are_those_of_the_registries() -> None:
    assert written(README) == README, "run: python -m diffmbrl.cli.tables README.md"
    lines = [line for line in registry_tables().splitlines() if line.startswith("| `")]
    assert len(lines) > 60 and all(re.fullmatch(r"\| `[a-z0-9-]+` \| \S.{5,130} \|", line) for line in lines)


def test_tables_go_between_two_markers() -> None:
    assert written(f"above\n{BEGIN}\nold\n{END}\nbelow") == f"above\n{BEGIN}\n\n{registry_tables()}\n\n{END}\nbelow"
    with pytest.raises(ValueError, match="needs one line"):
        written(f"{END} {BEGIN}")


def test_pictures_and_folders_named_exist() -> None:
    root = Path(__file__).parents[1]
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (root / picture).is_file()
    for name in re.findall(r"`((?:diffmbrl|tests|benchmarks|experiments)/[\w/.]+)`", README):
        assert (root / name).exists()
