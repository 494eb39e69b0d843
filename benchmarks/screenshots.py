"""Pictures of a run's pages for docs/: `python benchmarks/screenshots.py [RUN] [RUNS REPORTS]`.

Chromium without network; each report, both indexes and the newest comparison, light and dark on a wide
screen, one on a phone; the explorer in JupyterLab. What a person sees first, as WebP of some 40 KB.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from lab_browser import chromium, explorer_copy, run_explorer, running_lab
from PIL import Image
from playwright.sync_api import Browser

from so8t_helpers.run.stage import STAGES
from so8t_helpers.settings import PROJECT_ROOT, load_settings

DOCS = PROJECT_ROOT / "docs"
WIDE, PHONE = (1280, 960), (360, 780)
SCHEMES = ("light", "dark")


def shoot(browser: Browser, page: Path, scheme: str, size: tuple[int, int], target: Path) -> None:
    """Take one picture of what a person sees first."""
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, offline=True
    )
    tab = context.new_page()
    tab.goto(page.resolve().as_uri(), timeout=120_000)
    tab.evaluate("document.fonts.ready")
    keep(tab.screenshot(), target)
    context.close()


def shoot_explorer(browser: Browser, runs: Path, name: str, target: Path) -> None:
    """Take a picture of the explorer's sliders and figure in JupyterLab."""
    with tempfile.TemporaryDirectory() as folder:
        explorer_copy(Path(folder), runs, name)
        with running_lab(Path(folder), Path(folder) / "settings") as lab:
            page = run_explorer(browser, lab)
            page.locator(".explorer .noUi-handle").first.wait_for()
            page.wait_for_timeout(2000)
            keep(page.locator(".explorer").screenshot(), target)
            page.close()


def keep(png: bytes, target: Path) -> None:
    """Save a picture as a small WebP."""
    Image.open(io.BytesIO(png)).convert("RGB").save(target, "webp", quality=80, method=6)


def main(arguments: list[str]) -> int:
    """Write all pictures of one run, by default the demo's."""
    run = arguments[0] if arguments else "demo"
    area = load_settings("demo")
    runs = Path(arguments[1]) if len(arguments) > 1 else area.run_dir.parent
    reports = Path(arguments[2]) if len(arguments) > 2 else area.reports_dir.parent
    pages = {f"report-{stage}": reports / run / f"{stage}.html" for stage in STAGES}
    pages |= {"run": reports / run / "index.html", "runs": reports / "index.html"}
    comparisons = sorted((reports / "compare").glob("*.html"), key=lambda path: path.stat().st_mtime)
    pages |= {"comparison": comparisons[-1]} if comparisons else {}
    with chromium() as browser:
        for name, page in pages.items():
            for scheme in SCHEMES:
                shoot(browser, page, scheme, WIDE, DOCS / f"{name}-{scheme}.webp")
        shoot(browser, pages["report-05_ollama_eval"], "dark", PHONE, DOCS / "report-phone.webp")
        shoot_explorer(browser, runs, run, DOCS / "explorer.webp")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
