"""What is not looked for, and how well the rest was found when benchmarks/personal_data.py measured it."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Literal

NOT_COVERED = (
    "addresses without a house number, or with a single one and no word that says address; handles (@name) "
    "without a service's name beside them; numbers of documents and accounts whose cue word is missing or "
    "stands in another part of the record; dates of birth that no word says are one, and those before 1900; "
    "other languages than Japanese and English; anything in pictures or sound"
)
_HOW = {"cues": "that stand beside a title, a label or a given name", "ner": "that GiNZA or such a cue finds"}


def not_covered(names: Literal["off", "cues", "ner"]) -> str:
    """Return what the rules do not find under `dataset.personal_names`, with the measured figures."""
    measured = json.loads(
        files("so8t_helpers.dataset.personal_data").joinpath("measured.json").read_text(encoding="utf-8")
    )
    if names == "off":
        people = "names of people (dataset.personal_names)"
    else:
        people = f"names of people but those {_HOW[names]} ({_figures(measured[names])})"
    return f"{people}; {NOT_COVERED}. What is looked for: {_figures(measured['kinds'])}"


def _figures(measured: dict[str, float]) -> str:
    return (
        f"precision {measured['precision']:.2f} and recall {measured['recall']:.2f} on "
        f"{measured['values']} values that were held back, {measured['lines_per_s']:,} lines/s in one process"
    )
