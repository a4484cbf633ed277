"""Numbers for readers: three significant digits, and an exponent only where one is needed."""

import math

from diffmbrl.runs.statistics import Estimate

NONE = "-"


def format_number(x: float | int | None, *, decimals: int | None = None) -> str:
    """Format a number with three significant digits and at most four decimals, or with a given number of decimals.

    >>> format_number(-0.81234), format_number(-27000.0), format_number(1.2e9), format_number(math.nan)
    ('-0.812', '-27,000', '1.2e+09', '-')
    """
    if x is None or math.isnan(x):
        return NONE
    if math.isinf(x):
        return "inf" if x > 0 else "-inf"
    if abs(x) >= 1e7 or (0 < abs(x) < 1e-3 and decimals is None):
        return f"{x:.3g}"
    return f"{x:,.{_decimals(x) if decimals is None else decimals}f}"


def format_estimate(e: Estimate) -> str:
    """Format a value and its interval, the value alone if there is no interval.

    >>> format_estimate(Estimate(-0.812, -0.9041, -0.7)), format_estimate(Estimate(149.12, 148.9, 149.2))
    ('-0.812 [-0.904, -0.700]', '149.1 [148.9, 149.2]')
    """
    return format_value(e) + (f" {format_interval(e)}" if format_interval(e) else "")


def format_value(e: Estimate) -> str:
    """Format the value with the decimals that its interval needs."""
    return format_number(e.value, decimals=_shared(e))


def format_interval(e: Estimate) -> str:
    """Format the interval in brackets, empty if there is none."""
    if math.isnan(e.low) or math.isnan(e.high):
        return ""
    return f"[{format_number(e.low, decimals=_shared(e))}, {format_number(e.high, decimals=_shared(e))}]"


def format_count(x: float | int | None) -> str:
    """Format a count, shortened from 10,000 on.

    >>> format_count(400), format_count(12345), format_count(3.1e8)
    ('400', '12.3k', '310M')
    """
    if x is None or not math.isfinite(x):
        return NONE
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= size and x >= 1e4:
            return f"{x / size:.3g}{unit}" if x < 999.5 * size else f"{x / size:.0f}{unit}"
    return f"{x:,.0f}"


def seconds(x: float | int | None) -> str:
    """Format seconds, with the unit.

    >>> seconds(0.1234), seconds(31.26), seconds(421.0)
    ('0.12 s', '31.3 s', '421 s')
    """
    if x is None or not math.isfinite(x):
        return NONE
    return f"{x:.{2 if x < 10 else 1 if x < 100 else 0}f} s"


def few(seeds: int) -> list[str]:
    """Warn of intervals from fewer than five seeds, in one sentence; an empty list for more.

    >>> few(1), few(5)
    (['One seed: no interval, and no claim beyond this seed.'], [])
    """
    if seeds == 1:
        return ["One seed: no interval, and no claim beyond this seed."]
    return [f"With {seeds} seeds an interval is the observed range and covers less than 95%."] if seeds < 5 else []


def format_share(x: float | int | None) -> str:
    """Format a share as a percentage."""
    return NONE if x is None or not math.isfinite(x) else f"{100 * x:.0f}%"


def times(x: float) -> str:
    """Format a ratio: `3.2 times`, `40 times`."""
    return f"{x:.1f} times" if x < 10 else f"{x:.0f} times"


def join_words(items: list[str]) -> str:
    """Join words: `a`, `a and b`, `a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _decimals(x: float | int) -> int:
    return 2 if x == 0 else min(4, max(0, 2 - math.floor(math.log10(abs(x)))))


def _shared(e: Estimate) -> int | None:
    """Return the decimals that show three digits of the value and one of the width; None if the value has none."""
    width = e.high - e.low
    if not math.isfinite(e.value) or abs(e.value) < 1e-3:
        return None
    if not math.isfinite(width) or width <= 0:
        return _decimals(e.value)
    return min(4, max(_decimals(e.value), -math.floor(math.log10(width))))
