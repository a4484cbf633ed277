"""The tasks as a table of text."""

import inspect

from diffmbrl.tasks.registry import TASKS


def tasks_listing() -> str:
    """Name, dimensions, horizon, step and gradient contract of every task, and what it is."""
    head = ("task", "n", "m", "T", "dt [s]", "smooth", "dr/da", "safe horizon", "")
    rows: list[tuple[str, ...]] = [head]
    for name, row in TASKS.items():
        horizon = inspect.signature(row.make).parameters["horizon"].default
        dt = row.make().dt if row.dt is None else row.dt
        what = (row.make.__doc__ or "").strip().splitlines()[0]
        safe = "?" if row.safe_horizon is None else str(row.safe_horizon)
        flags = ["yes" if flag else "no" for flag in (row.smooth, row.differentiable_reward)]
        sizes = (len(row.states), len(row.actions), horizon)
        rows.append((name, *map(str, sizes), f"{dt:g}", *flags, safe, what))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head) - 1)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
    ]
    note = (
        "smooth: dynamics and reward are continuously differentiable. dr/da: the reward has a gradient in the action.\n"
        "safe horizon: steps up to which the float32 gradient through a small random policy agrees with float64 to 1%.\n"
        "?: not measured.\n"
        "gym:ID, such as gym:Pendulum-v1, is any Gymnasium environment with Box spaces, as a real system for `learn`."
    )
    return "\n".join(line.rstrip() for line in lines) + "\n\n" + note
