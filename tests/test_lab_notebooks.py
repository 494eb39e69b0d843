"""`python run.py lab` opens the start page; there, Run All carries every notebook through on the demo."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
import yaml
from playwright.sync_api import Browser

from benchmarks.lab_browser import (
    chromium,
    open_notebook,
    run_all,
    running_lab,
    show_every_cell,
    wait_for_end,
)
from so8t_helpers.run.stage import STAGES
from so8t_helpers.settings import PROJECT_ROOT, Settings

pytestmark = pytest.mark.slow
# The order of the start page; each reads what the one before it left.
NOTEBOOKS = ["START_HERE", *STAGES, "explore_rotations"]


@pytest.fixture(scope="module")
def project(demo_run: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of its own with a shorter demo: the notebooks are as committed, no parameter is given."""
    folder = tmp_path_factory.mktemp("project")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=PROJECT_ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (PROJECT_ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(PROJECT_ROOT / name, folder / name)
    profile = folder / "params" / "demo.yaml"
    chosen = yaml.safe_load(profile.read_text(encoding="utf-8"))
    chosen["training"]["max_steps"], chosen["eval"]["prompts"] = 20, 12
    profile.write_text(yaml.safe_dump(chosen), encoding="utf-8")
    # The demo's base model and records take minutes; they are the same.
    shutil.copytree(demo_run.run_dir.parent / ".demo", folder / "runs" / ".demo")
    return folder


def lab_command(project: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `run.py lab` starts, with this environment's Python in place of the project's own."""
    spec = importlib.util.spec_from_file_location("run_of_project", project / "run.py")
    assert spec is not None
    assert spec.loader is not None
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    started: list[list[str]] = []
    monkeypatch.setattr(run, "ready", lambda: True)
    monkeypatch.setattr(subprocess, "call", lambda command, cwd: started.append(command) or 0)
    assert run.main(["lab"]) == 0
    assert started[0][0] == str(run.PYTHON)
    return [sys.executable, *started[0][1:]]


@pytest.fixture(scope="module")
def lab(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """JupyterLab as `run.py lab` starts it; its address, and the file that tells what it opened."""
    opened = tmp_path_factory.mktemp("browser") / "opened.txt"
    script = opened.with_name("browser.py")
    script.write_text(f"import sys; open({str(opened)!r}, 'w').write(sys.argv[1])", encoding="utf-8")
    with pytest.MonkeyPatch.context() as monkeypatch:
        command = lab_command(project, monkeypatch)
        monkeypatch.setitem(os.environ, "BROWSER", f"{sys.executable} {script} %s")
        monkeypatch.setitem(os.environ, "PYTHONPATH", str(project))
        settings = tmp_path_factory.mktemp("settings")
        show_every_cell(settings)
        with running_lab(project, settings, command, browser=True) as address:
            yield address, opened


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


def test_it_opens_a_browser_on_the_start_page(lab: tuple[str, Path], browser: Browser):
    page = browser.new_page()
    page.set_default_timeout(60_000)
    page.goto(lab[1].read_text(encoding="utf-8"))
    page.locator("h1 >> text=Start here").wait_for()
    assert page.url.split("?")[0].endswith("/notebooks/START_HERE.ipynb")
    for name in NOTEBOOKS[1:]:
        assert page.locator(f".jp-RenderedMarkdown a >> text={name}").count() == 1
    page.close()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_run_all_carries_a_notebook_through(
    lab: tuple[str, Path], browser: Browser, project: Path, name: str
):
    page = open_notebook(browser, lab[0], f"notebooks/{name}.ipynb")
    run_all(page)
    wait_for_end(page)
    page.keyboard.press("Control+s")
    page.wait_for_timeout(1000)
    page.close()
    saved = nbformat.read(project / "notebooks" / f"{name}.ipynb", as_version=4)
    cells = [cell for cell in saved.cells if cell.cell_type == "code"]
    errors = [out.evalue for cell in cells for out in cell.outputs if out.output_type == "error"]
    assert errors == []
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    if name in STAGES:
        assert (project / "runs" / "demo" / name / "manifest.json").is_file()
