"""Numbers as a report writes them."""

import math
import statistics
from collections.abc import Callable, Iterable
from typing import Any


def number(value: float) -> str:
    """Four significant digits, and all digits of a whole number."""
    if isinstance(value, int) or (abs(value) >= 1000 and math.isfinite(value)):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def amount(value: float, unit: str = "B") -> str:
    """In powers of a thousand: 35592 is "35.6 kB"."""
    power = 0
    while abs(value) >= 999.5 and power < 5:
        value, power = value / 1000, power + 1
    prefix = ("", "k", "M", "G", "T", "P")[power] + unit
    return f"{value:.3g} {prefix}" if unit else f"{value:.3g}{prefix}"


def spread(values: Iterable[float | None]) -> tuple[float, float | None, int]:
    """Mean (NaN of none), standard deviation (None of one) and number of the finite values."""
    finite = [float(v) for v in values if v is not None and math.isfinite(v)]
    if not finite:
        return math.nan, None, 0
    return statistics.fmean(finite), statistics.stdev(finite) if len(finite) > 1 else None, len(finite)


def plus_minus(mean: float, deviation: float | None, form: str | Callable[[float], str] | None = None) -> str:
    """Mean ± deviation; without a form, the deviation to two digits and the mean to the same place."""
    if deviation is None:
        return formatted(form or number, mean)
    if form in (None, number):
        place = 1 - math.floor(math.log10(deviation)) if deviation else 3
        form = f"{{:,.{max(0, place)}f}}" if place < 6 else "{:.3g}"
    return f"{formatted(form, mean)} ± {formatted(form, deviation)}"


def formatted(form: str | Callable[[Any], str], value: float) -> str:
    return form.format(value) if isinstance(form, str) else form(value)
