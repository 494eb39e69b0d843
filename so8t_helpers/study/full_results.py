"""What stages 03 to 05 say of the arms that went through them: answers, files, o_proj, with intervals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from so8t_helpers.evaluate.statistics import confusion, exact_interval, macro_f1
from so8t_helpers.evaluate.summary import indicators
from so8t_helpers.show.wording import short
from so8t_helpers.study.results import rounded, signed
from so8t_helpers.study.stage import Results
from so8t_helpers.study.statistics import Floats, holm, paired_difference

_SHARES = {
    "format": "in format",
    "answer": "answers right",
    "refusal": "refused where due",
    "over_refusal": "refused where not",
}
_F1, _KL, _PERPLEXITY, _O_PROJ = "label F1", "KL from F16", "perplexity over F16's", "o_proj's error"
_OF_ANSWERS = (*_SHARES.values(), _F1)
_ROUNDING = 1e-9  # of a share's standard error


def measures(kept: list[dict[str, Any]]) -> dict[str, tuple[Floats, Floats]]:
    """Return an arm's endpoints: sums by seed and prompt (S, D), and what they are divided by (D,).

    What a file's texts give together, KL and perplexity, and o_proj's error count as one document. Endpoints
    that no prompt has are left out.
    """
    answers = [pd.DataFrame(one["answers"]) for one in kept]
    shares = [indicators(frame) for frame in answers]
    found: dict[str, tuple[Floats, Floats]] = {}
    for column, name in _SHARES.items():
        values = np.stack([frame[column].to_numpy(float) for frame in shares])  # (S, D)
        found[name] = np.nan_to_num(values), np.isfinite(values[0]).astype(float)
    found[_F1] = np.stack([f1_by_prompt(frame) for frame in answers]), np.ones(len(answers[0]))
    files = [(one["quality"]["f16"], one["quality"][one["file"]]) for one in kept]
    found[_KL] = _together([file["kl_mean"] for _, file in files])
    found[_PERPLEXITY] = _together([file["perplexity"] / f16["perplexity"] - 1 for f16, file in files])
    if all(one["o_proj"] is not None for one in kept):
        found[_O_PROJ] = _together([one["o_proj"] for one in kept])
    return {name: pair for name, pair in found.items() if pair[1].sum()}


def _together(values: list[float]) -> tuple[Floats, Floats]:
    return np.array(values)[:, None], np.ones(1)


def f1_by_prompt(answers: pd.DataFrame) -> Floats:
    """Return (D,) numbers whose mean is the macro F1 and whose spread is its error.

    The jackknife's pseudo-values (Tukey 1958), moved to have F1 itself as their mean: how F1 would change
    without each prompt, times as many as there are.
    """
    table = confusion(answers["label"].tolist(), answers["decision"].tolist())
    without = []
    for label, decision in zip(answers["label"], answers["decision"], strict=True):
        without.append(macro_f1(table - confusion([label], [decision])))
    left_out = np.array(without)
    return np.asarray(macro_f1(table) + (len(answers) - 1) * (left_out.mean() - left_out))


def table(results: Results) -> pd.DataFrame:
    """Return every arm's endpoints with their 95% intervals over seeds and prompts, one row an endpoint."""
    columns = {}
    for arm, kept in results.full.items():
        columns[arm] = {name: _cell(name, sums, counts) for name, (sums, counts) in measures(kept).items()}
    return pd.DataFrame(columns).fillna("–").rename_axis("endpoint")


def _cell(name: str, sums: Floats, counts: Floats) -> str:
    found = paired_difference(sums, np.zeros_like(sums), counts)
    values = [found.value, found.low, found.high]
    # Resamples know nothing of what never happened. Of F1 there is no exact interval: it is no share.
    if name == _F1 and found.value in {0.0, 1.0}:
        return f"{100 * found.value:.1f}% (no interval: {'all' if found.value else 'no'} labels are right)"
    if name in _SHARES.values() and found.value in {0.0, 1.0}:
        values[1:] = exact_interval(round(found.value * counts.sum()), int(counts.sum()))
    if name in _OF_ANSWERS:
        value, low, high = (f"{100 * min(max(v, 0.0), 1.0):.1f}%" for v in values)
    elif name == _PERPLEXITY:
        value, low, high = map(signed, values)
    else:
        value, low, high = (short(float(f"{v:.3g}")) for v in values)
    return f"{value} ({low} to {high})"


def differences(results: Results) -> pd.DataFrame:
    """Return every arm against the control, one row an endpoint and arm; none where the control is left out.

    p is corrected by Holm over all rows. So few seeds name no winner. Where all seeds and prompts differ
    alike, as between nothing and all, there is no spread for an interval: p is that of flips of sign.
    """
    if results.control.name not in results.full:
        return pd.DataFrame()
    against = measures(results.full[results.control.name])
    rows, p_values = [], []
    for arm in (arm for arm in results.full if arm != results.control.name):
        for name, (sums, counts) in measures(results.full[arm]).items():
            if name not in against:
                continue
            d = paired_difference(sums, against[name][0], counts)
            alike = name in _OF_ANSWERS and d.error < _ROUNDING
            interval = "none: all alike" if alike else f"{signed(d.low)} to {signed(d.high)}"
            rows.append(
                {"endpoint": name, "arm": arm, "difference": signed(d.value), "95% interval": interval}
            )
            p_values.append(d.exact_p if alike else d.p)
    frame = pd.DataFrame(rows)
    for column, found in (("p", p_values), ("p corrected", holm(p_values))):
        frame[column] = [rounded(p) for p in found]
    return frame


def said(results: Results) -> str:
    """Say what was asked, of what, by what, what so few seeds cannot say, and which arms did not get here."""
    named = results.study.file.full.arms
    if not named:
        return "This study names no arm for it."
    lost = [
        f"{arm} (seed {', '.join(map(str, results.arms[arm].diverged))})"
        for arm in named
        if arm not in results.full
    ]
    left_out = f"Left out, since trainings diverged: {', '.join(lost)}." if lost else ""
    if not results.full:
        return left_out
    kept = [one for some in results.full.values() for one in some]
    seeds, prompts = len(next(iter(results.full.values()))), len(kept[0]["answers"])
    by_engine: dict[str, list[str]] = {}
    for arm, some in results.full.items():
        for engine in dict.fromkeys(one["engine"] for one in some):
            by_engine.setdefault(engine, []).append(arm)
    engines = ", ".join(sorted(by_engine))
    if len(by_engine) > 1:
        each = "; ".join(f"{engine}: {', '.join(arms)}" for engine, arms in sorted(by_engine.items()))
        engines = f"more than one engine, so some of what differs may be theirs ({each})"
    return (
        f"{prompts} held-out prompts answered by the {kept[0]['file']} file of each of {seeds} trainings an "
        f"arm, in {engines}. {seeds} seeds name no winner: the intervals say what the arms may differ by. "
        f"{left_out}"
    ).rstrip()
