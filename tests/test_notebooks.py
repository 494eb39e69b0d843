"""The committed notebooks: their form, and that each runs, by the verb and by hand with papermill."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup

from so8t_helpers.run.files import read_jsonl
from so8t_helpers.run.stage import STAGES, executed_path, read_manifest, stale_reason
from so8t_helpers.settings import PARAMS_DIR, PROJECT_ROOT, Settings, merge
from tests.small_notebooks import PARAMETERS

NOTEBOOKS = sorted((PROJECT_ROOT / "notebooks").glob("*.ipynb"))
NUMBERED = [path for path in NOTEBOOKS if path.stem in STAGES]
MOST_LINES = 12


def _cells(path: Path, kind: str | None = None, tag: str | None = None) -> list[nbformat.NotebookNode]:
    cells = nbformat.read(path, as_version=4).cells
    return [
        cell
        for cell in cells
        if (kind is None or cell.cell_type == kind) and (tag is None or tag in cell.metadata.get("tags", []))
    ]


def test_every_stage_has_its_notebook():
    assert [path.stem for path in NUMBERED] == list(STAGES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_outputs_and_with_the_plain_kernel(path: Path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert "papermill" not in notebook.metadata
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
        assert set(cell.metadata) <= {"tags"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_are_short_and_hold_no_functions(path: Path):
    for cell in _cells(path, "code"):
        assert len(cell.source.splitlines()) <= MOST_LINES, cell.source
        defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
        tree = ast.parse(cell.source)
        assert not [node for node in ast.walk(tree) if isinstance(node, defined[:3])], cell.source


@pytest.mark.parametrize("path", NUMBERED, ids=lambda path: path.stem)
def test_a_numbered_notebook_opens_with_its_question_and_ends_with_its_answer(path: Path):
    cells = _cells(path)
    assert cells[0].cell_type == "markdown"
    assert cells[0].source.startswith("# ")
    assert "?" in cells[0].source
    (parameters,) = _cells(path, "code", "parameters")
    assert parameters.source.strip() == PARAMETERS
    (answer,) = _cells(path, "code", "answer")
    assert answer is _last_code(cells) or answer.source == _last_code(cells).source
    assert 15 <= len(cells) <= 30


def _last_code(cells: list[nbformat.NotebookNode]) -> nbformat.NotebookNode:
    return [cell for cell in cells if cell.cell_type == "code"][-1]


@pytest.mark.parametrize("path", NUMBERED, ids=lambda path: path.stem)
def test_every_figure_has_alt_text_of_its_own(path: Path):
    for cell in _cells(path, "code"):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {"style.show", "show"}:
                assert any(keyword.arg == "alt" for keyword in node.keywords) or len(node.args) == 2, (
                    cell.source
                )


@pytest.mark.slow
def test_the_demo_leaves_every_artefact_and_report(demo_run: Settings):
    for stage in STAGES:
        assert read_manifest(demo_run, stage) is not None
        assert executed_path(demo_run, stage).is_file()
        html = (demo_run.reports_dir / f"{stage}.html").read_text(encoding="utf-8")
        assert 'aria-label="This run&#39;s answer"' in html or "This run’s answer" in html
        assert len(html.encode()) <= 2_000_000
    for page in (demo_run.reports_dir / "index.html", demo_run.reports_dir.parent / "index.html"):
        assert page.is_file()


@pytest.mark.slow
def test_a_second_run_skips_everything_quickly(demo_run: Settings):
    started = time.perf_counter()
    done = _so8t(demo_run, "run", "demo")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": fresh") == len(STAGES)
    assert done.stdout.strip().splitlines()[-1].startswith("demo: 0 stages carried out, 5 fresh")
    assert time.perf_counter() - started < 20


@pytest.mark.slow
def test_one_notebook_by_hand_with_papermill(demo_run: Settings, tmp_path: Path):
    """As the README says, from another folder; only the run's place is this test's own."""
    settings = merge(demo_run, {"run": {"root": str(tmp_path / "runs")}, "training": {"max_steps": 2}})
    shutil.copytree(demo_run.run_dir / "01_dataset", settings.run_dir / "01_dataset")
    shutil.copytree(demo_run.run_dir.parent / ".demo", settings.run_dir.parent / ".demo")
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(PROJECT_ROOT / "notebooks" / "02_train.ipynb"),
        "out.ipynb",
    ]
    command += ["-f", str(PARAMS_DIR / "demo.yaml")]
    profile = yaml.safe_load((PARAMS_DIR / "demo.yaml").read_text(encoding="utf-8"))
    sections = {"run": settings.run.model_dump(), "training": profile["training"] | {"max_steps": 2}}
    command += ["-y", yaml.safe_dump(sections)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert stale_reason(settings, "02_train") is None


def _so8t(settings: Settings, *arguments: str) -> subprocess.CompletedProcess[str]:
    folders = [f"run.root={settings.run.root}", f"run.reports_root={settings.run.reports_root}"]
    command = [sys.executable, "-m", "so8t_helpers", *arguments]
    command += [part for folder in folders for part in ("--set", folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


@pytest.mark.slow
def test_a_default_runs_reports_show_no_thinking_but_the_datasets_marked_samples(demo_run: Settings):
    folder = demo_run.run_dir / "01_dataset"
    rows = [*read_jsonl(folder / "eval.jsonl"), *read_jsonl(folder / "train.jsonl")]
    shown = "\n".join(row["final"] + row["prompt"] for row in rows)
    # Short lines, and those that a prompt or an answer quotes, may stand anywhere.
    private = {line for row in rows for line in row["thinking"].splitlines() if len(line) > 7}
    private = {line for line in private if line not in shown}
    assert len(private) > 100
    found = {}
    for page in demo_run.reports_dir.glob("*.html"):
        text = BeautifulSoup(page.read_text("utf-8"), "html.parser").get_text("\n")
        found[page.stem] = [line for line in private if line in text]
    assert found.pop("01_dataset"), "the samples of 01 are there to be read"
    assert set(found) >= set(STAGES[1:])
    assert not any(found.values()), found
