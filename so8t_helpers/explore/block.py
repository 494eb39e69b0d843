"""Figures of one block: its 8x8 rotation, its angles on the unit circle, their way through the training."""

from __future__ import annotations

from functools import lru_cache

import matplotlib as mpl
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Circle
from matplotlib.path import Path
from matplotlib.textpath import TextPath
from matplotlib.transforms import Affine2D
from numpy.typing import ArrayLike

from so8t_helpers.show.style import COLORS, DIVERGING, GREY, INK, label_lines, new_figure, text_on
from so8t_helpers.so8.history import AngleHistory

ANGLE_COLORS = tuple(COLORS[f"theta_{i}"] for i in (1, 2, 3, 4))
ANGLE_NAMES = ("θ₁", "θ₂", "θ₃", "θ₄")
LINE_SIZE = 9.0  # points


def block(history: AngleHistory, snapshot: int, layer: int, block: int) -> Figure:
    """One block at one snapshot: matrix, unit circle, and the way of its angles.

    Snapshot and layer are indices into `history.steps` and `history.layers`.
    """
    fig, (left, middle, right) = new_figure(width=9.6, height=3.3, ncols=3, width_ratios=(1.1, 1, 1.3))
    RotationMatrix(left).update(history.matrix(snapshot, layer, block))
    UnitCircle(middle).update(history.angles[snapshot, layer, block], history.angles[0, layer, block])
    way = AngleWay(right, history)
    way.update(snapshot, layer, block)
    label_lines(right)
    return fig


class RotationMatrix:
    """An 8x8 matrix as a heat map with its values.

    The values are one collection of outlines, each kept. With 64 text artists a redraw takes 70 ms in place
    of 15; JupyterLab's own 60 would bring it over the bound of 100 (benchmarks/explorer.py).
    """

    def __init__(self, ax: Axes):
        self.image = ax.imshow(np.zeros((8, 8)), cmap=DIVERGING, vmin=-1, vmax=1)
        rows, columns = np.indices((8, 8)).reshape(2, 64)
        self.values = outlines(ax, np.column_stack([columns, rows]))
        ax.grid(visible=False)
        ax.set(title="R = exp(A)", xticks=range(8), yticks=range(8), xlabel="from", ylabel="to")
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        self.artists = [self.image, self.values]

    def update(self, matrix: np.ndarray) -> None:
        """Show another matrix, (8, 8)."""
        self.image.set_data(matrix)
        self.values.set_paths([_outline(cell_text(value)) for value in matrix.ravel()])
        fills = colormaps[DIVERGING]((matrix.ravel() + 1) / 2)
        self.values.set_facecolor([text_on(fill[:3]) for fill in fills])


def outlines(ax: Axes, places: ArrayLike, color: str | None = None) -> PathCollection:
    """Add a collection that draws outlines, given in points, at places in the axes' data coordinates."""
    added = PathCollection(
        [], offsets=np.asarray(places), offset_transform=ax.transData, linewidths=0, facecolors=color
    )
    root = ax.get_figure(root=True)
    assert root is not None
    added.set_transform(Affine2D().scale(1 / 72) + root.dpi_scale_trans)
    ax.add_collection(added, autolim=False)
    return added


def _line_outline(text: str) -> Path:
    """Return the outline of a number in points, made of its characters' (they are alike in width)."""
    advance = 0.636 * LINE_SIZE  # of DejaVu Sans' digits
    parts, x = [], 0.0
    for character in text:
        parts.append(_character(character).transformed(Affine2D().translate(x, 0)))
        x += advance / 2 if character == "." else advance
    return Path.make_compound_path(*parts)


@lru_cache(maxsize=64)
def _character(character: str) -> Path:
    """Return one character's outline in points, on the line that goes through the middle of digits."""
    font = FontProperties(family=mpl.rcParams["font.family"])
    return TextPath((0, -0.36 * LINE_SIZE), character, size=LINE_SIZE, prop=font)


@lru_cache(maxsize=256)
def _outline(text: str) -> Path:
    """Return a text's outline in points, its middle at the origin."""
    outline = TextPath((0, 0), text, size=8, prop=FontProperties(family=mpl.rcParams["font.family"]))
    box = outline.get_extents()
    return outline.transformed(Affine2D().translate(-(box.x0 + box.x1) / 2, -(box.y0 + box.y1) / 2))


def cell_text(value: float) -> str:
    """Return a matrix entry within [-1, 1] as short as it can be read: ".50", "−.25", "1.00"."""
    rounded = round(float(value), 2) + 0.0  # adding 0 turns -0.0 into 0.0
    digits = f"{abs(rounded):.2f}".removeprefix("0")
    return f"−{digits}" if rounded < 0 else digits


class UnitCircle:
    """The eigenvalues exp(+-i theta) of one rotation, full ones, and of the one it is compared with, hollow.

    The four angles stand below as outlines too: text artists would add 6 ms to a redraw.
    """

    def __init__(self, ax: Axes, hollow: str = "start"):
        ax.add_patch(Circle((0, 0), 1, fill=False, color=GREY, linewidth=1))
        ax.axhline(0, color=GREY, linewidth=0.6)
        ax.axvline(0, color=GREY, linewidth=0.6)
        ax.plot([-1], [0], "|", color=COLORS["edge"], markersize=14, markeredgewidth=2)
        ax.text(-0.93, 0.05, "edge\nθ = π", ha="left", va="bottom", fontsize=8)
        self.rays = [ax.plot([], [], color=color, linewidth=1.2)[0] for color in ANGLE_COLORS]
        self.start = [ax.plot([], [], "o", mfc="none", color=color, ms=7)[0] for color in ANGLE_COLORS]
        self.now = [ax.plot([], [], "o", color=color, ms=6)[0] for color in ANGLE_COLORS]
        places = [(-1.0 + 1.15 * (i % 2), -1.4 - 0.3 * (i // 2)) for i in range(4)]
        for (x, y), color, name in zip(places, ANGLE_COLORS, ANGLE_NAMES, strict=True):
            ax.plot([x], [y], "o", color=color, ms=6)
            ax.text(x + 0.1, y, name, fontsize=9, va="center")
        self.values = outlines(ax, [(x + 0.32, y) for x, y in places], color=INK)
        ax.set(title=f"Eigenvalues (○ {hollow})", xlim=(-1.15, 1.15), ylim=(-1.85, 1.1), aspect="equal")
        ax.set(xticks=(), yticks=())
        ax.spines[:].set_visible(False)
        self.artists = [*self.rays, *self.start, *self.now, self.values]

    def update(self, now: np.ndarray, start: np.ndarray) -> None:
        """Show other angles, (4,) each, in radians; `start` are the hollow ones."""
        for i, (angle, origin) in enumerate(zip(now, start, strict=True)):
            x, y = np.cos(angle), np.sin(angle)
            self.rays[i].set_data([x, 0, x], [y, 0, -y])
            self.now[i].set_data([x, x], [y, -y])
            self.start[i].set_data([np.cos(origin)] * 2, [np.sin(origin), -np.sin(origin)])
        self.readings = [f"{degrees:.2f}°" for degrees in np.rad2deg(now)]
        self.values.set_paths([_line_outline(text) for text in self.readings])


class AngleWay:
    """The four angles of one block over the training, with a line at the step in view."""

    def __init__(self, ax: Axes, history: AngleHistory):
        self.history = history
        self.lines = [
            ax.plot(history.steps, np.zeros(len(history.steps)), color=color, label=name)[0]
            for color, name in zip(ANGLE_COLORS, ANGLE_NAMES, strict=True)
        ]
        self.step = ax.axvline(0, color=GREY, linewidth=1.2, linestyle="--")
        ax.set(title="Way of the angles", xlabel="optimizer step", ylabel="θ (degrees)")
        ax.set(xlim=(history.steps[0], history.steps[-1]), ylim=(0, float(history.degrees.max()) * 1.05))
        self.artists = [*self.lines, self.step]

    def update(self, snapshot: int, layer: int, block: int) -> None:
        """Show another block or step."""
        for line, way in zip(self.lines, self.history.degrees[:, layer, block].T, strict=True):
            line.set_ydata(way)
        self.step.set_xdata([self.history.steps[snapshot]] * 2)
