"""The structure of the package: what may import what, how large a file is, and that no two packages share a public name."""

import ast
from collections import defaultdict
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1] / "diffmbrl"
LIBRARY = {
    *(
        "core",
        "rollout",
        "policies",
        "nets",
        "info",
        "constraints",
        "devices",
        "xla",
        "choices",
        "batching",
        "second_order",
    ),
    *(
        "parallel_time",
        "tasks",
        "models",
        "gradients",
        "optimizers",
        "planners",
        "agents",
        "diagnostics",
        "methods",
        "solve",
    ),
}
ABOVE = {"jobs", "runs", "report", "render", "cli"}
# What each package may import of those that are no library; the command line is above all, and nothing imports contrib.
ALLOWED = {
    "render": set(),
    "report": {"render", "runs"},
    "runs": set(),
    "jobs": ABOVE - {"cli", "jobs"},
    "contrib": set(),
}
# Methods of one protocol that are functions of modules.
PROTOCOL: set[str] = set()


def modules() -> dict[str, Path]:
    """Every module by its dotted name."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = ("diffmbrl", *path.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "diffmbrl":
            assert node.level == 0
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "diffmbrl"}
    return found


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Every circle that a depth-first walk meets."""
    state: dict[str, int] = {}
    found = []

    def walk(node: str, path: list[str]) -> None:
        state[node] = 1
        for other in sorted(arrows.get(node, ())):
            if state.get(other) == 1:
                found.append([*path[path.index(other) :], other])
            elif other not in state:
                walk(other, [*path, other])
        state[node] = 2

    for node in sorted(arrows):
        if node not in state:
            walk(node, [node])
    return found


def test_the_library_imports_nothing_above_it():
    known = modules()
    wrong = []
    for name, path in known.items():
        allowed = ALLOWED.get(room(name), ABOVE if room(name) == "cli" else set()) | {room(name)}
        for other in imports(path, known):
            if room(other) in ABOVE | {"contrib"} and room(other) not in allowed:
                wrong.append(f"{name} imports {other}")
    assert not wrong


def test_every_package_is_placed():
    found = {room(name) for name in modules()} - {""}
    assert found <= LIBRARY | ABOVE | {"contrib"}


def test_no_circles():
    known = modules()
    arrows = {name: imports(path, known) - {name} for name, path in known.items()}
    assert circles(arrows) == []
    rooms = defaultdict(set)
    for name, others in arrows.items():
        if room(name):
            rooms[room(name)] |= {room(other) for other in others} - {room(name), ""}
    assert circles(rooms) == []


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == [["a", "b", "c", "a"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}}) == []


def test_few_flat_modules_and_files_of_one_idea():
    assert len(list(ROOT.glob("*.py"))) <= 12
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in ROOT.rglob("*.py")}
    assert {name: n for name, n in lengths.items() if n > 350} == {}
    assert median(lengths.values()) <= 200


def test_no_two_packages_share_a_public_name():
    places = defaultdict(set)
    for name, path in modules().items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                places[node.name].add(room(name))
    shared = {name: sorted(rooms) for name, rooms in places.items() if len(rooms) > 1 and name not in PROTOCOL}
    assert shared == {}
