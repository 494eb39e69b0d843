"""Sweeps on tiny real notebooks: shared stages once, failures alone, taken up again after a kill; Ray too."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from so8t_helpers.report.comparison import comparison_path, write_comparison
from so8t_helpers.run.files import StageError
from so8t_helpers.run.stage import STAGES, read_manifest, stale_reason
from so8t_helpers.settings import Settings, SettingsError, merge
from so8t_helpers.verbs import batch, sweep
from so8t_helpers.verbs.arguments import parse_grid
from so8t_helpers.verbs.sweep import Point, points
from tests.small_notebooks import code, small_settings, write_notebook

TWO = STAGES[:2]
GRID = {"pet.huber_delta": [0.5, 1.0], "lora.r": [4, 8]}


def test_a_grid_is_yaml_with_one_axis_a_key():
    texts = ["so8t.layer_indices=[0, 1],null", "model.quantization=int8,none", "lora.r=4"]
    assert parse_grid(texts) == {
        "so8t.layer_indices": [[0, 1], None],
        "model.quantization": ["int8", "none"],
        "lora.r": [4],
    }


@pytest.mark.parametrize(
    "texts", [["lora.r"], ["r=1,2"], ["lora.r="], ["lora.r=[1"], ["lora.r=1", "lora.r=2"]]
)
def test_another_grid_is_an_error(texts: list[str]):
    with pytest.raises(SettingsError, match="--grid"):
        parse_grid(texts)


def test_each_combination_is_a_run_with_a_name_of_its_own(scratch_settings: Settings):
    found = points(scratch_settings, GRID)
    assert [point.settings.run.name for point in found] == [
        "demo-huber_delta-0.5-r-4",
        "demo-huber_delta-0.5-r-8",
        "demo-huber_delta-1.0-r-4",
        "demo-huber_delta-1.0-r-8",
    ]
    assert found[1].settings.lora.r == 8
    long = points(scratch_settings, {"eval.ollama_url": ["http://" + "a" * 90, "http://" + "a" * 91]})
    assert len({point.settings.run.name for point in long}) == 2
    with pytest.raises(SettingsError, match=r"did you mean `lora\.r`"):
        points(scratch_settings, {"lora.rr": [1]})


@pytest.fixture
def scratch_settings(tmp_path: Path) -> Settings:
    return small_settings(tmp_path)


@pytest.fixture
def notebooks(tmp_path: Path) -> Path:
    """01 writes the same for all points, 02 what depends on `lora.r`."""
    folder = tmp_path / "notebooks"
    for stage in TWO:
        write_notebook(folder, stage, content="{settings.lora.r}" if stage == "02_train" else "a")
    return folder


def _states(found: list[Point]) -> list[list[str]]:
    return [list(point.states.values()) for point in found]


def _counts(found: list[Point]) -> int:
    files = [point.settings.run_dir / "count.txt" for point in found]
    return sum(len(file.read_text().split()) for file in files if file.is_file())


@pytest.mark.slow
def test_shared_stages_run_once_and_a_second_call_finds_all_fresh(
    scratch_settings: Settings, notebooks: Path
):
    # 01 does not depend on either key, 02 on both.
    found = points(scratch_settings, GRID)
    sweep.carry_out(found, TWO)
    assert _states(found) == [["done", "done"]] + [["shared", "done"]] * 3
    assert _counts(found) == 5
    for point in found:
        for stage in TWO:
            assert stale_reason(point.settings, stage) is None
            assert batch.due_reason(point.settings, stage) is None
            assert (point.settings.reports_dir / f"{stage}.html").is_file()
    # As after a kill between a stage's record and its report.
    lost = [
        found[0].settings.reports_dir / "02_train.html",
        found[3].settings.reports_dir / "01_dataset.html",
    ]
    for page in lost:
        page.unlink()
    again = points(scratch_settings, GRID)
    sweep.carry_out(again, TWO)
    assert _states(again) == [["fresh", "fresh"]] * 4
    assert _counts(again) == 5
    assert all(page.is_file() for page in lost)

    page = write_comparison([point.settings for point in found], "demo-sweep").read_text(encoding="utf-8")
    assert "pet.huber_delta" in page
    assert "lora.alpha" not in page
    assert comparison_path(scratch_settings, "demo-sweep").is_file()


@pytest.mark.slow
def test_a_point_that_fails_stops_alone(scratch_settings: Settings, notebooks: Path):
    write_notebook(notebooks, "02_train", code("assert settings.lora.r != 4, 'too small'"))
    found = points(scratch_settings, {"lora.r": [4, 8]})
    sweep.carry_out(found, TWO)
    assert _states(found) == [["done", "failed"], ["shared", "done"]]
    assert "02_train ended with 1" in found[0].stopped
    assert not found[1].stopped
    assert "too small" in (found[0].settings.run_dir / "log.txt").read_text(encoding="utf-8")
    assert "too small" in (found[0].settings.reports_dir / "index.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_shared_stage_that_fails_is_not_tried_by_every_point(scratch_settings: Settings, notebooks: Path):
    write_notebook(notebooks, "01_dataset", code("raise ValueError"))
    found = points(scratch_settings, {"lora.r": [4, 8]})
    sweep.carry_out(found, TWO)
    assert _states(found) == [["failed"], ["failed"]]
    assert "failed in demo-r-4" in found[1].stopped
    assert _counts(found) == 1


@pytest.mark.slow
def test_a_killed_sweep_is_taken_up_again(scratch_settings: Settings, notebooks: Path):
    """The sweep is killed while points train; the same command ends with each stage done once."""
    write_notebook(notebooks, "02_train", code("import time; time.sleep(3)"))
    run = scratch_settings.run
    command = [sys.executable, "-m", "so8t_helpers", "sweep", "demo", "--grid", "lora.r=4,8", "--to", "2"]
    for key in ("root", "reports_root", "notebooks"):
        command += ["--set", f"run.{key}={getattr(run, key)}"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    done = Path(run.root) / "demo-r-8" / "01_dataset" / "manifest.json"
    deadline = time.monotonic() + 120
    while not done.is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1.0)
    first.kill()
    assert first.wait() != 0
    second = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert second.returncode == 0, second.stdout + second.stderr
    last = second.stdout.strip().splitlines()[-1]
    assert last.startswith("demo-sweep: 2 of 2 points done; comparison: ")
    found = points(scratch_settings, {"lora.r": [4, 8]})
    assert [read_manifest(point.settings, stage) is not None for point in found for stage in TWO] == [
        True
    ] * 4
    # 01 once, 02 once a point; a training that was cut short may have been counted by neither.
    assert _counts(found) == 3


@pytest.mark.slow
def test_a_stage_is_not_taken_over_when_its_input_differs(scratch_settings: Settings, notebooks: Path):
    donor = merge(scratch_settings, {"run": {"name": "donor"}})
    heir = merge(scratch_settings, {"run": {"name": "heir"}})
    batch.run_stages(donor, TWO)
    write_notebook(notebooks, "01_dataset", content="other")
    batch.run_stages(heir, TWO[:1])
    assert not sweep.adopt(heir, "02_train", donor)
    assert not sweep.adopt(merge(heir, {"dataset": {"eval_share": 0.3}}), "01_dataset", donor)
    assert sweep.adopt(heir, "01_dataset", donor)
    assert sweep.adopt(heir, "02_train", donor)
    assert batch.due_reason(heir, "02_train") is None
    manifest = read_manifest(heir, "02_train")
    assert manifest is not None
    assert all(entry["path"].startswith(str(heir.run_dir)) for entry in manifest["inputs"].values())


@pytest.mark.slow
def test_a_local_ray_cluster_carries_a_sweep_out(scratch_settings: Settings, notebooks: Path):
    ray = pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        found = points(scratch_settings, {"lora.r": [4, 8]})
        sweep.carry_out(found, TWO, sweep.ray_cluster())
        assert _states(found) == [["done", "done"], ["shared", "done"]], [p.stopped for p in found]
    finally:
        ray.shutdown()


def test_processes_share_out_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    command = [sys.executable, "-c", "import os; print(os.environ['OMP_NUM_THREADS'])"]
    for tasks, share in ((1, "8"), (2, "4"), (5, "4")):
        logs = [tmp_path / f"{tasks}-{i}.txt" for i in range(tasks)]
        assert list(sweep.processes(2)([(command, str(log)) for log in logs])) == [0] * tasks
        assert [log.read_text().strip() for log in logs] == [share] * tasks


def test_a_comparison_needs_two_runs_that_exist(scratch_settings: Settings):
    with pytest.raises(StageError, match="no run demo"):
        write_comparison([scratch_settings, scratch_settings], "x")
