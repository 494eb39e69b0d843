"""Interactive views for JupyterLab; nothing outside this package imports ipywidgets."""

from __future__ import annotations

# Pictures are drawn on white, in one look: a dark JupyterLab inverts their lightness and keeps their hues,
# which costs no redraw. The attribute is JupyterLab's own; elsewhere the rule matches nothing.
DARK_STYLE = """<style>
body[data-jp-theme-light="false"] :is(.explorer, .what-if) img { filter: invert(0.9) hue-rotate(180deg); }
</style>"""
