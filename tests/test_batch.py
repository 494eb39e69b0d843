"""The batch on tiny real notebooks through real papermill and real kernels."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from so8t_helpers.__main__ import main
from so8t_helpers.run.files import StageError, write_yaml
from so8t_helpers.run.stage import STAGES, executed_path, read_manifest, stage_name
from so8t_helpers.settings import Settings, SettingsError, merge
from so8t_helpers.verbs import batch
from tests.small_notebooks import code, small_settings, write_notebook

TWO = STAGES[:2]


@pytest.fixture
def scratch_settings(tmp_path: Path) -> Settings:
    return small_settings(tmp_path)


@pytest.fixture
def notebooks(tmp_path: Path) -> Path:
    for stage in TWO:
        write_notebook(tmp_path / "notebooks", stage)
    return tmp_path / "notebooks"


def _states(outcomes: list[batch.Outcome]) -> list[tuple[str, str]]:
    return [(outcome.stage[:2], outcome.state) for outcome in outcomes]


def _count(settings: Settings) -> list[str]:
    return (settings.run_dir / "count.txt").read_text().split()


def test_stages_run_once_and_again_only_for_a_reason(scratch_settings: Settings, notebooks: Path):
    settings = scratch_settings
    assert _states(batch.run_stages(settings, TWO)) == [("01", "done"), ("02", "done")]
    assert _states(batch.run_stages(settings, TWO)) == [("01", "fresh"), ("02", "fresh")]
    assert len(_count(settings)) == 2
    for stage in TWO:
        assert executed_path(settings, stage).is_file()
        assert (settings.reports_dir / f"{stage}.html").is_file()

    # Another setting of 01 that leaves its output as it was: 02 has nothing new to read.
    changed = merge(settings, {"dataset": {"eval_share": 0.2}})
    assert _states(batch.run_stages(changed, TWO)) == [("01", "done"), ("02", "fresh")]

    # Another output of 01: 02 must follow.
    write_notebook(notebooks, "01_dataset", content="b")
    outcomes = batch.run_stages(settings, TWO)
    assert _states(outcomes) == [("01", "done"), ("02", "done")]
    assert outcomes[0].detail.startswith("setting dataset.eval_share changed")
    assert outcomes[1].detail.startswith("input before changed")

    assert _states(batch.run_stages(settings, ("02_train",), True)) == [("02", "done")]

    # A lost report is made again from the executed notebook, not by running.
    before = len(_count(settings))
    (settings.reports_dir / "02_train.html").unlink()
    assert _states(batch.run_stages(settings, TWO)) == [("01", "fresh"), ("02", "fresh")]
    assert (settings.reports_dir / "02_train.html").is_file()
    assert len(_count(settings)) == before


def test_several_profiles_run_one_after_the_other_and_one_that_fails_stops_alone(
    scratch_settings: Settings, notebooks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write_notebook(notebooks, "01_dataset", code("assert settings.lora.r != 4, 'too small'"))
    profiles = []
    for name, r in (("small", 4), ("large", 8)):
        settings = merge(scratch_settings, {"run": {"name": name}, "lora": {"r": r}})
        profiles.append(tmp_path / f"{name}.yaml")
        write_yaml(profiles[-1], settings.model_dump())
    assert main(["run", *map(str, profiles), "--only", "1"]) == 1
    said = capsys.readouterr().out
    assert "small: stage 01_dataset failed: AssertionError: too small" in said
    assert "large: 1 stages carried out, 0 fresh" in said
    index = (Path(scratch_settings.run.reports_root) / "index.html").read_text(encoding="utf-8")
    assert 'href="small/index.html"' in index
    assert 'href="large/index.html"' in index


def test_a_failing_cell_keeps_notebook_and_report_and_stops_the_run(
    scratch_settings: Settings, notebooks: Path
):
    write_notebook(notebooks, "01_dataset", code("raise ValueError('the disk\\nis on fire')"))
    outcomes = batch.run_stages(scratch_settings, TWO)
    assert _states(outcomes) == [("01", "failed")]
    assert outcomes[0].detail == "ValueError: the disk"
    assert read_manifest(scratch_settings, "01_dataset") is not None, "the stage itself had been completed"
    html = (scratch_settings.reports_dir / "01_dataset.html").read_text(encoding="utf-8")
    assert html.index("ValueError: the disk") < html.index("Traceback")
    assert "An Exception was encountered" not in html
    assert (scratch_settings.reports_dir / "index.html").read_text(encoding="utf-8").count("ValueError") == 1

    write_notebook(notebooks, "01_dataset")
    outcomes = batch.run_stages(scratch_settings, TWO)
    assert _states(outcomes) == [("01", "done"), ("02", "done")]
    assert outcomes[0].detail.startswith("its notebook failed")


def test_a_killed_kernel_is_a_failure_though_papermill_calls_its_cells_completed(
    scratch_settings: Settings, notebooks: Path
):
    write_notebook(notebooks, "01_dataset", code("import os\nos.kill(os.getpid(), 9)"))
    outcomes = batch.run_stages(scratch_settings, TWO)
    assert _states(outcomes) == [("01", "failed")]
    assert "kernel died" in outcomes[0].detail
    html = (scratch_settings.reports_dir / "01_dataset.html").read_text(encoding="utf-8")
    assert "the kernel died" in html
    assert batch.due_reason(scratch_settings, "01_dataset") == "its notebook failed"


def test_an_old_manifest_does_not_pass_for_a_new_one(scratch_settings: Settings, notebooks: Path):
    assert _states(batch.run_stages(scratch_settings, TWO[:1])) == [("01", "done")]
    path = notebooks / "01_dataset.ipynb"
    path.write_text(write_without_stage(path), encoding="utf-8")
    outcomes = batch.run_stages(scratch_settings, TWO[:1], force=True)
    assert _states(outcomes) == [("01", "failed")]
    assert "left no new manifest" in outcomes[0].detail


def write_without_stage(path: Path) -> str:
    """Return the notebook without the cell that carries the stage out."""
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "open_stage" not in cell.source]
    return nbformat.writes(notebook)


def test_cache_folders_reach_the_kernel_and_the_environment_comes_back(
    scratch_settings: Settings, tmp_path: Path
):
    cell = code(
        "import os, sys, tempfile\nfrom so8t_helpers.run.files import write_text\n"
        "lines = [os.environ['HF_HOME'], tempfile.gettempdir(), sys.executable]\n"
        "write_text(settings.run_dir / 'seen.txt', '\\n'.join(lines))"
    )
    write_notebook(tmp_path / "notebooks", "01_dataset", cell)
    cache = {"hf_home": str(tmp_path / "hf"), "temp_dir": str(tmp_path / "scratch")}
    settings = merge(scratch_settings, {"cache": cache})
    before = dict(os.environ)
    outcomes = batch.run_stages(settings, TWO[:1])
    assert _states(outcomes) == [("01", "done")], outcomes
    import sys

    seen = (settings.run_dir / "seen.txt").read_text(encoding="utf-8").split("\n")
    assert (seen[0], seen[2]) == (cache["hf_home"], sys.executable)
    assert Path(seen[1]).parent == Path(cache["temp_dir"])
    assert list(Path(cache["temp_dir"]).iterdir()) == [], "what is temporary goes with the stage"
    assert dict(os.environ) == before


def test_preflight_finds_what_would_stop_the_run_later(scratch_settings: Settings, notebooks: Path):
    with pytest.raises(StageError, match="missing notebook"):
        batch.preflight(scratch_settings, STAGES)
    with pytest.raises(StageError, match="02_train reads 01_dataset, which has not been completed"):
        batch.preflight(scratch_settings, ("02_train",))
    with pytest.raises(SettingsError, match=r"training\.dataset_dir: no folder"):
        batch.preflight(merge(scratch_settings, {"training": {"dataset_dir": "/gone"}}), TWO)
    with pytest.raises(SettingsError, match=r"dataset\.inputs: no file matches 'nothing/\*\.jsonl'"):
        batch.preflight(merge(scratch_settings, {"dataset": {"inputs": ["nothing/*.jsonl"]}}), TWO)
    assert not scratch_settings.run_dir.exists(), "a refused run leaves nothing behind"


def test_preflight_looks_at_the_stages_from_the_first_that_is_due(
    scratch_settings: Settings, notebooks: Path, monkeypatch: pytest.MonkeyPatch
):
    looked: list[str] = []
    monkeypatch.setattr(batch, "check_stage", lambda settings, stage: looked.append(stage))
    for force, expected in ((False, []), (True, list(TWO))):
        batch.run_stages(scratch_settings, TWO)
        looked.clear()
        batch.preflight(scratch_settings, TWO, force)
        assert looked == expected
    looked.clear()
    batch.preflight(merge(scratch_settings, {"lora": {"r": 4}}), TWO)
    assert looked == ["02_train"]


def test_a_disk_that_is_too_small_is_found_before_the_start(
    scratch_settings: Settings, notebooks: Path, monkeypatch: pytest.MonkeyPatch
):
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 2**40, 2**20))
    with pytest.raises(StageError, match="run demo needs"):
        batch.run_stages(scratch_settings, TWO)


@pytest.mark.parametrize(
    ("text", "stage"),
    [
        ("02_train", "02_train"),
        ("2", "02_train"),
        ("02", "02_train"),
        ("train", "02_train"),
        ("eval", "05_ollama_eval"),
    ],
)
def test_stages_by_name_number_and_short_name(text: str, stage: str):
    assert stage_name(text) == stage


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "demo", "--only", "trian"], "unknown stage 'trian'; did you mean 02_train?"),
        (["run", "dmeo"], "no file"),
        (["run", "demo", "--set", "lora.rr=3"], "did you mean `lora.r`?"),
        (["run", "demo", "--set", "lora.r=a"], "valid integer, got 'a'"),
        (
            ["run", "demo", "--only", "2", "--set", "training.dataset_dir=/gone"],
            "training.dataset_dir: no folder",
        ),
    ],
)
def test_a_user_s_error_is_one_line_and_status_2(capsys, arguments: list[str], message: str):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
