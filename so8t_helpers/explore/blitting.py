"""Figures that follow a slider: what never changes is drawn once, what moves is laid over it."""

from __future__ import annotations

import io
from collections.abc import Iterable

from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image


class Blitted:
    """A figure kept as a picture without its moving artists, which are drawn over it (blitting).

    All else must stay as it is; the layout is fixed at the first drawing.
    """

    def __init__(self, figure: Figure, moving: Iterable[Artist]):
        self.figure, self.moving = figure, list(moving)
        for artist in self.moving:
            artist.set_animated(True)
        self._canvas = FigureCanvasAgg(figure)
        self._still: object | None = None

    def jpeg(self) -> bytes:
        """Return the figure as it stands, on white, as JPEG: packed in a third of the time that PNG takes."""
        if self._still is None:
            self.figure.set_facecolor("white")
            self._canvas.draw()
            self.figure.set_layout_engine("none")  # it would move the axes from under the kept picture
            self._still = self._canvas.copy_from_bbox(self.figure.bbox)
        self._canvas.restore_region(self._still)
        for artist in self.moving:
            artist.axes.draw_artist(artist)  # type: ignore[union-attr]
        size = self._canvas.get_width_height()
        # RGBX: the canvas' own four bytes a pixel, without a copy; the fourth is not looked at.
        pixels = Image.frombuffer("RGBX", size, self._canvas.buffer_rgba(), "raw", "RGBX", 0, 1)
        buffer = io.BytesIO()
        pixels.save(buffer, "jpeg", quality=90, subsampling=0)
        return buffer.getvalue()
