"""Every page of a demo run in a real Chromium, offline: silent, nothing cut, and axe finds nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

from so8t_helpers.report.comparison import write_comparison
from so8t_helpers.run.stage import STAGES
from so8t_helpers.settings import Settings, merge
from so8t_helpers.study.page import make_page
from so8t_helpers.study.plan import load_study
from so8t_helpers.study.stage import carry_out
from tests.small_study import small_base, small_study

pytestmark = pytest.mark.slow
CHROMIUM = Path("/usr/bin/chromium")  # the distribution's; elsewhere Playwright's own is used
PAGES = ["../index", "index", *STAGES, "comparison", "study"]
SCHEMES, WIDTHS = ("light", "dark"), (360, 1400)
PRINTED = (680, 1000)  # an A4 page without its margins, in CSS pixels


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        path = str(CHROMIUM) if CHROMIUM.is_file() else None
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def comparison(demo_run: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run compared with itself, in a folder of this test's own."""
    reports = str(tmp_path_factory.mktemp("reports"))
    return write_comparison([merge(demo_run, {"run": {"reports_root": reports}}), demo_run], "twice")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a small study."""
    folder = tmp_path_factory.mktemp("study")
    found = load_study(str(small_study(folder, small_base(folder / "base"), seeds=2, trials=1)))
    carry_out(found)
    return make_page(found, {})


@pytest.fixture
def page_path(name: str, request: pytest.FixtureRequest) -> Path:
    if name in {"comparison", "study"}:
        path: Path = request.getfixturevalue(name)
        return path
    demo_run: Settings = request.getfixturevalue("demo_run")
    return demo_run.reports_dir / f"{name}.html"


def _open(browser: Browser, path: Path, scheme: str, width: int) -> tuple[Page, list[str]]:
    """Open a page from disk, offline; also return what the console said and what was asked for."""
    context = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True, reduced_motion="reduce"
    )
    page, heard = context.new_page(), []
    address = path.resolve().as_uri()
    page.on("console", lambda message: heard.append(message.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on(
        "request",
        lambda request: None if request.url.startswith((address, "data:")) else heard.append(request.url),
    )
    page.goto(address)
    page.evaluate("document.fonts.ready")
    return page, heard


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_silent_whole_and_accessible(page_path: Path, browser: Browser, scheme: str):
    path = page_path
    assert path.stat().st_size <= 2_000_000
    for width in WIDTHS:
        page, heard = _open(browser, path, scheme, width)
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert heard == []
        # The page's own policy forbids injected scripts, so axe runs in a copy without it.
        page.set_content(path.read_text(encoding="utf-8").replace("Content-Security-Policy", "x-policy"))
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        results = Axe().run(page)
        assert results.violations_count == 0, results.generate_report()
        page.context.close()


@pytest.mark.parametrize("name", PAGES)
def test_a_printed_page_cuts_nothing(page_path: Path, browser: Browser):
    page, _ = _open(browser, page_path, "dark", PRINTED[0])
    page.emulate_media(media="print", color_scheme="dark")
    cut = page.evaluate(
        "([width, height]) => [...document.querySelectorAll('figure svg, table, pre, .facts')]"
        ".filter(e => e.checkVisibility()).filter(e => { const box = e.getBoundingClientRect();"
        " return box.right > width + 1 || e.tagName === 'svg' && box.height > height })"
        ".map(e => e.outerHTML.slice(0, 200))",
        list(PRINTED),
    )
    assert cut == []
    # Paper is white, whatever the reader's screen likes.
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.context.close()


def test_the_policy_would_show_a_leak(demo_run: Settings, browser: Browser, tmp_path: Path):
    """A page with one outside picture is refused by the browser, aloud."""
    html = (demo_run.reports_dir / "index.html").read_text(encoding="utf-8")
    leaky = tmp_path / "leaky.html"
    leaky.write_text(
        html.replace("</body>", '<img src="http://127.0.0.1:9/x.png" alt="x"></body>'), encoding="utf-8"
    )
    page, heard = _open(browser, leaky, "light", 1400)
    page.wait_for_timeout(200)
    assert any("Content Security Policy" in text for text in heard)
    page.context.close()


def test_the_pages_of_a_run_lead_to_each_other(demo_run: Settings, browser: Browser):
    page, heard = _open(browser, demo_run.reports_dir.parent / "index.html", "light", 1400)
    page.get_by_role("link", name=demo_run.run.name, exact=True).click()
    for title in ("Dataset", "Training", "Baking", "GGUF files", "Evaluation"):
        page.get_by_role("link", name=title, exact=True).first.click()
        assert page.locator("nav [aria-current=page]").inner_text() == title
    assert [text for text in heard if not text.startswith("file:")] == []
    page.context.close()


def test_dark_and_light_differ_and_figures_follow(demo_run: Settings, browser: Browser):
    colours = {}
    for scheme in SCHEMES:
        page, _ = _open(browser, demo_run.reports_dir / "02_train.html", scheme, 1400)
        colours[scheme] = page.evaluate(
            "[getComputedStyle(document.body).backgroundColor,"
            " getComputedStyle(document.querySelector('figure svg')).color]"
        )
        page.context.close()
    assert colours["light"][0] != colours["dark"][0]
    assert colours["light"][1] != colours["dark"][1]
