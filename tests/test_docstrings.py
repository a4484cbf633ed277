"""Docstrings of everything public: what it is, in a first line, and every argument by its name.

Public is what the top level and the faces of the packages name in `__all__`.
"""

import importlib
import inspect
import re
from typing import Any

import pytest

FACES = (
    *("diffmbrl", "diffmbrl.agents", "diffmbrl.contrib", "diffmbrl.core", "diffmbrl.diagnostics", "diffmbrl.gradients"),
    *(
        "diffmbrl.methods",
        "diffmbrl.models",
        "diffmbrl.optimizers",
        "diffmbrl.planners",
        "diffmbrl.rollout",
        "diffmbrl.second_order",
    ),
    *("diffmbrl.solve", "diffmbrl.tasks", "diffmbrl.jobs", "diffmbrl.runs", "diffmbrl.report", "diffmbrl.render"),
)
SECTIONS = ("Args", "Returns", "Raises", "Yields", "Cost", "Reference", "References", "Example", "Examples", "Note")


def public(face: str) -> list[tuple[str, Any]]:
    """The callables of a face that diffmbrl defines, by name; of a module without `__all__` those that it defines itself."""
    module = importlib.import_module(face)
    own = [name for name, x in vars(module).items() if getattr(x, "__module__", "") == face and name[0] != "_"]
    found = [(name, getattr(module, name)) for name in getattr(module, "__all__", own)]
    return [(name, x) for name, x in found if callable(x) and getattr(x, "__module__", "").startswith("diffmbrl")]


CASES = [pytest.param(x, id=f"{face}.{name}") for face in FACES for name, x in public(face)]


def parameters(x: Any) -> list[str]:
    """The names of what it is called with; none for protocols and enumerations, which are not called."""
    if inspect.isclass(x) and (getattr(x, "_is_protocol", False) or hasattr(x, "__members__")):
        return []
    return [name for name in inspect.signature(x).parameters if name not in ("self", "cls")]


def sections(text: str) -> dict[str, str]:
    """The text of each section of a docstring in Google's style."""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):", inspect.cleandoc(text), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def described(section: str) -> set[str]:
    """The arguments that a section describes: `name: ...`, or several as `low, high: ...`, each on a line of its own."""
    heads = re.findall(r"^ {4}(\*{0,2}\w+(?:, \*{0,2}\w+)*):", section, flags=re.MULTILINE)
    return {name.strip().lstrip("*") for head in heads for name in head.split(",")}


@pytest.mark.parametrize("x", CASES)
def test_every_argument_is_described(x):
    assert x.__doc__, "no docstring"
    first = inspect.cleandoc(x.__doc__).splitlines()[0]
    assert not first.startswith("What"), first
    wanted = parameters(x)
    missing = [name for name in wanted if name not in described(sections(x.__doc__).get("Args", ""))]
    assert not missing, f"Args: does not describe {', '.join(missing)}"
    # The dataclass's own docstring would be its signature.
    assert not first.startswith(f"{x.__name__}("), first


@pytest.mark.parametrize("x", [case for case in CASES if inspect.isfunction(case.values[0])])
def test_every_result_is_described(x):
    returns = inspect.signature(x).return_annotation
    if returns not in (None, "None"):
        assert sections(x.__doc__).keys() & {"Returns", "Yields"}, "no Returns:"


def test_what_is_missing_is_seen():
    text = """One thing.

    Args:
        one: The first, shape [n].
        low, high: Both limits.
            of the second line: is not a name.

    Returns:
        two: no argument.
    """
    assert described(sections(text)["Args"]) == {"one", "low", "high"}
