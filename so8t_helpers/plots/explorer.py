"""The explorer's figure: six views of a run's rotations that redraw fast enough to follow a slider."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from so8t_helpers.plots import block as block_plots
from so8t_helpers.plots.rotation import (
    AngleDistribution,
    AngleHistory,
    GeodesicByLayer,
    draw_drift_heatmap,
)
from so8t_helpers.plots.style import COLORS, new_figure


class ExplorerFigure:
    """One block among all the rotations of its run.

    Axes, ticks and titles never change, so they are drawn once and kept as a picture; a redraw lays the few
    artists that moved over it (matplotlib calls that blitting).

    Attributes:
        figure: for `style.show`, which draws everything.
    """

    def __init__(self, history: AngleHistory):
        self.history = history
        self.figure, axes = new_figure(width=11.5, height=6.4, ncols=3, nrows=2)
        self._matrix = block_plots.RotationMatrix(axes[0, 0])
        self._circle = block_plots.UnitCircle(axes[0, 1])
        self._way = block_plots.AngleWay(axes[0, 2], history)
        draw_drift_heatmap(axes[1, 0], history)
        (self._cross,) = axes[1, 0].plot([], [], "P", color=COLORS["edge"], mec="white", ms=10)
        self._distribution = AngleDistribution(axes[1, 1], history)
        self._geodesic = GeodesicByLayer(axes[1, 2], history)
        (self._chosen,) = axes[1, 2].plot([], [], "P", color=COLORS["edge"], mec="white", ms=10)
        self._moving: list[Artist] = [
            *self._matrix.artists,
            *self._circle.artists,
            *self._way.artists,
            self._cross,
            *self._distribution.artists,
            *self._geodesic.artists,
            self._chosen,
        ]
        for artist in self._moving:
            artist.set_animated(True)
        self._canvas = FigureCanvasAgg(self.figure)
        self._background: object | None = None

    def update(self, snapshot: int, layer: int, block: int) -> None:
        """Show another snapshot, layer (index into `history.layers`) or block."""
        history = self.history
        self._matrix.update(history.matrix(snapshot, layer, block))
        self._circle.update(history.angles[snapshot, layer, block], history.angles[0, layer, block])
        self._way.update(snapshot, layer, block)
        self._cross.set_data([snapshot], [layer])
        self._distribution.update(snapshot)
        self._geodesic.update(snapshot)
        self._chosen.set_data([history.layers[layer]], [history.distance[snapshot, layer, block]])

    def png(self) -> bytes:
        """Return the figure as it stands, on white, as PNG."""
        if self._background is None:
            self.figure.set_facecolor("white")
            self._canvas.draw()
            self.figure.set_layout_engine("none")  # the layout holds: it would cost more than the drawing
            self._background = self._canvas.copy_from_bbox(self.figure.bbox)
        self._canvas.restore_region(self._background)
        for artist in self._moving:
            artist.axes.draw_artist(artist)  # type: ignore[union-attr]
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(self._canvas.buffer_rgba())).convert("RGB").save(
            buffer, "png", compress_level=1
        )
        return buffer.getvalue()
