"""A stage without its manifest did not happen; one whose settings, inputs or outputs changed is stale."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from so8t_helpers.run import files
from so8t_helpers.run import stage as run_stage
from so8t_helpers.run.files import (
    StageError,
    atomic_directory,
    atomic_path,
    read_jsonl,
    write_json,
    write_jsonl,
)
from so8t_helpers.run.stage import open_stage, read_manifest, stale_reason
from so8t_helpers.settings import Settings, SettingsError, merge


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "records.jsonl"
    path.write_text("{}\n", encoding="utf-8")
    return path


def _carry_out(settings: Settings, source: Path, name: str = "01_dataset") -> None:
    with open_stage(settings, name) as stage:
        stage.read_file("records", source)
        write_json(stage.directory / "out.json", {"数": 1})
        (stage.directory / "out.json.lock").touch()  # holds nothing: no output
        stage.facts["records"] = 1


def test_a_completed_stage_is_fresh_and_says_what_it_read_and_wrote(scratch_settings: Settings, source: Path):
    assert stale_reason(scratch_settings, "01_dataset") == "has not been completed"
    _carry_out(scratch_settings, source)
    assert stale_reason(scratch_settings, "01_dataset") is None
    manifest = read_manifest(scratch_settings, "01_dataset")
    assert manifest is not None
    assert manifest["facts"] == {"records": 1}
    assert manifest["inputs"]["records"]["sha256"] == files.sha256_file(source)
    assert list(manifest["outputs"]) == ["out.json"]


def test_what_makes_a_stage_stale(scratch_settings: Settings, source: Path):
    _carry_out(scratch_settings, source)
    out = scratch_settings.run_dir / "01_dataset" / "out.json"
    kept = out.read_bytes()

    changed = merge(scratch_settings, {"dataset": {"eval_share": 0.2}})
    assert stale_reason(changed, "01_dataset") == "setting dataset.eval_share changed"
    other = merge(scratch_settings, {"lora": {"r": 8}})
    assert stale_reason(other, "01_dataset") is None, "a stage depends on its own settings alone"

    out.write_bytes(b"{}")
    assert stale_reason(scratch_settings, "01_dataset") == "output out.json changed"
    out.unlink()
    assert stale_reason(scratch_settings, "01_dataset") == "output out.json is gone"
    out.write_bytes(kept)
    assert stale_reason(scratch_settings, "01_dataset") is None

    source.write_text("{}\n{}\n", encoding="utf-8")
    assert stale_reason(scratch_settings, "01_dataset") == "input records changed"
    source.unlink()
    assert stale_reason(scratch_settings, "01_dataset") == "input records is gone"


def test_a_stage_that_fails_leaves_no_manifest_not_even_the_old_one(scratch_settings: Settings, source: Path):
    _carry_out(scratch_settings, source)
    with pytest.raises(ZeroDivisionError), open_stage(scratch_settings, "01_dataset"):
        raise ZeroDivisionError
    assert read_manifest(scratch_settings, "01_dataset") is None


def test_a_missing_input_says_what_makes_it(scratch_settings: Settings, tmp_path: Path):
    with (
        pytest.raises(StageError, match=r"missing input a: no file .*gone; run 01"),
        open_stage(scratch_settings, "02_train") as stage,
    ):
        stage.read_file("a", tmp_path / "gone", made_by="run 01")


def test_every_setting_of_a_stage_exists():
    for stage in run_stage.STAGES:
        assert run_stage.stage_settings(Settings(), stage)


def test_an_atomic_file_is_whole_or_not_there(tmp_path: Path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), atomic_path(path) as scratch:
        scratch.write_bytes(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"
    with atomic_path(path) as scratch:
        scratch.write_bytes(b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_an_atomic_directory_takes_the_old_one_s_place(tmp_path: Path):
    folder = tmp_path / "d"
    for content in ("old", "new"):
        with atomic_directory(folder) as scratch:
            (scratch / content).touch()
    with pytest.raises(ZeroDivisionError), atomic_directory(folder) as scratch:
        raise ZeroDivisionError
    assert [p.name for p in folder.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_json_lines_come_back_with_lf_ends_and_japanese_as_it_is(tmp_path: Path):
    rows = [{"質問": "今日は\n?"}, {"b": 2}]
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, rows)
    assert read_jsonl(path) == rows
    assert path.read_bytes().count(b"\n") == 2
    assert "質問" in path.read_text(encoding="utf-8")


def test_the_hash_cache_notices_a_change(tmp_path: Path):
    path, cache = tmp_path / "a", files.HashCache(tmp_path / "cache.json")
    path.write_bytes(b"1")
    first = cache.sha256(path)
    cache.save()
    path.write_bytes(b"22")
    again = files.HashCache(tmp_path / "cache.json")
    assert json.loads((tmp_path / "cache.json").read_text(encoding="utf-8"))[str(path)][-1] == first
    assert again.sha256(path) == files.sha256_file(path) != first


def test_too_small_a_disk_is_an_error_that_says_what_to_do(tmp_path: Path):
    with pytest.raises(
        StageError, match=r"run x needs 8388608\.0 GiB .* set run\.root to a folder on a larger"
    ):
        files.check_disk(tmp_path / "not" / "yet", 2**53, "run x")
    files.check_disk(tmp_path, 1, "run x")


def test_a_named_input_folder_must_exist(scratch_settings: Settings, tmp_path: Path):
    assert (
        run_stage.stage_input(scratch_settings, None, "01_dataset") == scratch_settings.run_dir / "01_dataset"
    )
    assert run_stage.stage_input(scratch_settings, str(tmp_path), "01_dataset") == tmp_path
    with pytest.raises(SettingsError, match="no folder"):
        run_stage.stage_input(scratch_settings, str(tmp_path / "gone"), "01_dataset")
