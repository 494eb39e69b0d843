"""Figures of all rotations of a run: drift, distance, and their angles against random rotations'."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from so8t_helpers.show.style import COLORS, INK, SEQUENTIAL, new_figure
from so8t_helpers.so8 import rotation
from so8t_helpers.so8.history import AngleHistory

_NOTE: dict[str, Any] = {"textcoords": "offset points", "fontsize": 9}


def drift_heatmap(history: AngleHistory) -> Figure:
    """Mean drift of each layer's principal angles since the start: layers up, steps to the right."""
    fig, ax = new_figure(height=2.2 + 0.07 * len(history.layers))
    draw_drift_heatmap(ax, history)
    return fig


def draw_drift_heatmap(ax: Axes, history: AngleHistory) -> None:
    """Draw `drift_heatmap` into axes."""
    rows, columns = len(history.layers), len(history.steps)
    # One pixel a cell, kept as a picture inside the SVG: a thousand snapshots stay small.
    image = ax.imshow(
        history.drift.T,
        aspect="auto",
        origin="lower",
        cmap=SEQUENTIAL,
        interpolation="none",
        extent=(-0.5, columns - 0.5, -0.5, rows - 0.5),
    )
    steps, layers = _spread(columns, 6), _spread(rows, 9)  # by name: snapshots need not be equally far apart
    ax.set_xticks(steps, [f"{history.steps[i]:,}" for i in steps])
    ax.set_yticks(layers, [str(history.layers[i]) for i in layers])
    ax.grid(visible=False)
    ax.set(title="Drift of the principal angles", xlabel="optimizer step", ylabel="layer")
    bar = ax.figure.colorbar(image, ax=ax, pad=0.02)
    bar.set_label("mean |θ − θ(start)|, degrees")
    bar.outline.set_visible(False)


def drift_distribution(history: AngleHistory) -> Figure:
    """How far single blocks' angles moved: spread over the steps, and at the end by layer."""
    fig, (left, right) = new_figure(height=3.1, ncols=2)
    moved = np.abs(history.degrees - history.degrees[0])  # (S, L, B, 4)
    flat = moved.reshape(len(history.steps), -1)
    for percents, alpha in (((0, 100), 0.12), ((5, 95), 0.22), ((25, 75), 0.35)):
        lower, upper = np.percentile(flat, percents, axis=1)
        left.fill_between(history.steps, lower, upper, color=COLORS["now"], alpha=alpha, linewidth=0)
    left.plot(history.steps, np.median(flat, axis=1), color=COLORS["now"])
    for percent, name in ((100, "largest"), (95, "95%"), (50, "median")):
        end = (float(history.steps[-1]), float(np.percentile(flat[-1], percent)))
        left.annotate(name, end, (4, 0), va="center", annotation_clip=False, **_NOTE)
    left.set(title="Over the training", xlabel="optimizer step", ylabel="|θ − θ(start)| (degrees)")
    by_layer = moved[-1].reshape(len(history.layers), -1)
    lower, middle, upper = np.percentile(by_layer, [5, 50, 95], axis=1)
    right.vlines(history.layers, lower, upper, color=COLORS["now"], alpha=0.35, linewidth=4)
    right.plot(history.layers, middle, "o", color=COLORS["now"], label="median")
    right.plot(history.layers, by_layer.max(axis=1), "^", color=COLORS["accent_2"], label="largest")
    right.set(title="At the end, by layer")
    _finish_layers(right, float(moved.max()))
    left.set_ylim(right.get_ylim())
    return fig


def angle_distribution(history: AngleHistory, snapshot: int = -1) -> Figure:
    """All principal angles at a snapshot against the start and against Haar-random rotations."""
    fig, ax = new_figure(height=3.2)
    AngleDistribution(ax, history).update(snapshot)
    return fig


class AngleDistribution:
    """Histogram of all principal angles, on a logarithmic scale since the start is so narrow.

    Attributes:
        artists: what `update` changes.
    """

    bins = np.arange(0.0, 181.0, 2.0)

    def __init__(self, ax: Axes, history: AngleHistory):
        self.history = history
        start = self._density(0)
        ax.stairs(start, self.bins, fill=True, color=COLORS["start"], alpha=0.45, label="start")
        self.now = ax.stairs(start, self.bins, color=COLORS["now"], linewidth=1.6, label="at this step")
        theta = torch.linspace(0, torch.pi, 361, dtype=torch.float64)
        haar = rotation.haar_angle_density(theta).numpy() * np.pi / 180
        ax.plot(np.rad2deg(theta.numpy()), haar, color=COLORS["haar"], label="_")
        ax.text(90, haar[180] * 1.6, "random rotation (Haar)", ha="center", color=INK, fontsize=9)
        ax.axvline(180, color=COLORS["edge"], linewidth=1.2, linestyle="--")
        where = ax.get_xaxis_transform()
        ax.annotate("edge θ = π", (180, 0.98), (-4, 0), xycoords=where, ha="right", va="top", **_NOTE)
        peak = float(max(self._density(s).max() for s in range(len(history.steps))))
        one_angle = 1 / (history.angles[0].size * 2.0)
        ax.set(yscale="log", ylim=(min(one_angle, 1e-3) / 2, peak * 4))
        ax.set(xlim=(0, 183), xticks=range(0, 181, 30), xlabel="principal angle θ (degrees)")
        ax.set(title="All principal angles", ylabel="density (1/degree)")
        ax.legend(loc="upper center")
        self.artists = [self.now]

    def _density(self, snapshot: int) -> np.ndarray:
        counts, _ = np.histogram(self.history.degrees[snapshot], self.bins)
        return counts / counts.sum() / np.diff(self.bins)

    def update(self, snapshot: int) -> None:
        """Show another snapshot."""
        self.now.set_data(self._density(snapshot))


def geodesic_by_layer(history: AngleHistory, snapshot: int = -1) -> Figure:
    """How far each layer's rotations are from their start: quartiles and the block that moved most."""
    fig, ax = new_figure(height=3.0)
    GeodesicByLayer(ax, history).update(snapshot)
    return fig


class GeodesicByLayer:
    """Geodesic distance from the start: one line of medians, one of maxima, over the layers.

    Attributes:
        artists: what `update` changes.
    """

    def __init__(self, ax: Axes, history: AngleHistory):
        self.history = history
        nothing = np.zeros(len(history.layers))
        self.band = ax.fill_between(
            history.layers, nothing, nothing, color=COLORS["now"], alpha=0.25, linewidth=0
        )
        (self.median,) = ax.plot(history.layers, nothing, "o-", color=COLORS["now"], label="median")
        (self.largest,) = ax.plot(history.layers, nothing, "^:", color=COLORS["accent_2"], label="most moved")
        ax.set(title="Geodesic distance from the start", ylabel=r"$\Vert\log(R_0^\top R_t)\Vert$ (rad)")
        _finish_layers(ax, float(history.distance.max()), columns=2)
        self.artists = [self.band, self.median, self.largest]

    def update(self, snapshot: int) -> None:
        """Show another snapshot."""
        distance = self.history.distance[snapshot]  # (L, B)
        lower, middle, upper = np.percentile(distance, [25, 50, 75], axis=1)
        self.median.set_ydata(middle)
        self.largest.set_ydata(distance.max(axis=1))
        self.band.set_data(self.history.layers, lower, upper)


def _finish_layers(ax: Axes, largest: float, columns: int = 1) -> None:
    """Finish axes over the layers: whole numbers, and room for the legend above the largest value."""
    ax.set(xlabel="layer", ylim=(0, max(largest * 1.3, 1e-6)))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(loc="upper left", ncols=columns)


def _spread(count: int, most: int) -> np.ndarray:
    """Return at most `most` indices below `count`, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))
