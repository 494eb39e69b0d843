"""What leaves the machine in a zip: the pages, whole and linked to each other, and nothing else."""

from __future__ import annotations

import getpass
import html
import platform
import zipfile
from pathlib import Path

import pytest
from bs4 import BeautifulSoup

from so8t_helpers.__main__ import main
from so8t_helpers.dataset.figures import draw_samples
from so8t_helpers.report.export import write_zip
from so8t_helpers.run.files import StageError, read_jsonl
from so8t_helpers.settings import PROJECT_ROOT, Settings
from so8t_helpers.verbs import batch
from tests.small_notebooks import code, small_settings, write_notebook


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("export")
    settings = small_settings(folder)
    cell = code("import pathlib\nprint(pathlib.Path.home() / 'models', settings.run_dir)")
    write_notebook(folder / "notebooks", "01_dataset", cell)
    batch.run_stages(settings, ("01_dataset",))
    return settings


def test_a_zip_holds_linked_pages_alone_and_no_trace_of_the_machine(finished: Settings, tmp_path: Path):
    path = write_zip(finished, tmp_path / "demo.zip")
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["demo/01_dataset.html", "demo/index.html"]
        archive.extractall(tmp_path)
        everything = "".join(archive.read(name).decode() for name in archive.namelist())
    for word in (str(PROJECT_ROOT), finished.run.root, f"/{getpass.getuser()}/"):
        assert word not in everything
    for page in (tmp_path / "demo").iterdir():
        links = [
            a["href"] for a in BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser").select("a")
        ]
        own = [link for link in links if not link.startswith("#")]
        missing = [link for link in own if not (page.parent / link).is_file()]
        # The stages that have not been carried out have no page to lead to.
        assert set(missing) <= {
            f"{stage}.html" for stage in ("02_train", "03_bake", "04_gguf", "05_ollama_eval")
        }
    again = write_zip(finished, tmp_path / "again.zip")
    assert again.read_bytes() == path.read_bytes()


def test_a_page_that_names_the_machine_is_refused(finished: Settings, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(platform, "node", lambda: "hanako-desktop")
    page = finished.reports_dir / "01_dataset.html"
    kept = page.read_text(encoding="utf-8")
    page.write_text(kept.replace("</main>", "made on hanako-desktop</main>"), encoding="utf-8")
    try:
        with pytest.raises(StageError, match=r"(?s)01_dataset\.html names this machine: .*hanako-desktop"):
            write_zip(finished, tmp_path / "x.zip")
    finally:
        page.write_text(kept, encoding="utf-8")
    assert list(tmp_path.iterdir()) == []


def test_the_verb_takes_a_run_s_name_and_says_which_exist(finished: Settings, tmp_path: Path, capsys):
    folders = [
        "--set",
        f"run.root={finished.run.root}",
        "--set",
        f"run.reports_root={finished.run.reports_root}",
    ]
    assert main(["export", "demo", "--output", str(tmp_path / "a.zip"), *folders]) == 0
    assert (tmp_path / "a.zip").is_file()
    assert main(["export", "gone", *folders]) == 2
    assert "no run 'gone'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demo_s_zip_holds_the_thinking_of_its_ten_chosen_samples_and_no_other(
    demo_run: Settings, tmp_path: Path
):
    path = write_zip(demo_run, tmp_path / "demo.zip")
    with zipfile.ZipFile(path) as archive:
        assert {Path(name).suffix for name in archive.namelist()} == {".html"}
        everything = "".join(archive.read(name).decode() for name in archive.namelist())
    assert path.stat().st_size < 5_000_000
    rows = [row for split in ("train", "eval") for row in read_jsonl(_split(demo_run, split))]
    chosen = draw_samples(_split(demo_run, "train").parent, count=10, seed=demo_run.run.seed)
    thoughts = {html.escape(row["thinking"]) for row in rows if row["thinking"]}
    shown = {html.escape(row["thinking"]) for row in chosen}
    assert len(thoughts) > 500
    assert {text for text in thoughts if text in everything} <= shown


def _split(settings: Settings, split: str) -> Path:
    return settings.run_dir / "01_dataset" / f"{split}.jsonl"
