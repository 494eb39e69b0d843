"""The study file: what it may say, what is wrong with a bad one, and the studies that ship."""

from __future__ import annotations

import copy
import math
import threading
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
import yaml
from filelock import FileLock
from safetensors.torch import save_file
from scipy.stats import kstest

from so8t_helpers.phi3.shape import read_shape
from so8t_helpers.run.files import StageError, write_json, write_yaml
from so8t_helpers.settings import PARAMS_DIR, PROJECT_ROOT, SettingsError
from so8t_helpers.study.data import for_tuning
from so8t_helpers.study.outcome import Outcome, key_of
from so8t_helpers.study.plan import STUDIES_DIR, arm_settings, load_study, matched_rank, own_values
from so8t_helpers.study.registration import changes, registration_path
from so8t_helpers.study.stage import alone, begin
from so8t_helpers.study.tuning import guess
from so8t_helpers.train.adapters import Adapters, count_parameters
from tests.phi3_folders import write_side_files
from tests.small_study import FILE, RATE, rows, small_base, small_study

SHIPPED = sorted(path.stem for path in STUDIES_DIR.glob("*.yaml"))


def written(folder: Path, change: dict[str, Any] | None = None, **over: Any) -> str:
    """A study file on the demo's profile; `change` goes into its arm `gates`."""
    content = copy.deepcopy({"profile": "demo", **FILE, **over})
    content["arms"]["gates"] |= change or {}
    path = folder / "s.yaml"
    write_yaml(path, content)
    return str(path)


@pytest.mark.parametrize(
    ("change", "over", "said"),
    [
        ({}, {"trails": 3}, "unknown key `trails`; did you mean `trials`?"),
        ({"tunes": {}}, {}, "unknown key `arms.gates.tunes`; did you mean `tune`?"),
        ({"set": {"lora.rank": 3}}, {}, "no setting `lora.rank`; did you mean `lora."),
        ({"set": {"dataset.inputs": []}}, {}, "an arm has no setting `dataset.inputs`"),
        ({"set": {"training.sequence_length": 64}}, {}, "is the same for all arms"),
        ({"set": {"lora.r": "four"}}, {}, "`lora.r`"),
        ({"tune": {"training.learning_rate": {"low": 1.0, "high": 0.1}}}, {}, "low must be below high"),
        ({"tune": {"training.learning_rate": {"low": 1e-6, "high": 1e-5}}}, {}, "the first trial"),
        ({"tune": {"lora.r": [8]}}, {}, "a choice needs two values"),
        ({"match_parameters": "none"}, {}, "no arm 'none'; arms: lora, more lora, gates"),
        ({}, {"control": "base"}, "`control`: no arm 'base'"),
        ({}, {"endpoints": {"main": "heldout.answer"}}, "`endpoints.main`"),
        ({}, {"seeds": 1}, "`seeds`"),
        ({}, {"tuning": "1e-1"}, "`tuning`"),
    ],
)
def test_a_bad_study_file_says_what_to_do(
    tmp_path: Path, change: dict[str, Any], over: dict[str, Any], said: str
):
    with pytest.raises(SettingsError) as error:
        load_study(written(tmp_path, change, **over))
    assert said in str(error.value)


def test_a_study_that_is_not_there_names_those_that_are():
    with pytest.raises(SettingsError, match=r"known studies: .*demo"):
        load_study("nothing")


@pytest.mark.parametrize("name", SHIPPED)
def test_the_studies_that_ship_are_whole(name: str):
    profile = yaml.safe_load((STUDIES_DIR / f"{name}.yaml").read_text(encoding="utf-8"))["profile"]
    if not (PARAMS_DIR / f"{profile}.yaml").is_file():
        pytest.skip(f"no profile {profile} here")
    study = load_study(name)
    assert study.file.control in study.file.arms
    for arm in study.file.arms:
        assert own_values(study, arm).keys() == study.file.arms[arm].tune.keys()
    assert study.settings.training.eval_samples is None, "all held-out documents count"


def test_a_matched_arm_has_the_smallest_rank_with_as_many_parameters(tmp_path: Path):
    write_side_files(tmp_path / "base", hidden_size=64, num_attention_heads=2, num_key_value_heads=2)
    shape = read_shape(tmp_path / "base")
    study = load_study(written(tmp_path), {"lora": {"r": 4, "alpha": 8}})
    matched = matched_rank(study, "more lora", shape)
    wanted = sum(count_parameters(arm_settings(study, "gates"), shape))
    settings = arm_settings(study, "more lora", matched)
    less = arm_settings(study, "more lora", {"lora.r": settings.lora.r - 1})
    assert sum(count_parameters(settings, shape)) >= wanted > sum(count_parameters(less, shape))
    assert settings.lora.alpha / settings.lora.r == 2, "the ratio is the profile's"
    assert matched_rank(study, "gates", shape) == {}


def test_parameters_are_counted_as_they_are_made(tmp_path: Path):
    write_side_files(tmp_path / "base", hidden_size=64, num_attention_heads=2, num_key_value_heads=2)
    shape = read_shape(tmp_path / "base")
    settings = arm_settings(load_study(written(tmp_path)), "gates")
    adapters = Adapters(shape, settings, torch.device("cpu"))
    assert count_parameters(settings, shape) == (adapters.lora.numel(), adapters.free.numel())


def test_adapters_that_begin_anew_are_as_new_ones_and_stay_in_place(tmp_path: Path):
    write_side_files(tmp_path / "base", hidden_size=64, num_attention_heads=2, num_key_value_heads=2)
    shape = read_shape(tmp_path / "base")
    study = load_study(written(tmp_path, {"set": {"so8t.init_scale": 0.05}}))
    adapters = Adapters(shape, arm_settings(study, "gates", seed=1), torch.device("cpu"))
    places = [adapters.lora.data_ptr(), adapters.free.data_ptr(), adapters.rotations.data_ptr()]
    with torch.no_grad():
        adapters.lora.add_(1.0)
        adapters.lora.grad.add_(1.0)
    other = arm_settings(study, "gates", {"so8t.init_scale": 0.2}, seed=2)
    adapters.begin(other)
    new = Adapters(shape, other, torch.device("cpu"))
    for name in ("lora", "free", "rotations"):
        assert torch.equal(getattr(adapters, name), getattr(new, name)), name
    assert not adapters.lora.grad.any()
    assert places == [adapters.lora.data_ptr(), adapters.free.data_ptr(), adapters.rotations.data_ptr()]


def test_the_key_changes_with_what_decides_and_with_nothing_else(tmp_path: Path):
    study = load_study(written(tmp_path))
    digests = {"train": "t", "tuning": "u", "held-out": "h", "base": "b"}
    own = key_of(arm_settings(study, "gates", seed=1), "held-out", digests)
    elsewhere = load_study(written(tmp_path), {"run": {"root": str(tmp_path / "other")}})
    other = arm_settings(elsewhere, "gates", seed=1)
    assert key_of(other, "held-out", digests) == own
    assert key_of(arm_settings(study, "gates", seed=2), "held-out", digests) != own
    assert key_of(other, "tuning", digests) != own
    assert key_of(other, "held-out", digests | {"train": "x"}) != own
    assert key_of(arm_settings(study, "gates", {"lora.r": 5}, seed=1), "held-out", digests) != own


def test_an_upgrade_alone_is_registered_as_no_change(tmp_path: Path):
    """What an older version wrote of the same file lacks its later keys; a changed file is a change."""
    path = small_study(tmp_path, small_base(tmp_path / "base"))
    study = load_study(str(path))
    _, _, (first,) = begin(study)
    old = copy.deepcopy(first)
    del old["study"]["note"], old["study"]["arms"]["lora"]["match_parameters"]
    del old["study"]["arms"]["lora"]["settings"]["lora.b_rate"]
    old["study"] |= {"full": []}
    old["sha256"] = "0" * 64  # of another content
    write_json(registration_path(study), [old])
    assert begin(study)[2] == [old]
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    write_yaml(path, content | {"note": "stages 03 to 05, too", "full": {"arms": ["lora"]}})
    entries = begin(load_study(str(path)))[2]
    assert [entry["sha256"] == old["sha256"] for entry in entries] == [True, False]
    assert {change.key: (change.before, change.after) for change in changes(entries)} == {
        "note": ("", "stages 03 to 05, too"),
        "full.arms": ([], ["lora"]),
    }


def test_the_tuning_split_goes_by_what_a_row_says():
    found = [for_tuning(row, 0.25) for row in rows(0, 2000)]
    assert sum(found) / 2000 == pytest.approx(0.25, abs=0.03)  # three standard errors
    assert [for_tuning(row, 0.25) for row in reversed(rows(0, 2000))] == found[::-1]


def test_a_tuned_rate_that_the_profile_leaves_to_lora_begins_at_loras(tmp_path: Path):
    study = load_study(written(tmp_path, {"tune": {"so8t.learning_rate": RATE["training.learning_rate"]}}))
    assert own_values(study, "gates") == {"so8t.learning_rate": study.settings.training.learning_rate}


def test_the_first_guesses_lie_evenly_and_are_the_same_for_all_arms(tmp_path: Path):
    tune = {**RATE, "lora.r": {"low": 4.0, "high": 64.0}, "lora.dropout": [0.0, 0.05, 0.1]}
    study = load_study(written(tmp_path, {"tune": tune}), {"lora": {"r": 4, "dropout": 0.05}})
    rates = []
    for number in range(1, 40):
        values, other = guess(study, "gates", number), guess(study, "lora", number)
        assert values["training.learning_rate"] == other["training.learning_rate"]
        arm_settings(study, "gates", values)  # of the right types
        assert 4 <= values["lora.r"] <= 64
        rates.append(math.log10(values["training.learning_rate"]) + 3)
    assert kstest(rates, "uniform").statistic < 0.06  # 39 random ones: 0.13 as often as not


def test_the_notebook_has_the_form_of_the_numbered_ones():
    notebook = nbformat.read(PROJECT_ROOT / "notebooks" / "06_study.ipynb", as_version=4)
    tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
    assert notebook.cells[0].source.startswith("# 06")
    assert "?" in notebook.cells[0].source
    assert tags.count(["parameters"]) == tags.count(["answer"]) == 1
    assert tags[-1] == ["answer"]
    assert 15 <= len(notebook.cells) <= 30


@pytest.mark.parametrize("lock", [".lock", ".page.lock"])
def test_a_second_process_waits_for_the_first(tmp_path: Path, lock: str):
    study = load_study(written(tmp_path), {"run": {"root": str(tmp_path / "runs")}})
    study.folder.mkdir(parents=True)
    entered = threading.Event()

    def enter() -> None:
        with alone(study), alone(study, page=True):  # the page's notebook takes the study's own
            entered.set()

    with FileLock(study.folder / lock):
        second = threading.Thread(target=enter)
        second.start()
        assert not entered.wait(0.5)
    second.join(10)
    assert entered.is_set()


def outcome_of(folder: Path, sums: list[list[float]], counts: list[list[float]], right: list[int]) -> Outcome:
    """A training's folder with two looks at two documents; the first look is nought."""
    last = torch.tensor(sums, dtype=torch.float64)
    tensors = {
        "sums": torch.stack((torch.zeros_like(last), last)),
        "counts": torch.tensor(counts, dtype=torch.float64),
        "right": torch.tensor([[0, 0], right]),
    }
    folder.mkdir()
    save_file(tensors, folder / "heldout_documents.safetensors")
    return Outcome(folder, {"diverged": "", "part": "held-out"})


def test_endpoints_are_read_from_the_last_look(tmp_path: Path):
    found = outcome_of(tmp_path / "a", [[1.0, 2.0, 3.0], [4.0, 0.0, 5.0]], [[2, 1, 3], [2, 0, 1]], [1, -1])
    assert found.value("heldout.loss") == 15 / 9
    assert found.value("heldout.thinking") == 5 / 4
    assert found.value("heldout.decision") == 2.0
    assert found.value("heldout.final") == 2.0
    assert found.value("heldout.decision_right") == 1.0


def test_an_endpoint_that_no_document_has_is_an_error_and_a_loss_that_is_none_the_worst(tmp_path: Path):
    without = outcome_of(tmp_path / "a", [[1.0, 0.0, 3.0]] * 2, [[2, 0, 3]] * 2, [-1, -1])
    for endpoint in ("heldout.decision", "heldout.decision_right"):
        with pytest.raises(StageError, match="judge by another"):
            without.value(endpoint)
    broken = outcome_of(tmp_path / "b", [[1.0, 0.0, math.nan]] * 2, [[2, 0, 3]] * 2, [-1, -1])
    assert broken.diverged
    assert broken.value("heldout.loss") == math.inf
