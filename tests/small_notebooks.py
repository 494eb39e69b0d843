"""Tiny real notebooks for the tests of the batch and of the reports."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from so8t_helpers.settings import Settings, load_settings

PARAMETERS = 'profile = "demo"'
# Not `notebook.settings`, which makes the demo's base: these stages read none.
SETTINGS = """from so8t_helpers.notebook import from_parameters
settings = from_parameters(globals())"""
# Reads what the stage before it wrote and writes its own file; counts how often it was carried out.
STAGE = """from so8t_helpers.run.stage import STAGES, open_stage
with open_stage(settings, "{stage}") as stage:
    number = STAGES.index("{stage}")
    if number:
        stage.read_file("before", settings.run_dir / STAGES[number - 1] / "out.txt")
    (stage.directory / "out.txt").write_text("{content}", encoding="utf-8")
    stage.facts["records"] = 1520
with (settings.run_dir / "count.txt").open("a") as file: file.write("{stage} ")"""
ANSWER = """from IPython.display import Markdown, display
display(Markdown("**1,520 records** were kept. 良い結果です。"))"""


def small_settings(folder: Path) -> Settings:
    """Return the demo's settings with runs, reports and notebooks in `folder`."""
    places = {"root": "runs", "reports_root": "reports", "notebooks": "notebooks"}
    return load_settings("demo", {"run": {key: str(folder / name) for key, name in places.items()}})


def code(source: str, *tags: str) -> nbformat.NotebookNode:
    """Make a code cell with tags."""
    return new_code_cell(source, metadata={"tags": list(tags)} if tags else {})


def write_notebook(folder: Path, stage: str, *cells: nbformat.NotebookNode, content: str = "a") -> Path:
    """Write `<stage>.ipynb` that carries the stage out and then runs `cells`."""
    notebook = new_notebook(
        cells=[
            new_markdown_cell(f"# Small {stage}\n\nWhat does it ask? 質問です。"),
            code(PARAMETERS, "parameters"),
            code(SETTINGS),
            code(STAGE.format(stage=stage, content=content)),
            *cells,
            code(ANSWER, "answer"),
        ],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stage}.ipynb"
    nbformat.write(notebook, path)
    return path
