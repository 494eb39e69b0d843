"""A whole study in small: the same trainings as by hand, a page that holds, changes shown, kills survived."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from bs4 import BeautifulSoup
from scipy.stats import ttest_1samp

from benchmarks.study_equal import without_times
from so8t_helpers.run.files import write_yaml
from so8t_helpers.settings import PROJECT_ROOT, SettingsError, merge
from so8t_helpers.study import figures, results, statistics, what_if
from so8t_helpers.study.data import prepare
from so8t_helpers.study.engine import Session
from so8t_helpers.study.page import make_page
from so8t_helpers.study.plan import Study, arm_settings, load_study
from so8t_helpers.study.registration import changes, read_registrations
from so8t_helpers.study.spread import carry_out_alone, spread
from so8t_helpers.study.stage import Results, carry_out
from so8t_helpers.train import stage as train_stage
from so8t_helpers.verbs.sweep import ray_cluster
from tests.small_study import FILE, small_base, small_study

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_base(tmp_path_factory.mktemp("study") / "base")


@pytest.fixture(scope="module")
def done(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Results]:
    """A study that was carried out once, and what it found."""
    study = load_study(str(small_study(tmp_path_factory.mktemp("done"), base)))
    return study, carry_out(study)


@pytest.fixture(scope="module")
def page(done: tuple[Study, Results]) -> str:
    return make_page(done[0], {}).read_text(encoding="utf-8")


def test_every_arm_has_its_trials_and_one_training_a_seed(done: tuple[Study, Results]):
    study, found = done
    trials = {name: len(arm.trials) for name, arm in found.arms.items()}
    assert trials == {"lora": 2, "more lora": 1, "gates": 2}
    for arm in found.arms.values():
        assert [outcome.facts["seed"] for outcome in arm.outcomes] == study.seeds == [1, 2, 3]
        assert arm.chosen.value == min(trial.value for trial in arm.trials)
    tokens = [[o.facts["tokens"] for o in arm.outcomes] for arm in found.arms.values()]
    assert tokens[0] == tokens[1] == tokens[2], "the same seed means the same data"
    tried = [found.arms[name].trials[1].values for name in ("lora", "gates")]
    assert tried[0] == tried[1], "arms that tune the same begin with the same guesses"


def test_a_training_of_the_session_is_the_one_that_02_train_makes(
    done: tuple[Study, Results], tmp_path: Path
):
    """The last arm's last seed: base, micro-step and held-out pass were in use many times before."""
    study, found = done
    arm = found.arms["gates"]
    settings = merge(arm.settings, {"run": {"seed": 3, "root": str(tmp_path / "runs")}})
    data = settings.run_dir / "01_dataset"
    data.mkdir(parents=True)
    for name, source in (("train", study.folder / "data"), ("eval", study.folder.parents[2] / "data")):
        (data / f"{name}.jsonl").write_bytes((source / f"{name}.jsonl").read_bytes())
    settings = merge(settings, {"training": {"dataset_dir": None}})
    train_stage.train(settings)
    folder = settings.run_dir / "02_train"
    outcome = arm.outcomes[2]
    looks = pd.read_parquet(folder / "heldout.parquet")
    columns = ["step", "loss", "thinking", "decision", "final", "decision_right"]
    pd.testing.assert_frame_equal(outcome.looks[columns], looks[columns], check_exact=True)
    metrics = pd.read_parquet(folder / "metrics.parquet")
    assert outcome.metrics["task_loss"].tolist() == metrics["task_loss"].tolist()
    assert outcome.value("heldout.final") == pytest.approx(looks["final"].iloc[-1], rel=1e-12)
    assert outcome.value("heldout.decision_right") == looks["decision_right"].iloc[-1]
    assert outcome.value("heldout.best") == pytest.approx(looks["loss"].min(), rel=1e-12)


def test_what_if_the_gates_rotated_less_or_more(done: tuple[Study, Results]):
    """t = 1 is the training's end to the last bit; other powers stand in test_heldout."""
    _, found = done
    arm = found.arms["gates"]
    frame, last = arm.outcomes[0].what_if, arm.outcomes[0].looks.iloc[-1]
    assert frame is not None
    at = frame.set_index("t")
    parts = ["loss", "thinking", "decision", "final", "decision_right"]
    assert at.loc[1.0, parts].tolist() == last[parts].tolist()
    history = arm.outcomes[0].angles
    assert history is not None
    mean = history.degrees[-1].mean()
    assert mean > 0
    assert at["degrees"].tolist() == pytest.approx([t * mean for t in at.index], rel=1e-5)
    assert found.arms["lora"].outcomes[0].what_if is None

    curve = what_if.curves(found)["gates"]
    assert curve.change[:, list(at.index).index(1.0)].tolist() == [0.0, 0.0, 0.0]
    _, low, high = curve.interval
    found_by_scipy = ttest_1samp(curve.change[:, 0], 0.0).confidence_interval()
    assert (low, high) == pytest.approx((found_by_scipy.low, found_by_scipy.high))
    assert f"gates (angles of {curve.degrees:.2g}° on average)" in what_if.said(found)


def test_what_a_training_did_not_keep_and_now_should_is_trained_again(base: Path, tmp_path: Path):
    study = load_study(str(small_study(tmp_path, base)))
    session = Session(study, prepare(study))
    settings = arm_settings(study, "gates", {}, 1)
    first = session.outcome(settings, "held-out")
    assert not (first.folder / "adapter").exists()
    kept = session.outcome(settings, "held-out", adapter=True)
    assert (kept.folder / "adapter" / "adapter_model.safetensors").is_file()
    assert (session.outcome(settings, "held-out").folder, session.trained) == (kept.folder, 2)
    assert kept.value("heldout.loss") == first.value("heldout.loss")
    (kept.folder / "what_if.parquet").unlink()  # as a version left it that had no curve
    assert session.outcome(settings, "held-out").what_if is not None
    assert session.trained == 3


def test_what_is_finished_is_not_trained_again(done: tuple[Study, Results], monkeypatch: pytest.MonkeyPatch):
    study, first = done
    monkeypatch.setattr(Session, "_train", lambda *_: pytest.fail("trained again"))
    again = carry_out(study)
    for name, arm in again.arms.items():
        assert arm.trials == first.arms[name].trials
        assert [o.folder for o in arm.outcomes] == [o.folder for o in first.arms[name].outcomes]
    assert again.registrations == first.registrations


def test_what_another_study_trained_is_taken_over(
    done: tuple[Study, Results], base: Path, monkeypatch: pytest.MonkeyPatch
):
    study, first = done
    arms = {name: FILE["arms"][name] for name in ("gates", "lora")}
    other = load_study(str(small_study(study.path.parent, base, "other", arms=arms, control="gates")))
    monkeypatch.setattr(Session, "_train", lambda *_: pytest.fail("trained again"))
    found = carry_out(other)
    for name, arm in found.arms.items():
        assert [o.value("heldout.final") for o in arm.outcomes] == [
            o.value("heldout.final") for o in first.arms[name].outcomes
        ]
        assert all(o.folder.is_relative_to(other.folder) for o in arm.outcomes)


def test_arms_on_a_ray_cluster_give_the_same_numbers(
    done: tuple[Study, Results], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ray = pytest.importorskip("ray")
    study = load_study(str(small_study(tmp_path, base)))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        spread(study, str(study.path), [], ray_cluster())
    finally:
        ray.shutdown()
    assert [entry["trainings"] for entry in read_registrations(study)] == [0]
    monkeypatch.setattr(Session, "_train", lambda *_: pytest.fail("trained again"))
    for name, arm in carry_out(study).arms.items():
        for ours, theirs in zip(done[1].arms[name].outcomes, arm.outcomes, strict=True):
            # Ray gives a worker one thread; sums in another order move a loss of 6 by some 1e-6.
            assert ours.value("heldout.final") == pytest.approx(theirs.value("heldout.final"), abs=1e-4)
    left = [path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()]
    assert not [name for name in left if name.startswith("study-small.")]
    with pytest.raises(SettingsError, match="no arm 'none'; arms: lora, more lora, gates"):
        carry_out_alone(study, "none")


def test_the_page_is_self_contained_and_opens_with_the_answer(done: tuple[Study, Results], page: str):
    study, found = done
    assert re.findall(r"https?://[^\s\"'<]+", page) == []
    assert str(study.folder) not in page
    soup = BeautifulSoup(page, "html.parser")
    assert soup.find_all(["script", "link", "iframe"]) == []
    assert soup.h1 is not None
    assert soup.h1.get_text() == FILE["question"]
    text = soup.main.get_text(" ", strip=True)
    said = results.answer(found, results.compare(found))
    answer = soup.select_one("section.answer").get_text(" ", strip=True)
    assert re.sub(r"\W", "", said) in re.sub(r"\W", "", answer)
    assert text.index("What came out") < text.index("Every arm against the control")
    pictures = soup.select("main svg")
    assert len(pictures) == 5
    assert all(svg["aria-label"].strip() for svg in pictures)
    assert found.registrations[0]["sha256"] in text
    for arm in FILE["arms"].values():
        assert arm["hypothesis"] in text
    index = (study.page.parents[1] / "index.html").read_text(encoding="utf-8")
    assert f'href="studies/{study.name}.html"' in index


def test_a_change_is_shown_and_trains_what_it_touches(base: Path, tmp_path: Path):
    path = small_study(tmp_path, base, seeds=2, trials=1)
    first = carry_out(load_study(str(path)))
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    content["arms"]["gates"]["set"] = {"so8t.init_scale": 0.2}
    content["arms"]["gates"]["hypothesis"] = "they help where they start turned"
    write_yaml(path, content)
    second = carry_out(load_study(str(path)))
    assert second.registrations[0] == first.registrations[0], "nothing is ever rewritten"
    assert [entry["trainings"] for entry in second.registrations] == [0, 9]
    changed = {change.key: change.after for change in changes(second.registrations)}
    assert changed["arms.gates.hypothesis"] == "they help where they start turned"
    assert changed["arms.gates.settings.so8t.init_scale"] == 0.2
    same = {n: [o.folder for o in a.outcomes] for n, a in second.arms.items() if n != "gates"}
    assert same == {n: [o.folder for o in a.outcomes] for n, a in first.arms.items() if n != "gates"}
    assert not {o.folder for o in second.arms["gates"].outcomes} & {
        o.folder for o in first.arms["gates"].outcomes
    }
    assert len(list((second.study.folder / "trainings").iterdir())) == 12


def test_a_training_that_diverges_is_said_and_compared_with_nothing(base: Path, tmp_path: Path):
    """Weights of 1e30 in the first step make the next gradient no number, whatever was tried."""
    wild = {"set": {"training.learning_rate": 1.0e30}, "tune": {"training.learning_rate": [1.0e30, 1.0e31]}}
    arms = {"lora": FILE["arms"]["lora"] | {"tune": {}}, "wild": {"hypothesis": "it breaks"} | wild}
    full = {"arms": ["wild"]}
    study = load_study(str(small_study(tmp_path, base, seeds=2, arms=arms, full=full)))
    found = carry_out(study)
    assert found.arms["wild"].diverged == [1, 2]
    comparisons = results.compare(found)
    assert comparisons == []
    answer = results.answer(found, comparisons)
    assert answer.startswith("**Nothing could be compared.**")
    assert "wild: training diverged with seed 1, 2" in answer
    assert results.table(found, comparisons).loc["wild", "endpoint"] == "diverged"
    assert not figures.tried(found).axes[0].lines, "no trial of it has a place"
    page = make_page(study, {}).read_text(encoding="utf-8")
    assert "Left out, since trainings diverged: wild (seed 1, 2)." in page
    assert "This study names no arm for it." not in page


def sessions(base: Path, folder: Path) -> list[Session]:
    """Four studies of six seeds each, which are 24 in all; nothing is trained yet."""
    studies = [load_study(str(small_study(folder / str(i), base, seed=6 * i, seeds=6))) for i in range(4)]
    return [Session(study, prepare(study)) for study in studies]


def sums_of(some: list[Session], arm: str, values: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Nats by seed and document of an arm with these values, on every seed of the sessions; targets."""
    outcomes = [
        session.outcome(arm_settings(session.study, arm, values, seed), "held-out")
        for session in some
        for seed in session.study.seeds
    ]
    return np.stack([o.documents("heldout.loss")[0] for o in outcomes]), outcomes[0].documents(
        "heldout.loss"
    )[1]


def test_equal_arms_of_real_trainings_are_not_told_apart_and_a_planted_effect_is(base: Path, tmp_path: Path):
    """24 trainings of one setting, which differ by their seeds alone, dealt into 60 pairs of arms of 6 seeds.

    The pairs share trainings, so this is a look and no proof; the simulated losses have the 8 in 100.
    """
    four = sessions(base, tmp_path)
    sums, counts = sums_of(four, "gates", {})
    generator, wrong = np.random.default_rng(1), 0
    for _ in range(60):
        dealt = generator.permutation(24)
        wrong += statistics.paired_difference(sums[dealt[:6]], sums[dealt[6:12]], counts).p < 0.05
    assert wrong <= 8  # 5% of 60 are 3; eight or fewer come by chance 99.6 times in 100
    slow, _ = sums_of(four[:1], "lora", {})
    fast, _ = sums_of(four[:1], "lora", {"training.learning_rate": 1.0e-2})
    found = statistics.paired_difference(fast, slow, counts)
    assert max(found.p, found.exact_p) < 0.05
    assert found.high < 0, "five times the rate learns more in so few steps"


def test_a_study_killed_again_and_again_gives_the_same_page(base: Path, tmp_path: Path):
    path = small_study(tmp_path, base, seeds=2)
    pages = [tmp_path / name / "reports" / "studies" / "small.html" for name in ("whole", "killed")]

    def command(name: str) -> list[str]:
        places = (f"run.root={tmp_path / name / 'runs'}", f"run.reports_root={tmp_path / name / 'reports'}")
        arguments = [part for place in places for part in ("--set", place)]
        return [sys.executable, "-m", "so8t_helpers", "study", str(path), *arguments]

    options: dict[str, Any] = {
        "cwd": PROJECT_ROOT,
        "env": os.environ | {"OMP_NUM_THREADS": "1"},  # the number of threads changes the last digits
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.DEVNULL,
    }
    subprocess.run(command("whole"), check=True, timeout=600, **options)
    trainings = tmp_path / "killed" / "runs" / "studies" / "small" / "trainings"
    chance = random.Random(4)
    for finished in (1, 4, 8):
        process = subprocess.Popen(command("killed"), **options)
        while len(list(trainings.glob("[!.]*"))) < finished:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.05)
        time.sleep(chance.uniform(0.0, 0.6))
        process.kill()
        process.wait()
    assert not pages[1].exists()
    subprocess.run(command("killed"), check=True, timeout=600, **options)
    assert without_times(pages[0]) == without_times(pages[1])
