"""The house style: what all figures and tables share, so that one colour means one thing everywhere.

Figures are `matplotlib.figure.Figure`, never pyplot's: nothing global holds them. All ink is `INK`, on no
background, so that a report can turn it into `currentColor` for its dark mode. Text becomes paths, so
Japanese shows on a machine without Japanese fonts.
"""

from __future__ import annotations

import hashlib
import html
import importlib.util
import io
import re
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from cycler import cycler
from IPython.display import display
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from so8t_helpers.show.tables import table_html
from so8t_helpers.show.wording import short

INK = "#1a1a1a"  # text, axes, ticks: reports replace exactly this colour
ON_LIGHT, ON_DARK = "#111111", "#ffffff"  # text upon a coloured cell, which no report may replace

# Okabe and Ito's palette (https://jfly.uni-koeln.de/color/), without black and yellow: the one vanishes on
# a dark page, the other on a white one.
PALETTE = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "vermilion": "#D55E00",
    "sky": "#56B4E9",
    "purple": "#CC79A7",
    "grey": "#888888",
}
BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE, GREY = PALETTE.values()

COLORS = {
    "task_loss": BLUE,
    "pet_loss": PURPLE,
    "exploration": SKY,
    "transition": ORANGE,
    "stabilization": GREEN,
    "base": GREY,
    "baked": BLUE,
    "f16": GREEN,
    "bf16": GREEN,
    "q8_0": ORANGE,
    "q6_k": SKY,
    "q5_k_m": PURPLE,
    "q4_k_m": VERMILION,
    "ALLOW": GREEN,
    "ESCALATION": ORANGE,
    "DENY": VERMILION,
    "REFUSE": PURPLE,
    "theta_1": BLUE,
    "theta_2": VERMILION,
    "theta_3": GREEN,
    "theta_4": ORANGE,
    "start": GREY,
    "now": BLUE,
    "haar": PURPLE,
    "edge": VERMILION,
    "bad": VERMILION,
    "accent": BLUE,
    "accent_2": ORANGE,
    "muted": GREY,
}
SERIES = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, GREY)  # for things without a meaning of their own
# JupyterLab shows an SVG as a picture, on its dark theme too: there the figure is its own root and gets a
# light card. In a report's page the root is <html>, and the rule finds nothing.
_CARD = "<style>svg:root { background: white }</style>"
_ROOT_STYLE = 'style="max-width: 100%; height: auto; stroke-linejoin: round; stroke-linecap: butt"'
SEQUENTIAL, DIVERGING = "cividis", "RdBu_r"  # both survive colour blindness


def japanese_font_path() -> Path:
    """Return where IPAex Gothic lies, which matplotlib_fontja carries."""
    # Not imported: that would change matplotlib's font for the whole process.
    spec = importlib.util.find_spec("matplotlib_fontja")
    assert spec is not None and spec.origin is not None, "matplotlib_fontja is pinned in constraints.txt"
    return Path(spec.origin).parent / "fonts" / "ipaexg.ttf"


@cache
def _rc() -> Any:
    path = str(japanese_font_path())
    font_manager.fontManager.addfont(path)
    inked = "text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"
    return dict.fromkeys(inked, INK) | {
        "font.family": ["DejaVu Sans", font_manager.FontProperties(fname=path).get_name()],
        "font.size": 10.5,
        "axes.titlesize": 11.5,
        "axes.titlelocation": "left",
        "axes.labelsize": 10.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
        "axes.prop_cycle": cycler(color=SERIES),
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.facecolor": "none",
        "axes.unicode_minus": True,
        "figure.facecolor": "none",
        "savefig.facecolor": "none",
        "savefig.edgecolor": "none",
        "grid.color": GREY,
        "grid.alpha": 0.25,
        "grid.linewidth": 0.6,
        "lines.linewidth": 1.8,
        "lines.markersize": 4.5,
        "legend.frameon": False,
        "legend.fontsize": 10,
        "xtick.labelsize": 9.5,
        "ytick.labelsize": 9.5,
        "image.interpolation": "none",
        "svg.fonttype": "path",
        "mathtext.fontset": "dejavusans",
    }


def new_figure(
    width: float = 7.2, height: float = 3.6, ncols: int = 1, nrows: int = 1, **kw: Any
) -> tuple[Figure, Any]:
    """Make a figure in the house style, with its axes as from `Figure.subplots`, which takes **kw.

    Width and height are in inches; 7.2 fills a report's column.
    """
    # What a plot function draws after this call takes its defaults from the same place.
    mpl.rcParams.update(_rc())
    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    return figure, figure.subplots(nrows, ncols, **kw)


def log_where_wide(ax: Axes, series: list[pd.Series], ratio: float = 20.0) -> None:
    """Give the y axis a logarithmic scale where values span more than `ratio`, so that small ones show."""
    values = pd.concat(series)
    if values.min() > 0 and values.max() > ratio * values.min():
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(lambda value, _: short(value))
        ax.yaxis.set_minor_formatter(lambda _value, _: "")


def text_on(color: Any) -> str:
    """Return the ink that reads on a filled cell of `color` (WCAG's relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return ON_LIGHT if luminance > 0.18 else ON_DARK


def label_lines(ax: Axes, pad_points: float = 4.0) -> None:
    """Write each labelled line's name at its right end instead of a legend; names never overlap.

    Labels that start with an underscore are left out, as in a legend. Call it last: it uses the final limits.
    """
    ax.get_ylim()  # autoscale now
    points_per_pixel = 72 / ax.get_figure(root=True).dpi  # type: ignore[union-attr]
    size = float(mpl.rcParams["legend.fontsize"])
    ends = []
    for line in ax.get_lines():
        if str(line.get_label()).startswith("_") or not np.size(line.get_xdata()):
            continue
        x, y = (np.asarray(values, dtype=float) for values in line.get_data())
        last = np.flatnonzero(np.isfinite(y))[-1]
        height = ax.transData.transform((x[last], y[last]))[1] * points_per_pixel
        ends.append((height, (x[last], y[last]), line))
    ends.sort(key=lambda end: end[0])
    places = _spread([end[0] for end in ends], size * 1.3)
    for place, (height, end, line) in zip(places, ends, strict=True):
        for text, color, right in (("●", line.get_color(), 0), (str(line.get_label()), INK, size)):
            ax.annotate(
                text,
                end,
                (pad_points + right, place - height),
                textcoords="offset points",
                va="center",
                fontsize=size,
                color=color,
                annotation_clip=False,
            )


def _spread(heights: list[float], gap: float) -> list[float]:
    """Move sorted heights apart until neighbours are `gap` from each other, as little as that takes."""
    groups: list[list[float]] = []  # each group's wished heights; drawn `gap` apart round their mean

    def bottom(group: list[float]) -> float:
        return sum(group) / len(group) - gap * (len(group) - 1) / 2

    for height in heights:
        groups.append([height])
        while len(groups) > 1 and bottom(groups[-2]) + gap * len(groups[-2]) > bottom(groups[-1]):
            last = groups.pop()
            groups[-1] += last
    return [bottom(group) + gap * i for group in groups for i in range(len(group))]


def to_svg(fig: Figure, alt: str) -> str:
    """Return a figure as an SVG element that can stand in a page with others, the same text each time.

    Ids carry a prefix made from the content, since two figures in one page would otherwise draw with each
    other's glyphs and clip paths. Raises ValueError: no alt text.
    """
    if not alt.strip():
        raise ValueError("a figure needs alt text: say what it shows and what to read from it")
    buffer = io.StringIO()
    with mpl.rc_context({**_rc(), "svg.hashsalt": "so8t"}):
        fig.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # matplotlib's style rule names every element, so it would reach out into the page around the figure.
    svg = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    prefix = "f" + hashlib.sha256((alt + svg).encode()).hexdigest()[:10]

    def rename(match: re.Match[str]) -> str:
        return f' id="{prefix}-{match[1]}"' if match[1] in used else ""

    svg = re.sub(r' id="([^"]*)"', rename, svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = svg.replace(">", f">{_CARD}", 1)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(alt)}" {_ROOT_STYLE} ', 1)


def show(fig: Figure, alt: str) -> None:
    """Display a figure as SVG with its alt text of one or two sentences, and free it."""
    svg = to_svg(fig, alt)
    fig.clear()
    display({"image/svg+xml": svg, "text/plain": alt}, raw=True, metadata={"image/svg+xml": {"alt": alt}})


def show_table(df: pd.DataFrame, caption: str) -> None:
    """Display a DataFrame as a compact HTML table; an index with a name becomes the rows' headings."""
    text = f"{caption}\n{df.to_string()}"
    display({"text/html": table_html(df, caption), "text/plain": text}, raw=True)
