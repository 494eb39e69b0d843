"""Reports: self-contained, cleaned, opening with the answer, without a trace of the machine."""

from __future__ import annotations

import getpass
import re
import sys
from pathlib import Path

import pytest
from bs4 import BeautifulSoup

from so8t_helpers.report import index
from so8t_helpers.report.page import TEMPLATE_DIR, difference, japanese_font, scrub, show
from so8t_helpers.report.svg import COLOURS, slim_svg
from so8t_helpers.run.stage import report_path
from so8t_helpers.settings import PROJECT_ROOT, Settings, merge
from so8t_helpers.show.wording import plain, short
from so8t_helpers.thinking.audit import AuditLog, service_log
from so8t_helpers.verbs import batch
from tests.small_notebooks import code, small_settings, write_notebook

FIGURE = """from so8t_helpers.show import style
figure, ax = style.new_figure()
ax.plot([0, 1], [0, 1], label="訓練")
ax.set(xlabel="step", ylabel="loss (nats)")
style.show(figure, alt="A line that rises")"""
TABLE = """import pandas as pd
from so8t_helpers.show import style
style.show_table(pd.DataFrame({"例": ["<b>東京</b>"], "n": [3]}), "Examples")"""
NOISE = """import sys
from tqdm import tqdm
for _ in tqdm(range(3), desc="loading"): pass
print("a real warning", file=sys.stderr)
print(settings.run_dir, sys.prefix)"""
WIDGET = """import ipywidgets
ipywidgets.IntSlider(description="a slider")"""


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, str]:
    """Settings of a run of one stage with everything that a report treats in its own way, and its report."""
    folder = tmp_path_factory.mktemp("report")
    settings = small_settings(folder)
    from nbformat.v4 import new_markdown_cell

    maths = new_markdown_cell(
        "## Rotation\n\nAs $R=e^{A}$:\n\n$$W' = (W + sBA)\\,R$$\n\n### Detail\n\n| a |\n|---|\n| 1 |"
    )
    cells = [maths, code(FIGURE), code(TABLE), code(NOISE), code(WIDGET, "widgets"), code(WIDGET)]
    write_notebook(folder / "notebooks", "01_dataset", *cells)
    outcomes = batch.run_stages(settings, ("01_dataset",))
    assert outcomes[0].state == "done", outcomes
    return settings, report_path(settings, "01_dataset").read_text(encoding="utf-8")


def test_the_page_opens_with_question_answer_and_key_figures(shown: tuple[Settings, str]):
    soup = BeautifulSoup(shown[1], "html.parser")
    assert soup.h1 is not None
    assert soup.h1.get_text() == "Small 01_dataset"
    main = soup.main
    assert main is not None
    order = [
        main.get_text().index(text) for text in ("質問です", "1,520 records were kept", "records", "Rotation")
    ]
    assert order == sorted(order)
    assert soup.select_one(".facts dd").get_text() == "1,520"
    assert [a.get_text() for a in soup.select(".toc a")] == ["Rotation", "Detail", "What this was made from"]
    assert all(soup.select_one(a["href"]) for a in soup.select(".toc a"))
    assert all(not details.has_attr("open") for details in soup.select("details.code"))


def test_the_page_asks_nothing_of_any_network(shown: tuple[Settings, str]):
    html = shown[1]
    assert re.findall(r"https?://[^\s\"'<]+", html) == []
    soup = BeautifulSoup(html, "html.parser")
    policy = soup.find("meta", attrs={"http-equiv": "Content-Security-Policy"})
    assert policy["content"].startswith("default-src 'none';")
    assert soup.find_all(["script", "link", "iframe"]) == []
    assert all(image["src"].startswith("data:") for image in soup.find_all("img"))
    assert len(html.encode()) < 2_000_000


def test_figures_take_the_page_s_ink_and_say_what_they_show(shown: tuple[Settings, str]):
    svg = BeautifulSoup(shown[1], "html.parser").select_one("figure svg")
    assert svg is not None
    assert (svg["role"], svg["aria-label"]) == ("img", "A line that rises")
    assert "currentColor" in str(svg)
    assert "#1a1a1a" not in str(svg).lower()


def test_maths_is_mathml_and_no_latex_is_left(shown: tuple[Settings, str]):
    soup = BeautifulSoup(shown[1], "html.parser")
    assert [math["display"] for math in soup.find_all("math")] == ["inline", "block"]
    assert "$" not in soup.select_one("main").get_text().replace("$ ", "")


def test_noise_and_widgets_are_left_out_and_warnings_kept(shown: tuple[Settings, str]):
    html = shown[1]
    assert "it/s" not in html
    output = BeautifulSoup(html, "html.parser").select_one("details pre.text").get_text()
    assert "loading" not in output
    assert "a real warning" in output
    assert "IntSlider(" not in re.sub(r"<details.*?</details>", "", html, flags=re.DOTALL)


def test_every_table_scrolls_in_a_frame_that_the_keyboard_reaches(shown: tuple[Settings, str]):
    soup = BeautifulSoup(shown[1], "html.parser")
    frames = [table.parent for table in soup.find_all("table")]
    assert len(frames) >= 5
    assert all("table-wrap" in frame["class"] and frame["tabindex"] == "0" for frame in frames)
    assert "<b>東京</b>" in soup.find("caption", string="Examples").parent.get_text(), "cells are escaped"


def test_no_path_or_user_name_of_this_machine_is_left(shown: tuple[Settings, str]):
    settings, html = shown
    folders = [
        settings.run.root,
        settings.run.reports_root,
        str(PROJECT_ROOT),
        sys.prefix,
        str(Path.home()) + "/",
    ]
    for page in (
        html,
        *(p.read_text(encoding="utf-8") for p in settings.reports_dir.parent.glob("**/index.html")),
    ):
        text = re.sub(r"data:[\w/+;,=-]+", "", page)
        assert [folder for folder in folders if folder in text] == []
        assert f"/{getpass.getuser()}/" not in text
    assert "runs/demo" in html


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("{project}/so8t_helpers/x.py", "so8t/so8t_helpers/x.py"),
        ("file in {home}/data", "file in ~/data"),
        ("{home}x stays", "{home}x stays"),
        ("data:image/png;base64,AAA{home}BBB", "data:image/png;base64,AAA{home}BBB"),
    ],
)
def test_scrubbing_takes_whole_paths_and_leaves_data_alone(text: str, wanted: str):
    values = {"project": PROJECT_ROOT.as_posix(), "home": Path.home().as_posix()}
    assert scrub(text.format(**values), Settings()) == wanted.format(**values)


def test_windows_paths_are_scrubbed_in_both_spellings(monkeypatch: pytest.MonkeyPatch):
    from pathlib import PureWindowsPath

    monkeypatch.setattr(Path, "home", lambda: PureWindowsPath(r"C:\Users\hanako"))
    spellings = [r"C:\Users\hanako\runs", "C:/Users/hanako/runs", r"C:\\Users\\hanako\\runs"]
    spellings += [r"c:\users\hanako\runs", "file:///C:/Users/hanako/runs"]
    for spelling in spellings:
        assert "hanako" not in scrub(f"in {spelling}", Settings()).lower()


def test_folders_that_a_profile_names_are_cut_to_their_last_part():
    named = {"inputs": [r"D:\study\hanako\records.jsonl"], "teacher": "/srv/models/teacher.gguf"}
    settings = merge(Settings(), {"dataset": named})
    text = r"D:\study\hanako\records.jsonl, d:/study/hanako/records.jsonl, /srv/models/teacher.gguf, /think"
    assert scrub(text, settings) == "…/records.jsonl, …/records.jsonl, …/teacher.gguf, /think"


def test_code_is_folded_under_what_it_shows(shown: tuple[Settings, str]):
    soup = BeautifulSoup(shown[1], "html.parser")
    folds = soup.select("main .folds")
    figure, table = soup.select_one("figure:has(svg)"), soup.select_one("main .cell table")
    assert figure.find_parent(class_="cell").contents[-1] in folds
    assert table.find_parent(class_="cell").contents[-1] in folds
    # The cells that show nothing (settings, the stage itself) lend theirs to the first that does.
    first = folds[0].get_text()
    assert first.index("from_parameters") < first.index("open_stage") < first.index("new_figure")
    assert all(len(fold.select("details.source")) == 1 for fold in folds)


def test_numbers_are_written_for_readers():
    assert plain("no more than 4.2e-05 (bound 1e-04)") == "no more than 4.2×10⁻⁵ (bound 1×10⁻⁴)"
    assert plain("sha 3e5f0a1, 1e5x, v1.2e3") == "sha 3e5f0a1, 1e5x, v1.2e3"
    assert [short(v) for v in (0.0, 0.12345, 1303.6, 1e-5, 10000.0)] == [
        "0", "0.1235", "1,304", "1×10⁻⁵", "10,000",
    ]  # fmt: skip
    assert (show(0.98, "format q8_0"), show(0.98, "last task loss")) == ("98.0%", "0.98")
    assert difference(0.6, 0.8, "answer q8_0") == " (−20.0 points)"


def test_every_colour_of_a_figure_has_one_for_dark_pages_that_stands_out():
    from matplotlib.colors import to_rgb

    from so8t_helpers.show import style

    def luminance(color: str) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    assert set(COLOURS) == {color.lower() for color in style.SERIES}
    css = (TEMPLATE_DIR / "style.css").read_text(encoding="utf-8")
    for color, name in COLOURS.items():
        light, dark, paper = re.findall(rf"--{name}: (#\w+)", css)  # paper: what is printed
        assert light == paper == color
        # 3 : 1 is what WCAG asks of graphics.
        assert (luminance(dark) + 0.05) / (luminance("#14171a") + 0.05) > 4


def test_a_narrow_figure_keeps_the_size_of_its_letters():
    from so8t_helpers.show import style

    wide, narrow = (slim_svg(style.to_svg(style.new_figure(width=w)[0], "x")) for w in (7.2, 3.6))
    assert "max-width: 100%" in wide
    assert "max-width: 23.5rem" in narrow


def test_the_embedded_font_has_the_page_s_japanese_and_only_where_needed():
    import base64
    import io

    from fontTools.ttLib import TTFont

    assert japanese_font("plain – text") == ""
    rule = japanese_font("回転の角度")
    font = TTFont(io.BytesIO(base64.b64decode(re.search(r"base64,([^)]+)\)", rule)[1])))
    assert {ord(c) for c in "回転の角度"} <= set(font.getBestCmap())
    assert len(rule) < 20_000


def test_an_svg_becomes_part_of_the_page():
    svg = (
        '<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">\n'
        '<metadata>http://purl.org</metadata> <path d="M 1.234567 2.5\nL 3 4" id="p" style="fill: #1A1A1A"/>'
        '<use xlink:href="#p"/></svg>'
    )
    assert slim_svg(svg) == (
        '<svg><path d="M 1.23 2.5 L 3 4" id="p" style="fill: currentColor"/><use href="#p"/></svg>'
    )


def test_the_index_lists_every_run_with_what_differs(tmp_path: Path):
    base = small_settings(tmp_path)
    write_notebook(tmp_path / "notebooks", "01_dataset")
    for name, r in (("small", 4), ("large", 8)):
        settings = merge(base, {"run": {"name": name}, "lora": {"r": r}})
        batch.run_stages(settings, ("01_dataset",))
    soup = BeautifulSoup((tmp_path / "reports" / "index.html").read_text(encoding="utf-8"), "html.parser")
    assert {a["href"] for a in soup.select("main h2 a")} == {"small/index.html", "large/index.html"}
    text = soup.get_text()
    assert "2 runs, newest first; 0 with all five stages done." in text
    assert "lora.r" in text
    assert "lora.alpha" not in text
    for link in soup.select("main a"):
        assert (tmp_path / "reports" / link["href"]).is_file()
    run = BeautifulSoup(
        (tmp_path / "reports" / "small" / "index.html").read_text(encoding="utf-8"), "html.parser"
    )
    assert [span.get_text() for span in run.select(".state")] == ["done"] + ["not run"] * 4


def test_the_runs_index_publishes_the_heads_of_its_audit_logs(tmp_path: Path) -> None:
    settings = small_settings(tmp_path)
    assert "Audit logs" not in index.write_run_index(settings).read_text("utf-8")
    evaluated = AuditLog(settings.run_dir / "05_ollama_eval" / "audit.jsonl", b"k" * 32)
    served = AuditLog(service_log(settings), b"k" * 32)
    evaluated.append({"event": "evaluated"})
    before = served.append({"event": "asked"})
    served.append({"event": "answered"})
    page = index.write_run_index(settings).read_text("utf-8")
    assert evaluated.head in page and served.head in page and before not in page
