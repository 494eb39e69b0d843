"""Pictures of a run's pages for the READMEs: `python benchmarks/screenshots.py [RUN]` writes docs/*.png.

Chromium without network, light and dark, on a wide screen and on a phone.
"""

from __future__ import annotations

import sys
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from so8t_helpers.settings import PROJECT_ROOT, load_settings

DOCS = PROJECT_ROOT / "docs"
CHROMIUM = Path("/usr/bin/chromium")  # the distribution's; elsewhere Playwright's own is used
# name: (page, scheme, width, height)
SHOTS = {
    "report-light": ("{run}/02_train.html", "light", 1400, 1100),
    "report-dark": ("{run}/02_train.html", "dark", 1400, 1100),
    "report-phone": ("{run}/05_ollama_eval.html", "dark", 360, 780),
    "run-index": ("{run}/index.html", "light", 1400, 900),
}


def shoot(browser: Browser, page: Path, scheme: str, width: int, height: int, target: Path) -> None:
    """Take one picture of what a person sees first."""
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, offline=True
    )
    tab = context.new_page()
    tab.goto(page.as_uri(), timeout=120_000)
    tab.evaluate("document.fonts.ready")
    tab.screenshot(path=target)
    context.close()


def main(arguments: list[str]) -> int:
    """Write all pictures of one run, by default the demo's."""
    run = arguments[0] if arguments else "demo"
    reports = Path(arguments[1]) if len(arguments) > 1 else load_settings("demo").reports_dir.parent
    with sync_playwright() as playwright:
        path = str(CHROMIUM) if CHROMIUM.is_file() else None
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for name, (page, scheme, width, height) in SHOTS.items():
            shoot(browser, reports / page.format(run=run), scheme, width, height, DOCS / f"{name}.png")
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
