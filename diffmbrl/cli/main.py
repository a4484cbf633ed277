"""The command line: `diffmbrl COMMAND`, each of them a dataclass of `commands.py` and a row of `RUN` in `actions.py`."""

import contextlib
import io
import itertools
import re
import sys
from typing import Any

import tyro

from diffmbrl.cli.commands import Command
from diffmbrl.cli.handlers import RUN


def main(arguments: list[str] | None = None) -> int:
    """Run a command; bad input gives one line on stderr and exit code 2, a value that is not finite and stops it 1."""
    try:
        command = _parse(sys.argv[1:] if arguments is None else arguments)
        return RUN[type(command)](command)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"diffmbrl: {_said(error)}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"diffmbrl: {_said(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        from diffmbrl.runs.signals import exit_code

        print("diffmbrl: " + "; ".join(["interrupted", *getattr(error, "__notes__", [])]), file=sys.stderr)
        return exit_code(error)


def _said(error: Exception) -> str:
    """An error in one line, with what was found out while it was on its way."""
    return "; ".join(" ".join(str(text).split()) for text in [error, *getattr(error, "__notes__", [])])


def _parse(arguments: list[str]) -> Any:
    """The command given. Raises: `ValueError` in one line where tyro draws a box."""
    names = [kind.__name__.lower() for kind in RUN]
    if not arguments:
        raise ValueError(f"expected a command: {', '.join(names)}; see diffmbrl --help")
    if not arguments[0].startswith("-") and arguments[0] not in names:
        from diffmbrl.choices import validate_choice

        validate_choice("command", arguments[0], names)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(
                Command,  # type: ignore[arg-type]
                prog="diffmbrl",
                description="First- and second-order policy optimisation and planning through differentiable dynamics.",
                args=arguments,
            )
    except SystemExit as end:
        if not end.code:
            raise
        raise ValueError(_one_line(printed.getvalue())) from None


def _one_line(box: str) -> str:
    """What tyro says in a box: its first paragraph, and the option that it thinks was meant."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip("│ ") for line in box.splitlines()]
    # After the title, paragraphs between rules, drawn with hyphens where the terminal knows no others.
    paragraphs = itertools.groupby(lines[1:], key=lambda line: bool(line.strip("─-╰╯ ")))
    message = next((" ".join(" ".join(paragraph).split()) for is_text, paragraph in paragraphs if is_text), "bad input")
    meant = re.search(r"Perhaps you meant:\s+(--[\w-]+)", "\n".join(lines))
    return message + (f"; did you mean '{meant[1]}'?" if meant else "")


if __name__ == "__main__":
    sys.exit(main())
