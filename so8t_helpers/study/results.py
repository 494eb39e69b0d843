"""What a study's trainings come to: every arm against the control, and the sentence that says it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from so8t_helpers.show.wording import short
from so8t_helpers.study import statistics
from so8t_helpers.study.outcome import higher_is_better
from so8t_helpers.study.plan import Endpoint, Study
from so8t_helpers.study.stage import ArmResult, Results
from so8t_helpers.study.statistics import SIGNIFICANT, Difference

LABELS = {
    "heldout.loss": "held-out loss",
    "heldout.thinking": "held-out loss, thinking",
    "heldout.decision": "held-out loss, decision",
    "heldout.final": "held-out loss, final part",
    "heldout.decision_right": "right decisions",
    "heldout.best": "held-out loss at its best",
}


@dataclass(frozen=True)
class Comparison:
    """One arm against the control on one endpoint.

    Attributes:
        corrected_p: p after Holm, over all comparisons of the study.
        detectable: the difference that the study would have found in 8 of 10 repetitions.
    """

    arm: str
    endpoint: Endpoint
    difference: Difference
    corrected_p: float
    detectable: float

    @property
    def verdict(self) -> str:
        """Where interval, corrected p and flips of sign agree "better" or "worse", else "undecided".

        The flips assume nothing of how seeds are spread, which few seeds do not tell: with fewer than six no
        winner is named.
        """
        found = self.difference
        if found.inside or max(self.corrected_p, found.exact_p) >= SIGNIFICANT:
            return "undecided"
        return "better" if (found.value > 0) == higher_is_better(self.endpoint) else "worse"


def compare(results: Results) -> list[Comparison]:
    """Compare every arm with the control on every endpoint that the data have, the main one first.

    Arms of which a training diverged are left out: they have no difference to speak of.
    """
    study = results.study
    found: list[tuple[str, Endpoint, Difference]] = []
    for endpoint in study.file.endpoints.all:
        for name in study.others:
            arm = results.arms[name]
            if arm.diverged or results.control.diverged:
                continue
            sums, counts = _stacked(arm, endpoint)
            against, _ = _stacked(results.control, endpoint)
            if counts.sum():  # data without labels decide nothing
                difference = statistics.paired_difference(sums, against, counts, study.file.seed)
                found.append((name, endpoint, difference))
    corrected = statistics.holm([difference.p for *_, difference in found])
    comparisons = []
    for (name, endpoint, d), p in zip(found, corrected, strict=True):
        by_t = statistics.detectable(d.error, d.freedom, len(found))
        most = max(by_t, statistics.detectable_by_flips(d, study.file.seeds))
        comparisons.append(Comparison(name, endpoint, d, p, most))
    return comparisons


def _stacked(arm: ArmResult, endpoint: str) -> tuple[np.ndarray, np.ndarray]:
    """Sums by seed and document (S, D), and what they are divided by (D,)."""
    pairs = [outcome.documents(endpoint) for outcome in arm.outcomes]
    return np.stack([sums for sums, _ in pairs]), pairs[0][1]


def answer(results: Results, comparisons: list[Comparison]) -> str:
    """Say in Markdown what came out on the main endpoint, without naming a winner that is none."""
    study, main = results.study, results.study.file.endpoints.main
    parts = [_sentence(c, study) for c in comparisons if c.endpoint == main]
    parts += [
        f"{arm.name}: training diverged with seed {', '.join(map(str, arm.diverged))}"
        for arm in results.arms.values()
        if arm.diverged
    ]
    said = []
    for word in ("better", "worse"):
        by_arm: dict[str, list[str]] = {}
        for c in comparisons:
            if c.verdict == word:
                by_arm.setdefault(c.arm, []).append(LABELS[c.endpoint])
        arms = [f"{arm} ({'; '.join(endpoints)})" for arm, endpoints in by_arm.items()]
        said += [f"{word} than {study.file.control}: {', '.join(arms)}"] if arms else []
    none = "no difference was found that this study could tell from chance"
    head = "; ".join(said) or (none if comparisons else "nothing could be compared")
    head = f"{head[0].upper()}{head[1:]}."
    if not parts:
        return f"**{head}**"
    return (
        f"**{head}** On the main endpoint, {LABELS[main]}, against {study.file.control}: {'; '.join(parts)}."
    )


def _sentence(c: Comparison, study: Study) -> str:
    d = c.difference
    text = f"{c.arm} {signed(d.value)} (95% interval {signed(d.low)} to {signed(d.high)}"
    p = rounded(c.corrected_p)
    text += f", p {p if p.startswith('<') else f'= {p}'} after correction)"
    if c.verdict == "undecided":
        text += ", undecided"
        if math.isfinite(c.detectable):
            text += f": a difference of {short(c.detectable)} would have been found in 8 of 10 studies"
    return text


def signed(value: float) -> str:
    """A difference with its sign, in three digits: "+0.012", "−1.2×10⁻⁵"."""
    sign = "−" if value < 0 else "+"
    return f"{sign}{short(float(f'{abs(value):.3g}'))}"


def rounded(p: float) -> str:
    """A p value in two digits: "0.031", "< 0.001"."""
    return f"{p:.2g}" if p >= 0.001 else "< 0.001"


def caution(study: Study) -> str:
    """Say what so few seeds can and cannot show."""
    least, count = statistics.smallest_p(study.file.seeds), study.file.seeds
    text = f"With {count} seeds the smallest p that flips of sign can give is {rounded(least)}"
    if least >= SIGNIFICANT:
        return f"{text}: it cannot reach {SIGNIFICANT}, so this study names no winner; that takes 6 seeds."
    return (
        f"{text}, before any correction. The intervals speak of the settings that tuning chose: how lucky "
        "tuning was they do not hold."
    )


def table(results: Results, comparisons: list[Comparison]) -> pd.DataFrame:
    """One row an arm: what was trained, and the main endpoint against the control."""
    main = results.study.file.endpoints.main
    by_arm = {c.arm: c for c in comparisons if c.endpoint == main}
    shown = ("difference", "95% interval", "p corrected", "detectable")
    rows = {}
    for name, arm in results.arms.items():
        values = [outcome.value(main) for outcome in arm.outcomes]
        parameters = arm.outcomes[0].facts["parameters"]
        rows[name] = {
            "LoRA": parameters["lora"],
            "gates": parameters["gates"],
            "tokens": arm.outcomes[0].facts["tokens"],
            "endpoint": "diverged" if arm.diverged else f"{np.mean(values):.4f}",
            **{key: value for key, value in _columns(by_arm.get(name)).items() if key in shown},
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("arm")


def endpoints_table(comparisons: list[Comparison]) -> pd.DataFrame:
    """One row a comparison."""
    rows = [
        {"endpoint": LABELS[c.endpoint], "arm": c.arm, **_columns(c), "verdict": c.verdict}
        for c in comparisons
    ]
    return pd.DataFrame(rows)


def _columns(c: Comparison | None) -> dict[str, str]:
    if c is None:
        names = ("difference", "95% interval", "p", "p corrected", "p by flips", "detectable")
        return dict.fromkeys(names, "–")
    d = c.difference
    return {
        "difference": signed(d.value),
        "95% interval": f"{signed(d.low)} to {signed(d.high)}",
        "p": rounded(d.p),
        "p corrected": rounded(c.corrected_p),
        "p by flips": rounded(d.exact_p),
        "detectable": short(float(f"{c.detectable:.2g}")) if math.isfinite(c.detectable) else "none",
    }


def costs(results: Results) -> pd.DataFrame:
    """Time and memory of an arm: medians over the seeds."""
    rows = {
        name: {
            "seconds a step": float(np.median([o.facts["seconds_per_step"] for o in arm.outcomes])),
            "memory (GiB)": float(np.median([o.facts["memory_gib"] for o in arm.outcomes])),
        }
        for name, arm in results.arms.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("arm")


def chosen(results: Results) -> pd.DataFrame:
    """What tuning chose for each arm, and the profile's own value beside it."""
    rows = [
        {
            "arm": name,
            "setting": key,
            "own": arm.trials[0].values[key],
            "chosen": value,
            "trials": len(arm.trials),
            "at the edge": "yes" if _at_edge(results.study, name, key, value) else "no",
        }
        for name, arm in results.arms.items()
        for key, value in arm.chosen.values.items()
    ]
    return pd.DataFrame(rows)


def _at_edge(study: Study, arm: str, key: str, value: object) -> bool:
    """Whether a chosen number lies so near its range's end that a better one may lie outside."""
    space = study.file.arms[arm].tune[key]
    if isinstance(space, list) or not isinstance(value, int | float):
        return False
    low, high, here = (np.log(v) if space.log else v for v in (space.low, space.high, value))
    return bool(min(here - low, high - here) < 0.1 * (high - low))
