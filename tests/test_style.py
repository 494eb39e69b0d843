"""The house style: figures that share a page, show Japanese and turn dark; tables that are safe."""

import itertools
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from so8t_helpers.show import style
from so8t_helpers.show.tables import table_html


def draw(title: str = "損失と角度 θ") -> str:
    figure, ax = style.new_figure()
    ax.plot([0, 1, 2], [3.0, 2.0, 1.5], label="ALLOW 許可")
    ax.set(title=title, xlabel="step", ylabel="loss")
    style.label_lines(ax)
    return style.to_svg(figure, "a falling line")


def test_svg_is_an_element_with_its_alternative_text():
    root = ET.fromstring(draw())
    assert root.get("role") == "img"
    assert root.get("aria-label") == "a falling line"
    with pytest.raises(ValueError, match="needs alt text"):
        style.to_svg(style.new_figure()[0], " ")


def test_text_is_drawn_and_no_glyph_is_missing(
    caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
):
    svg = draw()
    assert "<text" not in svg
    assert not [w for w in recwarn if "missing from font" in str(w.message)]
    assert "findfont" not in caplog.text
    missing = draw("\U0001f9ea")  # neither font has it: the warning that is looked for does come
    assert missing
    assert [w for w in recwarn if "missing from font" in str(w.message)]


def test_the_same_figure_gives_the_same_text_and_another_one_shares_no_id():
    first, again, other = draw(), draw(), draw("別の図")
    assert first == again
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (first, other)]
    assert ids[0]
    assert not ids[0] & ids[1]
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', first))
    assert used == ids[0]


def test_the_page_around_a_figure_is_left_alone():
    svg = draw()
    assert re.findall(r"<style.*?>(.*?)</style>", svg) == ["svg:root { background: white }"]
    assert "<metadata" not in svg
    assert svg.startswith("<svg ")


def test_ink_is_one_colour_and_nothing_is_filled_with_white():
    svg = draw().lower()
    assert style.INK in svg
    assert "#ffffff" not in svg
    assert "#000000" not in svg


def test_heat_maps_are_pictures():
    figure, ax = style.new_figure()
    ax.imshow(np.random.default_rng(0).random((384, 200)), aspect="auto")
    svg = style.to_svg(figure, "a heat map")
    assert "data:image/png" in svg
    # 76,800 cells as vector paths would be over 10 MB.
    assert len(svg) < 500_000


def test_making_figures_needs_no_pyplot_and_keeps_the_font():
    code = (
        "import sys; from so8t_helpers.show import style; style.new_figure();"
        "assert 'matplotlib.pyplot' not in sys.modules; assert 'matplotlib_fontja' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_direct_labels_do_not_overlap():
    _, ax = style.new_figure()
    for i in range(4):
        ax.plot([0, 1], [0, 1 + i / 1000], label=f"line {i}")
    ax.plot([0, 1], [0, 5], label="far away")
    style.label_lines(ax)
    names = [t for t in ax.texts if t.get_text() != "●"]
    boxes = sorted((t.get_window_extent() for t in names), key=lambda box: box.y0)
    assert len(boxes) == 5
    assert all(low.y1 <= high.y0 + 1 for low, high in itertools.pairwise(boxes))  # one pixel
    assert {t.get_color() for t in names} == {style.INK}


@pytest.mark.parametrize("fill", [*style.COLORS.values(), "#000000", "#ffffff"])
def test_text_on_a_fill_has_contrast(fill: str):
    def luminance(color: str) -> float:
        linear = np.array(mpl.colors.to_rgb(color))
        linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted([luminance(fill), luminance(style.text_on(fill))])
    assert (high + 0.05) / (low + 0.05) >= 4.5  # WCAG 2.2, 1.4.3
    assert style.text_on(fill) != style.INK  # a report must not turn it


def test_tables_escape_and_name_their_headings():
    df = pd.DataFrame(
        {"値 <b>": [1234, 5], "loss": [0.123456, float("nan")]}, index=pd.Index(["<x>", "y"], name="run")
    )
    html = table_html(df, "caption & more")
    assert "<b>" not in html
    assert "<x>" not in html
    assert '<th scope="col">値 &lt;b&gt;</th>' in html
    assert '<th scope="row">&lt;x&gt;</th>' in html
    assert ">1,234<" in html
    assert ">0.1235<" in html
    assert ">–<" in html
    assert "<caption>caption &amp; more</caption>" in html
    assert 'scope="row"' not in table_html(df.reset_index(drop=True), "no index")
