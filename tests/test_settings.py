"""Profiles: what is read, and that each way to get one wrong has one clear error."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from so8t_helpers.notebook import from_parameters
from so8t_helpers.settings import (
    PARAMS_DIR,
    PROJECT_ROOT,
    Settings,
    SettingsError,
    load_settings,
    merge,
    resolve,
)
from so8t_helpers.verbs.arguments import parse_assignment


def _profile(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", sorted(PARAMS_DIR.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_committed_profile_loads_under_its_own_name(path: Path):
    assert load_settings(path.stem).profile == path.stem


def test_rtx3060_is_the_seed():
    settings = load_settings("rtx3060")
    assert settings.model.base == "AXCXEPT/Borea-Phi-3.5-mini-Instruct-Jp"
    assert (settings.lora.r, settings.lora.alpha, settings.lora.dropout) == (64, 128, 0.05)
    assert settings.training.gradient_accumulation == 16
    assert settings.training.sequence_length == 2048
    assert settings.pet.phase_shares == [0.2, 0.4, 0.4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora: {rr: 3}", "unknown key `lora.rr`; did you mean `lora.r`?"),
        ("loar: {r: 3}", "unknown key `loar`; did you mean `lora`?"),
        ('lora: {r: "64"}', "`lora.r`: input should be a valid integer, got '64'"),
        ("training: {learning_rate: 1e-4}", "write 1.0e-4"),
        ("lora: {r: 0}", "greater than or equal to 1"),
        ("pet: {phase_shares: [0.2, 0.2, 0.2]}", "three shares that add up to 1"),
        ("training: {precision: int4}", "'fp16', 'bf16' or 'fp32'"),
        ("run: {name: ../else}", "should match pattern"),
        (
            "dataset: {personal_names: cues, personal_data: 'off'}",
            "`dataset.personal_names`: value error, does",
        ),
        ("- a\n- b", "expected sections such as `dataset:`"),
        ("lora: {r: [", "not valid YAML"),
    ],
)
def test_a_bad_profile_gives_one_error_that_names_the_file_and_the_key(
    tmp_path: Path, text: str, message: str
):
    path = _profile(tmp_path, text)
    with pytest.raises(SettingsError) as caught:
        load_settings(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_profile_names_those_that_exist():
    with pytest.raises(SettingsError, match="known profiles: demo, "):
        load_settings("dmeo")


def test_overrides_are_merged_key_by_key_and_checked():
    settings = load_settings("demo", {"lora": {"r": 8}})
    assert (settings.lora.r, settings.lora.alpha) == (8, load_settings("demo").lora.alpha)
    with pytest.raises(SettingsError, match="lora"):
        merge(settings, {"lora": {"r": "8"}})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("training.max_steps=20", {"training": {"max_steps": 20}}),
        ("so8t.layer_indices=[0, 3]", {"so8t": {"layer_indices": [0, 3]}}),
        ("training.dataset_dir=null", {"training": {"dataset_dir": None}}),
        ("dataset.think_command=", {"dataset": {"think_command": None}}),
    ],
)
def test_assignments_are_yaml(text: str, value: dict[str, object]):
    assert parse_assignment(text) == value


@pytest.mark.parametrize("text", ["training", "training.a.b=1", "=3", ".a=1", "a.b=["])
def test_other_assignments_are_errors(text: str):
    with pytest.raises(SettingsError, match="--set"):
        parse_assignment(text)


def test_a_notebook_s_variables_are_laid_over_its_profile():
    """Sections that papermill did not set are the notebook's own empty dicts."""
    parameters = {"profile": "demo", "lora": {"r": 4}, "so8t": {}, "unrelated": object()}
    settings = from_parameters(parameters)
    assert settings == load_settings("demo", {"lora": {"r": 4}})


def test_a_resolved_profile_reads_back_the_same(tmp_path: Path):
    settings = load_settings("rtx3060", {"run": {"name": "x"}})
    path = _profile(tmp_path, yaml.safe_dump(settings.model_dump()))
    assert load_settings(path) == settings


def test_relative_folders_belong_to_the_project_whatever_the_cwd(monkeypatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    assert Settings().run_dir == PROJECT_ROOT / "runs" / "demo"
    assert resolve(tmp_path / "x") == tmp_path / "x"
