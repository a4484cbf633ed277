"""Validation of a name that a user chooses, with a suggestion for a misspelled one."""

from collections.abc import Collection
from difflib import get_close_matches


def validate_choice(what: str, name: str, names: Collection[str]) -> str:
    """Return `name` if it is one of `names`.

    Args:
        what: Kind of thing that is chosen, such as "method", for the error.
        name: Name that the user gave.
        names: Names that exist.

    Returns:
        `name`, unchanged.

    Raises:
        ValueError: If `name` is not among `names`; the error suggests the most similar name and lists all of them.

    >>> validate_choice("fruit", "apple", ["apple", "pear"])
    'apple'
    """
    if name in names:
        return name
    if not names:
        raise ValueError(f"unknown {what} '{name}': there are none")
    lower = {known.lower(): known for known in names}
    nearest = lower[get_close_matches(name.lower(), list(lower), n=1, cutoff=0.0)[0]]
    raise ValueError(f"unknown {what} '{name}'; did you mean '{nearest}'? There are: {', '.join(names)}")
