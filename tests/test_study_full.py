"""Arms that go on through stages 03 to 05, and what is kept and said of them."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy.stats import ttest_1samp

from so8t_helpers.evaluate.statistics import confusion, macro_f1, macro_f1_interval, resamples
from so8t_helpers.run import files
from so8t_helpers.run.files import MachineError, read_json, sha256_file, write_yaml
from so8t_helpers.run.stage import STAGES
from so8t_helpers.settings import SettingsError
from so8t_helpers.study import engine, full_results
from so8t_helpers.study.data import prepare
from so8t_helpers.study.engine import Session
from so8t_helpers.study.full import check_full, full_settings
from so8t_helpers.study.page import make_page
from so8t_helpers.study.plan import Study, arm_settings, load_study
from so8t_helpers.study.spread import spread
from so8t_helpers.study.stage import Results, carry_out
from so8t_helpers.verbs.needs import estimate
from tests.dataset_inputs import many, write
from tests.small_study import small_base, small_study


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_base(tmp_path_factory.mktemp("base") / "base")


def with_full(folder: Path, base: Path, **evaluation: Any) -> Study:
    """A study whose arms go on through all stages, nothing of it carried out."""
    path = small_study(folder, base, full={"arms": ["lora", "gates"], "seeds": 2, "prompts": 4})
    return load_study(str(path), {"eval": {"engine": "llama_cpp"} | evaluation})


def test_what_stops_a_later_stage_is_said_before_the_first_training(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engine, "look_at_machine", lambda _: pytest.fail("a training began"))
    study = with_full(tmp_path, base, harness_tasks=["none"], harness_dir=str(tmp_path / "none"))
    with pytest.raises(SettingsError, match=r"eval\.harness_"):
        carry_out(study)
    with pytest.raises(SettingsError, match=r"eval\.harness_"):
        spread(study, str(study.path), [], lambda _: pytest.fail("an arm began"))


def test_the_disk_must_hold_the_runs_of_all_full_trainings(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    study = with_full(tmp_path, base)
    data = prepare(study)
    one = estimate(full_settings(study, "lora", arm_settings(study, "lora"), 1, data), STAGES[2:]).run
    monkeypatch.setattr(files, "free_bytes", lambda _: 4 * one)
    check_full(study, data)
    monkeypatch.setattr(files, "free_bytes", lambda _: 4 * one - 1)
    with pytest.raises(MachineError, match=r"study small, for stages 03 to 05 .* needs"):
        check_full(study, data)


@pytest.mark.slow
def test_arms_that_the_study_names_go_through_all_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From records of its own, which the study makes into data first."""
    names = ["gates"]
    path = small_study(
        tmp_path,
        small_base(tmp_path / "base"),
        seeds=2,
        trials=1,
        full={"arms": names, "seeds": 2, "prompts": 4},
    )
    profile = yaml.safe_load((tmp_path / "profile.yaml").read_text(encoding="utf-8"))
    records = write(tmp_path / "in.jsonl", many(80))
    profile["dataset"] = {"inputs": [str(records)], "eval_share": 0.2, "workers": 1}
    profile["training"] |= {"dataset_dir": None, "sequence_length": 512}
    profile["gguf"] = {"types": ["f16", "q8_0"], "quality_tokens": 512}
    profile["eval"] = {"engine": "llama_cpp", "max_new_tokens": 8}
    write_yaml(tmp_path / "profile.yaml", profile)
    study = load_study(str(path))
    found = carry_out(study)
    run = study.folder.parents[1] / "study-small-2-gates-1"
    manifest = read_json(run / "03_bake" / "manifest.json")
    adapter = found.arms["gates"].outcomes[0].folder / "adapter"
    assert manifest["inputs"]["02_train/adapter/adapter_model.safetensors"]["sha256"] == sha256_file(
        adapter / "adapter_model.safetensors"
    ), "what is asked is the study's own training"
    scores = read_json(run / "05_ollama_eval" / "scores.json")["models"]["q8_0"]
    measured = full_results.measures(found.full["gates"])
    for name, key in (
        ("in format", "format"),
        ("label F1", "label_f1"),
        ("refused where not", "over_refusal"),
    ):
        sums, counts = measured[name]
        assert sums[0].sum() / counts.sum() == pytest.approx(scores[key])
    quality = read_json(run / "04_gguf" / "quality.json")
    assert measured["KL from F16"][0][0, 0] == quality["files"]["q8_0"]["kl_mean"]
    assert 0 < measured["o_proj's error"][0][0, 0] < 0.1
    table = full_results.table(found)
    assert list(table) == names and set(measured) == set(table.index)
    assert (study.settings.reports_dir.parent / run.name / "05_ollama_eval.html").is_file()

    for arm in found.arms.values():  # what is kept needs neither the runs nor the adapters
        for outcome in arm.outcomes:
            shutil.rmtree(outcome.folder / "adapter", ignore_errors=True)
    shutil.rmtree(run)
    monkeypatch.setattr(Session, "_train", lambda *_: pytest.fail("trained again"))
    assert carry_out(study).full == found.full
    page = make_page(study, {}).read_text(encoding="utf-8")
    assert full_results.said(found) in page
    assert "Stages 04 and 05, with 95% intervals" in page


def kept_of(seed: int, right: float, divergence: float, count: int = 400) -> dict[str, Any]:
    """What is kept of a run whose answers are right with this probability."""
    generator = np.random.default_rng(seed)
    labels = [("ALLOW", "DENY")[i % 2] for i in range(count)]
    hits = generator.random(count) < right
    answers = [
        {
            "id": str(i),
            "label": label,
            "decision": label if hit else None,
            "well_formed": True,
            "separated": True,
            "correct": bool(hit) if label == "ALLOW" else None,
            "refused": label == "DENY" and bool(hit),
        }
        for i, (label, hit) in enumerate(zip(labels, hits, strict=True))
    ]
    files = {"f16": {"perplexity": 8.0}, "q4_k_m": {"perplexity": 8.0 + divergence, "kl_mean": divergence}}
    return {
        "run": "r",
        "engine": "llama.cpp",
        "file": "q4_k_m",
        "quality": files,
        "o_proj": 0.04,
        "answers": answers,
    }


def results_of(
    full: dict[str, list[dict[str, Any]]], diverged: dict[str, list[int]] | None = None
) -> Results:
    """Arms with what is kept of them, the control `lora`, and arms with the seeds that diverged."""
    lost = {name: SimpleNamespace(diverged=seeds) for name, seeds in (diverged or {}).items()}
    study = SimpleNamespace(file=SimpleNamespace(full=SimpleNamespace(arms=[*full, *lost])))
    control = SimpleNamespace(name="lora")
    return cast("Results", SimpleNamespace(full=full, control=control, study=study, arms=lost))


def interval_of(frame: pd.DataFrame, endpoint: str) -> tuple[float, float]:
    low, high = frame.loc[endpoint, "95% interval"].split(" to ")
    return float(low.replace("−", "-")), float(high.replace("−", "-"))


def test_arms_that_went_through_all_stages_are_compared_by_seed_and_prompt():
    """Where a training gives one number, the interval is Student's over seeds."""
    full = {
        "lora": [kept_of(seed, 0.5, kl) for seed, kl in ((1, 0.020), (2, 0.022), (3, 0.021))],
        "gates": [kept_of(seed, 0.9, kl) for seed, kl in ((4, 0.030), (5, 0.031), (6, 0.035))],
    }
    found = results_of(full)
    table = full_results.table(found)
    assert table.loc["in format"].tolist() == ["100.0% (99.1% to 100.0%)"] * 2  # 0.025 ** (1 / 400)
    assert table.loc["o_proj's error", "gates"] == "0.04 (0.04 to 0.04)"
    frame = full_results.differences(found).set_index("endpoint")
    assert set(frame["arm"]) == {"gates"}
    f1 = [2 * p / (1 + p) for p in (0.5, 0.9)]  # none is stated wrongly, so precision is 1 and recall p
    apart_by = {"answers right": 0.4, "label F1": f1[1] - f1[0], "refused where due": 0.4}
    for name, expected in apart_by.items():
        low, high = interval_of(frame, name)
        assert expected - 0.2 < low < expected < high < expected + 0.2, name
    apart = np.array([0.030, 0.031, 0.035]) - np.array([0.020, 0.022, 0.021])
    interval = ttest_1samp(apart, 0.0).confidence_interval()
    low, high = (
        float(part.replace("−", "-")) for part in frame.loc["KL from F16", "95% interval"].split(" to ")
    )
    assert (low, high) == pytest.approx((interval.low, interval.high), rel=0.1)  # 2,000 resamples
    assert frame.loc["refused where not", "difference"] == "+0"
    assert "400 held-out prompts" in full_results.said(found)
    assert full_results.differences(results_of({"gates": full["gates"]})).empty


def test_all_or_nothing_has_no_interval_of_no_width():
    """Resamples of what is always so know nothing of what never happened: it would be a false certainty."""
    full = {"lora": [kept_of(seed, 0.0, 0.02) for seed in (1, 2)]}
    full["gates"] = [kept_of(seed, 1.0, 0.03) for seed in (3, 4)]
    table = full_results.table(results_of(full))
    assert table.loc["label F1"].tolist() == [
        "0.0% (no interval: no labels are right)",
        "100.0% (no interval: all labels are right)",
    ]
    assert table.loc["answers right"].tolist() == ["0.0% (0.0% to 1.8%)", "100.0% (98.2% to 100.0%)"]
    frame = full_results.differences(results_of(full)).set_index("endpoint")
    for name in ("label F1", "answers right"):
        assert frame.loc[name, ["difference", "95% interval", "p"]].tolist() == [
            "+1",
            "none: all alike",
            "0.5",
        ]
    assert frame.loc["in format", ["95% interval", "p"]].tolist() == ["none: all alike", "1"]


def test_engines_and_arms_that_got_no_further_are_said():
    full = {arm: [kept_of(seed, 0.5, 0.02, count=4) for seed in (1, 2)] for arm in ("lora", "gates")}
    assert "trainings an arm, in llama.cpp. 2 seeds" in full_results.said(results_of(full))
    full["gates"][1]["engine"] = "Ollama"
    assert "theirs (Ollama: gates; llama.cpp: lora, gates)" in full_results.said(results_of(full))
    wild = "Left out, since trainings diverged: wild (seed 2, 3)."
    assert full_results.said(results_of(full, {"wild": [2, 3]})).endswith(f" differ by. {wild}")
    assert full_results.said(results_of({}, {"wild": [2, 3]})) == wild
    assert full_results.said(results_of({})) == "This study names no arm for it."


def test_the_prompts_share_of_label_f1():
    """The mean is F1; the spread is that of the bootstrap, which asks nothing of the formula."""
    generator = np.random.default_rng(3)
    labels = generator.choice(["ALLOW", "DENY", "REFUSE"], size=200, p=[0.5, 0.3, 0.2])
    said = np.where(generator.random(200) < 0.7, labels, "ESCALATION")
    values = full_results.f1_by_prompt(pd.DataFrame({"label": labels, "decision": said}))
    assert values.mean() == pytest.approx(macro_f1(confusion(labels.tolist(), said.tolist())))
    draws = resamples(200, 2000, 0)
    low, high = macro_f1_interval(labels.tolist(), said.tolist(), draws)
    error = values.std(ddof=1) / math.sqrt(200)
    assert (high - low) / (2 * 1.96) == pytest.approx(error, rel=0.1)  # 2,000 draws know it within 2%
