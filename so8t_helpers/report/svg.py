"""A figure's SVG as part of a page: its ink and its colours are the page's own, light or dark."""

from __future__ import annotations

import re

from so8t_helpers.show import style

# What the page turns into its own colours: lighter ones on a dark page.
COLOURS = {color.lower(): name for name, color in style.PALETTE.items()}
COLUMN_POINTS = 7.2 * 72  # width of a figure that fills a report's column of 47rem


def slim_svg(svg: str) -> str:
    """Make an SVG part of a page: the page's ink, no URL, no more digits than a screen can show."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(re.escape(style.INK), "currentColor", svg, flags=re.IGNORECASE)
    svg = re.sub("|".join(COLOURS), lambda m: f"var(--{COLOURS[m[0].lower()]})", svg, flags=re.IGNORECASE)
    width = re.match(r'<svg[^>]*? width="([\d.]+)pt"', svg)
    if width and float(width[1]) < COLUMN_POINTS - 1:
        # A narrow figure stays narrow: its letters are as large as those of the others.
        rem = 47 * float(width[1]) / COLUMN_POINTS
        svg = svg.replace("max-width: 100%", f"max-width: {rem:.1f}rem; min-width: 0", 1)
    # Paths come with six decimals of a point; two are a hundredth of a pixel.
    svg = re.sub(r'(?<= d=")[^"]+', lambda m: re.sub(r"(\.\d\d)\d+", r"\1", m[0].replace("\n", " ")), svg)
    return re.sub(r">\s+<", "><", svg)
