"""Worked problems as GSM8K writes them (Cobbe et al. 2021): the steps, then `#### ` and their result."""

from __future__ import annotations

import re

_RESULT = re.compile(r"\n#### *(-?\d[\d,]*(?:\.\d+)?)\Z")
# What a calculator was to fill in for the model while it writes: "48/2 = <<48/2=24>>24".
_CALCULATION = re.compile(r"<<[^<>]*>>")


def split_solution(answer: str) -> tuple[str, str] | None:
    """Return the steps, without the calculator's marks, and the result; None for another form of answer."""
    if "\n####" not in answer or (result := _RESULT.search(answer)) is None:
        return None
    return _CALCULATION.sub("", answer[: result.start()]).strip(), result[1]
