"""A JupyterLab of its own, for the tests and benchmarks that drive it in Chromium."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
from playwright.sync_api import Browser, Page, sync_playwright

from so8t_helpers.settings import PROJECT_ROOT

CHROMIUM = Path("/usr/bin/chromium")  # the distribution's; elsewhere Playwright's own is used
TOKEN = "so8t-test"
FOLDERS = (
    "JUPYTER_CONFIG_DIR",
    "JUPYTER_RUNTIME_DIR",
    "JUPYTERLAB_SETTINGS_DIR",
    "JUPYTERLAB_WORKSPACES_DIR",
)
PATIENCE = 400_000  # milliseconds for a notebook to its end


@contextmanager
def running_lab(
    home: Path, settings: Path, command: list[str] | None = None, browser: bool = False
) -> Iterator[str]:
    """Start JupyterLab; gives the address of its folder `home`, to which a notebook's path can be added.

    Args:
        home: the folder it shows.
        settings: a scratch folder for what it would else keep in the user's home.
        command: what starts it; default: the module, on `home`.
        browser: whether it may open one (the environment's BROWSER).
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = command or [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={home}"]
    command = [*command, "--ip=127.0.0.1", f"--port={port}", "--allow-root"]
    command += [] if browser else ["--no-browser"]
    command += [f"--IdentityProvider.token={TOKEN}", "--ServerApp.port_retries=0"]
    env = os.environ | {name: str(settings / name.lower()) for name in FOLDERS}
    settings.mkdir(parents=True, exist_ok=True)
    log = settings / "lab.log"
    with log.open("w", encoding="utf-8") as output:
        server = subprocess.Popen(command, cwd=home, env=env, stdout=output, stderr=output)
    try:
        _wait_for(f"http://127.0.0.1:{port}/api", server, log)
        yield f"http://127.0.0.1:{port}/lab/tree"
    finally:
        server.terminate()
        server.wait(timeout=30)


def _wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    text = log.read_text(encoding="utf-8")[-3000:]
    raise AssertionError(f"JupyterLab does not answer at {url}:\n{text}")


@contextmanager
def chromium() -> Iterator[Browser]:
    """The distribution's Chromium, else Playwright's own."""
    with sync_playwright() as playwright:
        path = CHROMIUM if CHROMIUM.exists() else None
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"], headless=True)
        yield browser
        browser.close()


def explorer_copy(folder: Path, root: Path, name: str) -> Path:
    """Write explore_rotations.ipynb into `folder`, set to a run; return its path."""
    notebook = nbformat.read(PROJECT_ROOT / "notebooks" / "explore_rotations.ipynb", as_version=4)
    (parameters,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    parameters.source = f"root = {str(root)!r}\nname = {name!r}"
    path = folder / "explore_rotations.ipynb"
    nbformat.write(notebook, path)
    return path


def run_explorer(browser: Browser, lab: str) -> Page:
    """Open that copy and run it to its end; the explorer is in view then."""
    page = open_notebook(browser, lab, "explore_rotations.ipynb")
    run_all(page)
    page.locator("text=the principal angles moved by").wait_for(state="attached", timeout=PATIENCE)
    explorer = page.locator("img.widget-image").first
    explorer.wait_for(state="attached")
    explorer.scroll_into_view_if_needed()
    return page


def open_notebook(browser: Browser, lab: str, path: str, height: int = 1100) -> Page:
    """Open a notebook and wait for its kernel."""
    page = browser.new_page(viewport={"width": 1500, "height": height})
    page.set_default_timeout(120_000)
    page.goto(f"{lab}/{path}?token={TOKEN}&reset")
    page.locator(".jp-Notebook .jp-Cell").first.wait_for()
    page.locator(".jp-NotebookPanel-toolbar >> text=Python 3").wait_for()
    return page


def run_all(page: Page) -> None:
    """Choose Run, Run All Cells, as a person does."""
    page.locator(".lm-MenuBar-item >> text=Run").click()
    page.get_by_text("Run All Cells", exact=True).click()


def wait_for_end(page: Page) -> None:
    """Wait until every cell in view has run, or one has failed; a Lab without windowing has all in view."""
    page.wait_for_function(
        "() => { const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')];"
        " return prompts.length && prompts.every(p => /\\[\\d+\\]/.test(p.textContent))"
        " || document.querySelector('[data-mime-type=\"application/vnd.jupyter.error\"]'); }",
        timeout=PATIENCE,
    )


def show_every_cell(settings: Path) -> None:
    """Set a Lab's settings folder so that it keeps cells out of sight in the page, too."""
    path = settings / "jupyterlab_settings_dir" / "@jupyterlab" / "notebook-extension"
    path.mkdir(parents=True)
    (path / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}', encoding="utf-8")
