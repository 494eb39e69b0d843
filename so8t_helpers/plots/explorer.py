"""The explorer's figure: six views of a run's rotations that redraw fast enough to follow a slider."""

from __future__ import annotations

from collections.abc import Sequence

from so8t_helpers.plots.blitting import Blitted
from so8t_helpers.plots.block import AngleWay, RotationMatrix, UnitCircle
from so8t_helpers.plots.rotation import (
    AngleDistribution,
    AngleHistory,
    GeodesicByLayer,
    draw_drift_heatmap,
)
from so8t_helpers.plots.style import COLORS, new_figure


class ExplorerFigure:
    """One block among all the rotations of its run.

    Args:
        history: the run's rotations.
        beside: runs that are looked at together with this one: all get the same axes.

    Attributes:
        figure: for `style.show`, which draws everything.
    """

    def __init__(self, history: AngleHistory, beside: Sequence[AngleHistory] = ()):
        self.history = history
        self.figure, axes = new_figure(width=11.5, height=6.4, ncols=3, nrows=2)
        self._matrix = RotationMatrix(axes[0, 0])
        self._circle = UnitCircle(axes[0, 1])
        self._way = AngleWay(axes[0, 2], history)
        draw_drift_heatmap(axes[1, 0], history)
        (self._cross,) = axes[1, 0].plot([], [], "P", color=COLORS["edge"], mec="white", ms=10)
        self._distribution = AngleDistribution(axes[1, 1], history)
        self._geodesic = GeodesicByLayer(axes[1, 2], history)
        (self._chosen,) = axes[1, 2].plot([], [], "P", color=COLORS["edge"], mec="white", ms=10)
        together = [history, *beside]
        axes[0, 2].set_ylim(0, max(float(run.degrees.max()) for run in together) * 1.05)
        axes[1, 0].get_images()[0].set_clim(0, max(float(run.drift.max()) for run in together) or 1e-6)
        axes[1, 2].set_ylim(0, max(float(run.distance.max()) for run in together) * 1.3 or 1e-6)
        parts = (self._matrix, self._circle, self._way, self._distribution, self._geodesic)
        moving = [artist for part in parts for artist in part.artists]
        self._blitted = Blitted(self.figure, [*moving, self._cross, self._chosen])

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

    def jpeg(self) -> bytes:
        """Return the figure as it stands, on white, as JPEG."""
        return self._blitted.jpeg()
