"""The command line: `diffmbrl COMMAND`, each a row of `COMMANDS` in `commands.py` and of `RUN` in `handlers.py`."""

import contextlib
import functools
import io
import itertools
import operator
import re
import sys
from typing import Any

import tyro

from diffmbrl.cli.commands import COMMANDS
from diffmbrl.cli.handlers import RUN


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: The command and its options; by default those of the process.

    Returns:
        The exit code: 0, or 2 for bad input and 1 for a non-finite value that stops the run, each with one line on stderr.
    """
    try:
        name, configs = _parse(sys.argv[1:] if arguments is None else arguments)
        return RUN[name](*configs)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"diffmbrl: {_line(error)}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"diffmbrl: {_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        from diffmbrl.runs.signals import exit_code

        print("diffmbrl: " + "; ".join(["interrupted", *getattr(error, "__notes__", [])]), file=sys.stderr)
        return exit_code(error)


def _line(error: Exception) -> str:
    """An error and its notes in one line."""
    return "; ".join(" ".join(str(text).split()) for text in [error, *getattr(error, "__notes__", [])])


def _parse(arguments: list[str]) -> tuple[str, list[Any]]:
    """The command and its configs. Raises `ValueError` in one line where tyro draws a box."""
    if not arguments:
        raise ValueError(f"expected a command: {', '.join(COMMANDS)}; see diffmbrl --help")
    if not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        from diffmbrl.choices import validate_choice

        validate_choice("command", arguments[0], COMMANDS)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            given = tyro.cli(
                functools.reduce(operator.or_, [command.parser() for command in COMMANDS.values()]),
                prog="diffmbrl",
                description="First- and second-order policy optimisation and planning through differentiable dynamics.",
                args=arguments,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
            )
    except SystemExit as end:
        if not end.code:
            raise
        raise ValueError(_one_line(printed.getvalue())) from None
    name = type(given).__name__
    return name, COMMANDS[name].read(given)


def _one_line(box: str) -> str:
    """The first paragraph of a box that tyro draws, and the option that it suggests."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip("│ ") for line in box.splitlines()]
    # After the title, paragraphs between rules, drawn with hyphens where the terminal knows no others.
    paragraphs = itertools.groupby(lines[1:], key=lambda line: bool(line.strip("─-╰╯ ")))
    message = next((" ".join(" ".join(paragraph).split()) for is_text, paragraph in paragraphs if is_text), "bad input")
    meant = re.search(r"Perhaps you meant:\s+(--[\w-]+)", "\n".join(lines))
    return message + (f"; did you mean '{meant[1]}'?" if meant and meant[1] not in message else "")


if __name__ == "__main__":
    sys.exit(main())
