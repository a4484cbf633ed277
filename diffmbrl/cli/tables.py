"""The tables of README.md, one row for each entry of a registry.

python -m diffmbrl.cli.tables              print them
python -m diffmbrl.cli.tables README.md    put them between the two markers of the file
"""

import sys
from pathlib import Path

from diffmbrl.agents.registry import AGENTS
from diffmbrl.gradients.registry import ESTIMATORS
from diffmbrl.methods import METHODS
from diffmbrl.tasks.registry import TASKS

BEGIN, END = "<!-- from the registries: python -m diffmbrl.cli.tables README.md -->", "<!-- until here -->"


def registry_tables() -> str:
    """Tabulate tasks, solvers, planners, estimators and agents.

    Returns:
        Markdown.
    """
    rows = {
        "task": {name: (row.make.__doc__ or "").strip().splitlines()[0].rstrip(".") for name, row in TASKS.items()},
        "solver of policies": {name: row.description for name, row in METHODS.items() if row.kind == "policy"},
        "planner": {name: row.description for name, row in METHODS.items() if row.kind == "plan"},
        "estimator of the gradient": {name: row.description for name, row in ESTIMATORS.items()},
        "agent": {name: row.description for name, row in AGENTS.items()},
    }
    return "\n\n".join(_table(kind, lines) for kind, lines in rows.items())


def written(text: str) -> str:
    """Replace the tables between the two markers of a text.

    Args:
        text: The text.

    Returns:
        The text with new tables.

    Raises:
        ValueError: If the markers are missing, repeated or in the wrong order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the file needs one line {BEGIN!r} and after it one line {END!r}")
    return f"{text[: text.index(BEGIN)]}{BEGIN}\n\n{registry_tables()}\n\n{text[text.index(END) :]}"


def _table(kind: str, lines: dict[str, str]) -> str:
    # A bar would end the cell.
    rows = [f"| `{name}` | {words.replace('|', chr(92) + '|')} |" for name, words in lines.items()]
    return "\n".join([f"| {kind} | |", "|---|---|", *rows])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        path = Path(sys.argv[1])
        path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(registry_tables())
