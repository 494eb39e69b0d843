"""Values as a reader takes them in: no more digits than tell something, no exponents of a machine's."""

from __future__ import annotations

import math
import re
from numbers import Integral, Real
from typing import Any

# A number such as 4.2e-05, alone or in a sentence.
_MACHINE = re.compile(r"(?<![\w.])(\d(?:\.\d+)?)e([+-]?\d+)(?![\w.]*\w)")
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def short(value: float) -> str:
    """Return a number in about four digits: "0.1234", "1,304", "4.24×10⁻⁵"; "–" for one that is none."""
    if math.isnan(value):
        return "–"
    if abs(value) >= 1000:
        return f"{value:,.0f}" if math.isfinite(value) else str(value)
    if value == 0 or abs(value) >= 1e-4:
        return f"{value:.4g}"
    return plain(f"{value:.3g}")


def words(value: Any) -> str:
    """Put a value into words: "yes", "1,304", "0.1234", "a, b"; "–" where there is none."""
    if value is None or isinstance(value, bool):
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, Integral):
        return f"{value:,}"
    if isinstance(value, Real):
        return short(float(value))
    if isinstance(value, list | tuple):
        return ", ".join(words(item) for item in value) or "–"
    return str(value)


def plain(text: str) -> str:
    """Write a machine's exponents as powers of ten: "no more than 4.2e-05" has 4.2×10⁻⁵ then."""
    return _MACHINE.sub(lambda m: f"{m[1]}×10{str(int(m[2])).translate(_RAISED)}", text)
