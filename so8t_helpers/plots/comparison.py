"""Figures that lay runs over each other: the same quantity, one colour a run."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from so8t_helpers.plots import style

COLUMNS = {"task_loss": "task loss (nats a token)", "pet_loss": "PET loss"}


def run_colors(names: list[str]) -> dict[str, str]:
    """Return a colour for each run, the same in all figures of one page."""
    return {name: style.SERIES[i % len(style.SERIES)] for i, name in enumerate(names)}


def losses(metrics: Mapping[str, pd.DataFrame]) -> Figure:
    """Task loss and PET loss over the optimizer steps, one line a run: the median of a twentieth of it."""
    fig, axes = style.new_figure(height=3.4, ncols=2)
    colors = run_colors(list(metrics))
    for ax, (column, label) in zip(axes, COLUMNS.items(), strict=True):
        for name, frame in metrics.items():
            window = max(1, len(frame) // 20)
            smooth = frame[column].rolling(window, center=True, min_periods=1).median()
            ax.plot(frame["step"], smooth, color=colors[name], label=name)
        ax.set(xlabel="optimizer step", title=label)
    style.log_where_wide(axes[0], [frame["task_loss"] for frame in metrics.values()])
    _name_runs(fig, axes[0])
    return fig


def drift(angles: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Mean distance of the principal angles from their start, in radians, over the steps.

    Args:
        angles: for each run its steps (S,) and angles (S, layers, blocks, 4).
    """
    fig, ax = style.new_figure(height=3.2)
    colors = run_colors(list(angles))
    for name, (steps, theta) in angles.items():
        moved = np.abs(theta - theta[:1]).mean(axis=(1, 2, 3))
        ax.plot(steps, moved, color=colors[name], label=name)
    ax.set(xlabel="optimizer step", ylabel="mean |θ − θ at the start| (rad)")
    _name_runs(fig, ax)
    return fig


def shares(scores: Mapping[str, Mapping[str, Mapping[str, float]]], key: str, label: str) -> Figure:
    """One share of the evaluation for each model of each run, as dots on one axis.

    Args:
        scores: run -> model -> scores.
        key: such as "answer".
        label: what it is called.
    """
    models = list(dict.fromkeys(model for run in scores.values() for model in run))
    fig, ax = style.new_figure(height=0.9 + 0.42 * len(models))
    colors = run_colors(list(scores))
    spread = np.linspace(-0.22, 0.22, len(scores)) if len(scores) > 1 else [0.0]
    for offset, (name, run) in zip(spread, scores.items(), strict=True):
        rows = [i for i, model in enumerate(models) if run.get(model, {}).get(key) is not None]
        values = [100 * run[models[i]][key] for i in rows]
        ax.plot(values, np.array(rows) + offset, "o", color=colors[name], label=name)
    ax.set(yticks=range(len(models)), yticklabels=models, xlabel=f"{label} (%)", xlim=(-3, 103))
    ax.set_ylim(len(models) - 0.5, -0.5)
    _name_runs(fig, ax)
    return fig


def _name_runs(fig: Figure, ax: Axes) -> None:
    """One legend above all panels: lines of several runs end too near each other for labels of their own."""
    handles, labels = ax.get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper left", ncols=min(3, len(labels)))
