"""What makes a page self-contained: its style, its fonts, no request to anywhere, no trace of the machine."""

from __future__ import annotations

import base64
import html
import io
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from so8t_helpers.run.files import write_text
from so8t_helpers.settings import PROJECT_ROOT, Settings, resolve
from so8t_helpers.show.wording import plain, words

TEMPLATE_DIR = Path(__file__).parent / "template"
# Key figures of the stages that are shares of one.
_SHARES = re.compile(r"(format|answer|padding|next-token agreement)\b")
# Scripts, frames, fonts and pictures from elsewhere are refused by the browser, so that a leak would show.
CSP = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; font-src data:"


def write_page(
    path: Path, template: str, settings: Settings, figures: Sequence[str] = (), **values: Any
) -> Path:
    """Write a page from its template and what it shows, self-contained; return its path.

    Args:
        path: where it goes.
        template: file in `template/`.
        settings: whose folders are taken out of the text.
        figures: SVG elements for the places `<!--figure N-->`.
        **values: what the template shows.
    """
    text = scrub(_environment().get_template(template).render(values), settings)
    text = text.replace("/*font*/", japanese_font(text), 1)
    for number, svg in enumerate(figures):
        text = text.replace(f"<!--figure {number}-->", svg, 1)
    write_text(path, text)
    return path


def scrub(text: str, settings: Settings) -> str:
    """Replace this machine's folders by words, outside embedded data.

    A report is shared: where a run lay on its maker's disk is nobody's business.
    """
    places = {
        resolve(settings.run.root): "runs",
        resolve(settings.run.reports_root): "reports",
        PROJECT_ROOT: "so8t",
        Path(sys.prefix): "python",
        Path(sys.base_prefix): "python",
        Path(tempfile.gettempdir()): "tmp",
        Path.home(): "~",
    }
    spellings: dict[str, str] = {}
    for path, word in places.items():
        for spelling in {*_spellings(str(path)), path.as_uri().removeprefix("file://")}:
            spellings[html.escape(spelling).lower()] = word
    for spelling in _absolute_settings(settings):
        last = re.split(r"[/\\]+", spelling)[-1]
        spellings.setdefault(html.escape(spelling).lower(), f"…/{last}")
    # The longest first: a run folder may lie inside the home folder. Windows writes c:\ as well as C:\.
    alternatives = "|".join(re.escape(s) for s in sorted(spellings, key=len, reverse=True) if len(s) > 1)
    pattern = re.compile(rf"(data:[\w/+;,=-]+)|(?<![\w.])((?i:{alternatives}))(?![\w-])")
    text = pattern.sub(lambda m: m[1] or spellings[m[2].lower()], text)
    return re.sub(r"tmp/ipykernel_\d+/\d+\.py", "cell", text)


def _absolute_settings(settings: Settings) -> Iterator[str]:
    """Folders and files outside the project that a profile names, in their spellings of Unix and Windows."""
    for section in settings.model_dump(mode="json").values():
        for value in section.values() if isinstance(section, dict) else ():
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and re.match(r"/[^/\s]+/|[A-Za-z]:[/\\]|\\\\\w", text):
                    yield from _spellings(text.rstrip("/\\"))


def _spellings(path: str) -> set[str]:
    """The path as it is, with slashes, and with backslashes as JSON and Python write them."""
    return {path, path.replace("\\", "/"), path.replace("\\", "\\\\")}


def japanese_font(text: str) -> str:
    """Return a @font-face rule with just the Japanese characters of `text`, "" where there are none.

    IPAex Gothic's licence allows embedding. Browsers that have a Japanese font of their own take that.
    """
    characters = "".join(sorted({c for c in text if ord(c) >= 0x2000}))
    if not any(ord(c) >= 0x3000 for c in characters):
        return ""
    data = _font_subset(characters)
    return f'@font-face{{font-family:"SO8T Japanese";src:url(data:font/woff;base64,{data}) format("woff")}}'


@cache
def _font_subset(characters: str) -> str:
    from fontTools import subset  # noqa: PLC0415

    from so8t_helpers.show.style import japanese_font_path  # noqa: PLC0415  # brings matplotlib

    options = subset.Options(flavor="woff", layout_features=[], hinting=False, notdef_outline=True)
    font = subset.load_font(str(japanese_font_path()), options)
    subsetter = subset.Subsetter(options)
    subsetter.populate(text=characters)
    subsetter.subset(font)
    buffer = io.BytesIO()
    subset.save_font(font, buffer, options)
    return base64.b64encode(buffer.getvalue()).decode()


def show(value: Any, name: str = "") -> str:
    """Put a value of a manifest or a profile into words; by its name a share is known, shown in percent."""
    if isinstance(value, int | float) and not isinstance(value, bool) and _SHARES.match(name):
        return f"{value:.1%}"
    return plain(words(value))


def difference(value: Any, first: Any, name: str = "") -> str:
    """How far a number is from the first run's, as " (+0.12)"; "" for anything else."""
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in (value, first)):
        return ""
    share = _SHARES.match(name)
    text = f"{100 * (value - first):+.1f} points" if share else plain(f"{value - first:+.3g}")
    return f" ({text.replace('-', '−')})"


def duration(seconds: float) -> str:
    """Seconds as "42 s", "3 min 5 s" or "2 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def code_css(style: str) -> str:
    """Return pygments' rules for folded code."""
    from pygments.formatters import HtmlFormatter  # noqa: PLC0415

    rules: str = HtmlFormatter(style=style).get_style_defs(".highlight")
    return re.sub(r" */\*.*?\*/", "", "\n".join(re.findall(r"^\.highlight \..*", rules, flags=re.MULTILINE)))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE_DIR),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"show": show, "difference": difference, "duration": duration}
    environment.globals |= {"csp": CSP, "light_code": code_css("xcode"), "dark_code": code_css("github-dark")}
    return environment
