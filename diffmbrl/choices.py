"""Names that a user chooses among, with the nearest one where a name is not there."""

from difflib import get_close_matches
from typing import Any


def validate_choice(what: str, name: str, names: Any) -> str:
    """`name` if it is one of `names`; else a `ValueError` with the nearest."""
    if name in names:
        return name
    if what == "task" and name.startswith("gym:"):
        raise ValueError(
            f"'{name}' is a real system, whose dynamics cannot be called: `diffmbrl learn` and `diffmbrl race` take it"
        )
    if not names:
        raise ValueError(f"unknown {what} '{name}': there are none")
    lower = {known.lower(): known for known in names}
    nearest = lower[get_close_matches(name.lower(), list(lower), n=1, cutoff=0.0)[0]]
    raise ValueError(f"unknown {what} '{name}'; did you mean '{nearest}'? There are: {', '.join(names)}")
