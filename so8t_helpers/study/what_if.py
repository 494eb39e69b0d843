"""The what-if curve: what the held-out loss would be, had the gates rotated less far, or farther."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from so8t_helpers.show.style import INK, new_figure
from so8t_helpers.study.figures import colors
from so8t_helpers.study.outcome import higher_is_better
from so8t_helpers.study.results import LABELS, signed
from so8t_helpers.study.stage import Results
from so8t_helpers.study.statistics import LEVEL, Floats


@dataclass(frozen=True)
class Curve:
    """What an arm's rotations are worth at each power, LoRA as it is.

    Attributes:
        powers: (P,) t. change: (seeds, P), the endpoint at t less that at t = 1.
        degrees: the mean principal angle at t = 1, over blocks and seeds.
    """

    powers: Floats
    change: Floats
    degrees: float

    @property
    def interval(self) -> tuple[float, float, float]:
        """What taking the rotations out (t = 0) changes: mean and 95% interval over seeds, by Student's t."""
        values = self.change[:, self.powers == 0.0][:, 0]
        error = values.std(ddof=1) / np.sqrt(len(values))
        half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * error)
        return float(values.mean()), float(values.mean()) - half, float(values.mean()) + half


def curves(results: Results) -> dict[str, Curve]:
    """Return the curve of each arm with gates whose trainings all ended."""
    column, found = _column(results), {}
    for name, arm in results.arms.items():
        frames = [outcome.what_if for outcome in arm.outcomes]
        measured = [frame for frame in frames if frame is not None]
        if arm.diverged or not measured or len(measured) < len(frames):
            continue
        values = np.stack([frame[column].to_numpy() for frame in measured])  # (seeds, P)
        powers = measured[0]["t"].to_numpy()
        trained = powers == 1.0
        degrees = float(np.mean([frame["degrees"][trained].iloc[0] for frame in measured]))
        found[name] = Curve(powers, values - values[:, trained], degrees)
    return found


def _column(results: Results) -> str:
    main = results.study.file.endpoints.main.removeprefix("heldout.")
    return "loss" if main == "best" else main


def figure(results: Results) -> Figure | None:
    """The curves: mean of the seeds and their range as a band; None where no arm has one."""
    found = curves(results)
    if not found:
        return None
    fig, ax = new_figure(height=3.0)
    for name, curve in found.items():
        color, change = colors(results)[name], curve.change
        ax.plot(curve.powers, change.mean(0), "o-", markersize=3, color=color, label=name)
        ax.fill_between(curve.powers, change.min(0), change.max(0), color=color, alpha=0.2, linewidth=0)
    ax.axhline(0.0, color=INK, linewidth=1)
    ax.set(xlabel="t: the trained angles times this", ylabel="change from t = 1")
    ax.set_title(LABELS[f"heldout.{_column(results)}"])
    ax.legend()
    return fig


def said(results: Results) -> str:
    """Say what the rotations are worth to the adapters that were trained with them."""
    parts, sign = [], -1 if higher_is_better(results.study.file.endpoints.main) else 1
    for name, curve in curves(results).items():
        value, low, high = curve.interval
        best = curve.powers[(sign * curve.change.mean(0)).argmin()]
        parts.append(
            f"{name} (angles of {curve.degrees:.2g}° on average): {signed(value)} (95% interval over seeds "
            f"{signed(low)} to {signed(high)}), best at t = {best:g}"
        )
    label = LABELS[f"heldout.{_column(results)}"]
    return f"What taking the rotations out (t = 0) changes of the {label}: {'; '.join(parts)}."
