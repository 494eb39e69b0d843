"""What 06_study's notebook shows: arms and hypotheses, forest plot, learning curves, rates tried, gates."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from so8t_helpers.run.origin import public_name
from so8t_helpers.show.style import GREY, INK, SERIES, new_figure
from so8t_helpers.show.wording import words
from so8t_helpers.study.plan import Range, Study
from so8t_helpers.study.registration import changes
from so8t_helpers.study.results import LABELS, Comparison
from so8t_helpers.study.stage import Results


def arms(study: Study) -> pd.DataFrame:
    """Return what each arm is, before anything was trained."""
    rows = {
        name: {
            "hypothesis": arm.hypothesis,
            "set": ", ".join(f"{key} {words(value)}" for key, value in arm.set.items()) or "as the profile",
            "tuned": ", ".join(f"{key} {_space(space)}" for key, space in arm.tune.items()) or "nothing",
        }
        for name, arm in study.file.arms.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("arm")


def _space(space: Range | list[object]) -> str:
    return f"{words(space.low)} to {words(space.high)}" if isinstance(space, Range) else words(space)


def design(results: Results) -> pd.DataFrame:
    """Return how the arms are compared, one fact a row."""
    file, settings = results.study.file, results.study.settings
    rows = {
        "profile": settings.profile,
        "base": public_name(settings.model.base),
        "control": file.control,
        "trials of an arm that tunes": file.trials,
        "tuned on": f"{file.tuning:.0%} of the samples, which no training learns from; seed {file.seed}",
        "compared on": f"held-out samples, which tuning never saw; seeds {words(results.study.seeds)}",
        "main endpoint": LABELS[file.endpoints.main],
        "other endpoints": ", ".join(LABELS[name] for name in file.endpoints.others) or "none",
    }
    return pd.DataFrame(rows.items(), columns=["what", "setting"])


def registered(results: Results) -> pd.DataFrame:
    """Return what was changed after the first registration, one change a row."""
    rows = [(c.date, c.key, words(c.before), words(c.after)) for c in changes(results.registrations)]
    return pd.DataFrame(rows, columns=["when", "what", "before", "after"])


def colors(results: Results) -> dict[str, str]:
    """Return a colour for each arm, the control's grey, the same in all figures."""
    others = {name: SERIES[i % (len(SERIES) - 1)] for i, name in enumerate(results.study.others)}
    return {results.control.name: GREY} | others


def forest(results: Results, comparisons: list[Comparison]) -> Figure:
    """Every arm's difference from the control with its interval, one panel an endpoint.

    A filled mark is a difference that interval, corrected p and flips of sign agree on; each seed's own
    difference is a small stroke.
    """
    endpoints = list(dict.fromkeys(c.endpoint for c in comparisons))
    columns, names = min(2, max(len(endpoints), 1)), results.study.others
    rows = math.ceil(max(len(endpoints), 1) / columns)
    height = rows * (1.0 + 0.42 * len(names))
    fig, axes = new_figure(height=height, nrows=rows, ncols=columns, squeeze=False, sharey=True)
    palette = colors(results)
    for ax, endpoint in zip(axes.flat, endpoints, strict=False):
        for c in (c for c in comparisons if c.endpoint == endpoint):
            place, color, d = names.index(c.arm), palette[c.arm], c.difference
            ax.plot([d.low, d.high], [place, place], color=color, linewidth=2)
            ax.plot(_by_seed(results, c), [place] * results.study.file.seeds, "|", color=INK, markersize=7)
            fill = "none" if c.verdict == "undecided" else "full"
            ax.plot(d.value, place, "o", color=color, markersize=8, fillstyle=fill)
        if not any(c.difference.error for c in comparisons if c.endpoint == endpoint):
            ax.set_xlim(-1, 1)  # all the same: no scale of rounding errors
        ax.axvline(0.0, color=INK, linewidth=1)
        ax.set_title(LABELS[endpoint], fontsize=10.5)
        ax.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.4, -0.6))
        ax.locator_params(axis="x", nbins=5)
        ax.grid(visible=False, axis="y")
    for ax in axes.flat[len(endpoints) :]:
        ax.set_axis_off()
    fig.supxlabel(f"difference from {results.control.name}", fontsize=10.5)
    return fig


def _by_seed(results: Results, c: Comparison) -> list[float]:
    arms = (results.arms[c.arm].outcomes, results.control.outcomes)
    return [a.value(c.endpoint) - b.value(c.endpoint) for a, b in zip(*arms, strict=True)]


def learning_curves(results: Results) -> Figure:
    """Held-out loss over the steps: the mean of the seeds, and their range as a band."""
    main = results.study.file.endpoints.main.removeprefix("heldout.")
    fig, ax = new_figure(height=3.4)
    for name, color in colors(results).items():
        looks = [outcome.looks for outcome in results.arms[name].outcomes if not outcome.diverged]
        if not looks:
            continue
        column = main if main in looks[0] else "loss"
        values = np.stack([frame[column].to_numpy() for frame in looks])  # (seeds, looks)
        steps = looks[0]["step"]
        ax.plot(steps, values.mean(0), "o-", markersize=3, color=color, label=name)
        ax.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.2, linewidth=0)
        label = LABELS.get(f"heldout.{column}", column)
        ax.set(
            xlabel="optimizer step", ylabel="share" if "right" in column else "nats per token", title=label
        )
    ax.legend()
    return fig


def tried(results: Results) -> Figure:
    """What tuning tried: each value against the main endpoint on the tuning split, one panel a setting."""
    keys = list(dict.fromkeys(key for arm in results.arms.values() for key in arm.chosen.values))
    fig, axes = new_figure(height=3.0, ncols=max(len(keys), 1), squeeze=False, sharey=True)
    for ax, key in zip(axes[0], keys, strict=False):
        for name, color in colors(results).items():
            arm = results.arms[name]
            if key not in arm.chosen.values:
                continue
            pairs = sorted((t.values[key], t.value) for t in arm.trials if math.isfinite(t.value))
            if not pairs:  # all diverged
                continue
            ax.plot(*zip(*pairs, strict=True), "o-", linewidth=0.8, color=color, label=name)
            ax.plot(
                arm.chosen.values[key], arm.chosen.value, "o", color=color, markersize=11, fillstyle="none"
            )
            space = results.study.file.arms[name].tune[key]
            if isinstance(space, Range):
                ax.set_xscale("log" if space.log else "linear")
                ax.set_xlim(*((space.low / 1.2, space.high * 1.2) if space.log else (space.low, space.high)))
                ax.xaxis.set_minor_formatter(lambda _value, _: "")
        ax.set_xlabel(key)
    main = LABELS[results.study.file.endpoints.main]
    axes[0, 0].set(ylabel=f"{main}\non the tuning split")
    handles, names = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, names, loc="outside upper left", ncols=3)
    return fig


def gates(results: Results) -> Figure | None:
    """How far each gated arm's angles moved over the steps, and in which layers; None where no arm has gates.

    Means over blocks and seeds; bands are the range of the seeds.
    """
    histories = {
        name: [history for outcome in arm.outcomes if (history := outcome.angles) is not None]
        for name, arm in results.arms.items()
    }
    histories = {name: found for name, found in histories.items() if found}
    if not histories:
        return None
    fig, (over_steps, by_layer) = new_figure(height=3.0, ncols=2)
    palette = colors(results)
    for name, found in histories.items():
        color = palette[name]
        drift = np.stack([history.drift for history in found])  # (seeds, snapshots, layers), degrees
        for ax, x, values in (
            (over_steps, found[0].steps, drift.mean(2)),
            (by_layer, found[0].layers, drift[:, -1]),
        ):
            ax.plot(x, values.mean(0), "o-", markersize=3, color=color, label=name)
            ax.fill_between(x, values.min(0), values.max(0), color=color, alpha=0.2, linewidth=0)
    over_steps.set(title="Drift of the angles", xlabel="optimizer step", ylabel="degrees")
    by_layer.set(title="At the end, by layer", xlabel="layer")
    by_layer.xaxis.get_major_locator().set_params(integer=True)
    over_steps.legend()
    return fig
