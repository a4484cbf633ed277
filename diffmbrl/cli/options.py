"""Options of the form name=value."""

from typing import Any

WORDS = ("backend",)  # parameters of tasks that are no numbers


def parse_numbers(given: list[str], option: str = "--param", example: str = "m_p=0.2") -> dict[str, Any]:
    """name=value pairs of numbers, and of the words that some parameters are. Raises: `ValueError` for one that is not."""
    parameters, form = {}, f"name=value with a number, such as {example}"
    for name, number in parse_pairs(given, option, form).items():
        try:
            parameters[name] = number if name in WORDS else float(number)
        except ValueError:
            raise ValueError(f"{option} takes {form}; got '{name}={number}'") from None
    return parameters


def parse_pairs(given: list[str], option: str, form: str) -> dict[str, str]:
    """name=value pairs. Raises: `ValueError` for one that is not, and for one that is given twice."""
    found: dict[str, str] = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not (name and equals and value):
            raise ValueError(f"{option} takes {form}; got '{pair}'")
        if name in found:
            raise ValueError(f"{option} {name} is given more than once: {' '.join(given)}")
        found[name] = value
    return found
