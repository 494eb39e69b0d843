"""Figures that follow a slider: six views of a run's rotations, and what other powers of them would do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from so8t_helpers.explore.blitting import Blitted
from so8t_helpers.explore.block import AngleWay, RotationMatrix, UnitCircle
from so8t_helpers.show.style import COLORS, DIVERGING, GREY, new_figure
from so8t_helpers.so8.figures import AngleDistribution, GeodesicByLayer, draw_drift_heatmap
from so8t_helpers.so8.history import AngleHistory


class ExplorerFigure(Blitted):
    """One block among all the rotations of its run; `others` are runs that get the same axes."""

    def __init__(self, history: AngleHistory, others: Sequence[AngleHistory] = ()):
        self.history = history
        figure, axes = new_figure(width=11.5, height=6.4, ncols=3, nrows=2)
        self._matrix = RotationMatrix(axes[0, 0])
        self._circle = UnitCircle(axes[0, 1])
        self._way = AngleWay(axes[0, 2], history)
        draw_drift_heatmap(axes[1, 0], history)
        (self._cross,) = axes[1, 0].plot([], [], "P", color=COLORS["edge"], mec="white", ms=10)
        self._distribution = AngleDistribution(axes[1, 1], history)
        self._geodesic = GeodesicByLayer(axes[1, 2], history)
        (self._chosen,) = axes[1, 2].plot([], [], "P", color=COLORS["edge"], mec="white", ms=10)
        together = [history, *others]
        axes[0, 2].set_ylim(0, max(float(run.degrees.max()) for run in together) * 1.05)
        axes[1, 0].get_images()[0].set_clim(0, max(float(run.drift.max()) for run in together) or 1e-6)
        axes[1, 2].set_ylim(0, max(float(run.distance.max()) for run in together) * 1.3 or 1e-6)
        parts = (self._matrix, self._circle, self._way, self._distribution, self._geodesic)
        moving = [artist for part in parts for artist in part.artists]
        super().__init__(figure, [*moving, self._cross, self._chosen])

    def update(self, snapshot: int, layer: int, block: int) -> None:
        """Show another snapshot, layer (index into `history.layers`) or block."""
        history = self.history
        self._matrix.update(history.matrix(snapshot, layer, block))
        self._circle.update(history.angles[snapshot, layer, block], history.angles[0, layer, block])
        self._way.update(snapshot, layer, block)
        self._cross.set_data([snapshot % len(history.steps)], [layer])
        self._distribution.update(snapshot)
        self._geodesic.update(snapshot)
        self._chosen.set_data([history.layers[layer]], [history.distance[snapshot, layer, block]])


# Column of the measurements: title, axis, factor.
CURVES = {
    "change": ("Change of o_proj since t = 0", "‖W(t) − W(0)‖ / ‖W(0)‖ (%)", 100.0),
    "quantisation_error": ("4-bit error of o_proj", "‖Q(W) − W‖ / ‖W‖ (%)", 100.0),
    "perplexity": ("Held-out perplexity", "perplexity", 1.0),
}
SHOWN_ROWS = 24  # outputs of o_proj in the picture of its change


def curves(measured: pd.DataFrame) -> Figure:
    """What all gates at R(t) do, over t, as `TurnedModel.measure` found it."""
    fig, axes = new_figure(width=10.5, height=2.9, ncols=3)
    for ax, column in zip(axes, CURVES, strict=True):
        _draw_curve(ax, measured, column)
    return fig


def summary(measured: pd.DataFrame) -> str:
    """Say in a sentence what switching the gates off and doubling them does to the held-out perplexity."""
    at = measured.groupby("t")["perplexity"].first()
    return (
        f"Held-out perplexity is {at[1.0]:.3f} as trained, {at[0.0]:.3f} with the gates off "
        f"and {at[2.0]:.3f} with them doubled."
    )


def _draw_curve(ax: Axes, measured: pd.DataFrame, column: str) -> None:
    """Draw every layer faintly and their mean on top; t = 1 is marked as trained."""
    title, label, _ = CURVES[column]
    table = _table(measured, column)
    mean = table.mean(axis=1)
    if column != "perplexity":
        ax.plot(table.index, table, color=GREY, alpha=0.4, linewidth=0.8)
    ax.plot(mean.index, mean, color=COLORS["now"])
    ax.plot([1.0], [mean.loc[1.0]], "o", color=COLORS["now"])
    ax.annotate("trained", (1.0, mean.loc[1.0]), (0, 7), textcoords="offset points", ha="center", fontsize=9)
    ax.set(title=title, xlabel="t", ylabel=label, xticks=(0, 0.5, 1, 1.5, 2))
    ax.margins(y=0.15)


def _table(measured: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return one measurement with a row a t and a column a layer, in the units of its axis."""
    return measured.pivot_table(index="t", columns="layer", values=column) * CURVES[column][2]


class WhatIfFigure(Blitted):
    """One block at any t, and where that t stands on the measured curves."""

    def __init__(self, measured: pd.DataFrame):
        self.measured = [_table(measured, column).stack().to_dict() for column in CURVES]
        figure, axes = new_figure(width=11.5, height=6.0, ncols=3, nrows=2)
        self._matrix = RotationMatrix(axes[0, 0])
        axes[0, 0].set_title("R(t) = exp(tA)")
        self._circle = UnitCircle(axes[0, 1], hollow="t = 1")
        self._change = axes[0, 2].imshow(np.zeros((SHOWN_ROWS, 8)), cmap=DIVERGING, aspect="auto")
        axes[0, 2].grid(visible=False)
        axes[0, 2].set(title="W(t) − W(0), the block's columns", xlabel="input", ylabel="output")
        bar = figure.colorbar(self._change, ax=axes[0, 2], pad=0.02)
        bar.outline.set_visible(False)
        limit = float(measured["largest_change"].max())
        self._change.set_clim(-limit, limit)
        self._marks: list[tuple[Line2D, Line2D]] = []
        for ax, column in zip(axes[1], CURVES, strict=True):
            _draw_curve(ax, measured, column)
            (cross,) = ax.plot([], [], "P", color=COLORS["edge"], mec="white", ms=11)
            self._marks.append((cross, ax.axvline(0, color=COLORS["edge"], linewidth=1, linestyle="--")))
        marks = [artist for mark in self._marks for artist in mark]
        moving = [*self._matrix.artists, *self._circle.artists, self._change, *marks]
        super().__init__(figure, moving)

    def update(
        self,
        t: float,
        layer: int,
        matrix: np.ndarray,
        angles: np.ndarray,
        trained: np.ndarray,
        change: np.ndarray,
    ) -> None:
        """Show another measured t, layer (its number in the model) or block.

        Args:
            matrix: (8, 8) R(t) of the block.
            angles: (4,) its principal angles, radians.
            trained: (4,) those at t = 1.
            change: (out, 8) W(t) - W(0), the columns of the block.
        """
        self._matrix.update(matrix)
        self._circle.update(angles, trained)
        self._change.set_data(change[:SHOWN_ROWS])
        for (cross, line), values in zip(self._marks, self.measured, strict=True):
            cross.set_data([t], [values[t, layer]])
            line.set_xdata([t, t])
