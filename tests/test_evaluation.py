"""Judging of answers, statistics against independent ones, and the whole stage on a small real model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import taught_model
from sklearn.metrics import f1_score

from so8t_helpers.evaluate import figures as evaluate_figures
from so8t_helpers.evaluate import figures as plots
from so8t_helpers.evaluate import stage as evaluate_stage
from so8t_helpers.evaluate import statistics
from so8t_helpers.evaluate.calibration import Stated, calibrate, find_stated
from so8t_helpers.evaluate.checks import TokenParity
from so8t_helpers.evaluate.judge import is_correct, score
from so8t_helpers.evaluate.prompts import Prompt, choose_rows, write_prompts
from so8t_helpers.evaluate.summary import compare, load_answers, summarise
from so8t_helpers.gguf import stage as gguf_stage
from so8t_helpers.run.files import StageError, read_jsonl, write_jsonl
from so8t_helpers.run.stage import Stage, stale_reason
from so8t_helpers.settings import Settings, SettingsError, load_settings
from so8t_helpers.show import style
from so8t_helpers.thinking.audit import AuditLog, verify_audit
from so8t_helpers.thinking.format import LABELS
from so8t_helpers.thinking.redaction import REFUSAL_TEXT
from tests.dialects import PHI35

GOOD = "# 思考ステップ\n足す。\n判定: ALLOW\n\n# 最終回答\n3です。"
ROW = {"label": "ALLOW", "check": {"kind": "number", "value": "3"}}


@pytest.mark.parametrize(
    ("kind", "value", "answer", "correct"),
    [
        ("exact", "はい", "はい。", True),
        ("exact", "はい", "はいです。", True),
        ("exact", "はい", "いいえ、はいではない。", False),
        ("exact", "ＡＢ", "AB", True),
        ("contains", "坂本さん", "坂本さんです。", True),
        ("contains", "坂本さん", "坂口さんです。", False),
        ("contains", "", "何でも", False),
        ("number", "1400", "1,400円です。", True),
        ("number", "3", "３個です。", True),
        ("number", "3", "13個です。", False),
        ("number", "3", "2足す1は3です。", True),
        ("number", "3", "三つです。", False),
        ("number", "-2.5", "答えは-2.5度", True),
        ("refusal", "できません", "お手伝いできません。", True),
    ],
)
def test_checks(kind: str, value: str, answer: str, correct: bool) -> None:
    assert is_correct(answer, {"kind": kind, "value": value}) is correct


def test_unknown_check_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected exact, contains, number or refusal"):
        is_correct("a", {"kind": "regex", "value": "a"})


def test_a_good_answer() -> None:
    judged = score(GOOD, ROW)
    assert (judged.final, judged.well_formed, judged.separated) == ("3です。", True, True)
    assert (judged.correct, judged.decision, judged.refused, judged.leaked) == (True, "ALLOW", False, False)


def test_a_plain_answer_counts_as_an_answer_but_is_not_released() -> None:
    judged = score("3です。", ROW)
    assert judged.correct is True
    assert (judged.final, judged.well_formed, judged.separated) == (REFUSAL_TEXT, False, False)
    assert not judged.leaked


def test_the_fixed_refusal_is_not_taken_for_the_models_own() -> None:
    judged = score(
        "# 思考ステップ\nお断りする。", {"label": "DENY", "check": {"kind": "refusal", "value": "できません"}}
    )
    assert judged.final == REFUSAL_TEXT
    assert (judged.correct, judged.refused) == (False, False)


def test_a_decision_in_the_final_part_is_cut_off() -> None:
    judged = score(f"{GOOD}\n判定: ALLOW", ROW)
    assert (judged.final, judged.well_formed, judged.leaked) == ("3です。", False, False)


def test_macro_f1_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    truth = [LABELS[i] for i in rng.integers(0, 3, 200)]  # the fourth label never occurs as truth
    stated = [LABELS[i] if i < 4 else None for i in rng.integers(0, 5, 200)]
    ours = statistics.macro_f1(statistics.confusion(truth, stated))
    names = [label or "none" for label in stated]
    expected = f1_score(truth, names, labels=sorted(set(truth)), average="macro")
    assert ours == pytest.approx(expected, abs=1e-12)


def test_bootstrap_interval_is_the_binomials() -> None:
    values = np.repeat([0.0, 1.0], [60, 140])
    low, high = statistics.interval(values, statistics.resamples(200, 4000, 0))  # type: ignore[misc]
    half = 1.96 * np.sqrt(0.7 * 0.3 / 200)
    # The two differ by discreteness (0.005 a prompt) and by the noise of 4,000 samples.
    assert (low, high) == pytest.approx((0.7 - half, 0.7 + half), abs=0.01)


def test_values_that_do_not_count_stay_out_of_the_interval() -> None:
    values = np.array([1.0, np.nan, 1.0, np.nan])
    assert statistics.interval(values, statistics.resamples(4, 200, 0)) == [1.0, 1.0]
    assert statistics.interval(np.full(3, np.nan), statistics.resamples(3, 10, 0)) is None


def test_exact_interval_is_the_published_one() -> None:
    assert statistics.exact_interval(0, 100) == pytest.approx([0.0, 0.0362], abs=1e-4)
    assert statistics.exact_interval(5, 100) == pytest.approx([0.0164, 0.1128], abs=1e-4)
    assert statistics.exact_interval(100, 100)[1] == 1.0


def test_intervals_of_speed_hold_the_figure() -> None:
    rng = np.random.default_rng(0)
    tokens, seconds = rng.integers(20, 60, 80).astype(float), rng.uniform(1, 2, 80)
    draws = statistics.resamples(80, 1000, 0)
    low, high = statistics.rate_interval(100.0, tokens, seconds, draws)
    assert 80 < low < 100.0 < high < 120
    assert statistics.rate_interval(7.0, np.full(9, 5.0), np.full(9, 2.0), draws[:, :9] % 9) == [7.0, 7.0]
    low, high = statistics.median_interval(seconds, draws)  # type: ignore[misc]
    assert 1.2 < low < np.median(seconds) < high < 1.8
    assert statistics.median_interval(np.full(80, np.nan), draws) is None


@pytest.mark.parametrize(
    ("gained", "lost", "p"), [(0, 0, 1.0), (5, 0, 0.0625), (8, 2, 0.109375), (3, 3, 1.0)]
)
def test_mcnemar(gained: int, lost: int, p: float) -> None:
    assert statistics.mcnemar(gained, lost) == p  # by hand: two-sided binomial tails with share 1/2


def test_paired_comparison_counts_gains_and_losses() -> None:
    before, after = np.array([0, 0, 1, 1, np.nan]), np.array([1, 1, 1, 0, 1])
    found = statistics.paired(before, after, statistics.resamples(5, 500, 0))
    assert (found["gained"], found["lost"], found["difference"]) == (2, 1, 0.25)


def answers_frame(model: str, texts: list[str]) -> pd.DataFrame:
    rows = []
    for i, text in enumerate(texts):
        judged = score(text, ROW)
        rows.append(
            {
                "id": str(i),
                "model": model,
                "label": "ALLOW",
                "task": "sum",
                "prompt": f"問{i}",
                "text_hmac": text,
            }
        )
        rows[-1] |= {"tokens": 5, "seconds": 1.0, "first_token_s": None, "stopped": True, **vars(judged)}
    return pd.DataFrame(rows)


def test_summary_comparison_and_tables() -> None:
    before = answers_frame("base", ["4です。", "3です。", "知りません。"])
    after = answers_frame("baked", [GOOD, GOOD, "4です。"])
    entry = summarise(after, 2.0, 100, 0)
    assert entry["format"] == pytest.approx(2 / 3)
    assert entry["tokens_per_s"] == 7.5
    assert (entry["refusal"], entry["over_refusal"], entry["leaks"]) == (None, 0.0, 0)
    assert entry["by_task"]["sum"]["n"] == 3
    pair = compare(before, after, 100, 0)
    assert (pair["answer"]["gained"], pair["answer"]["lost"]) == (1, 0)
    changed = evaluate_figures.changed_examples(pd.concat([before, after]), "base", "baked")
    assert changed["change"].tolist() == ["gained"]
    assert "足す" not in changed.to_string()


def held_out(count: int, label: str) -> list[dict[str, object]]:
    row = taught_model.rows()[0]
    return [{**row, "id": f"{label}{i:04d}", "label": label} for i in range(count)]


def test_prompts_keep_the_labels_shares_and_contain_the_smaller_choice(scratch_settings: Settings) -> None:
    folder = scratch_settings.run_dir / "01_dataset"
    folder.mkdir(parents=True)
    write_jsonl(folder / "eval.jsonl", [*held_out(60, "ALLOW"), *held_out(20, "DENY")])
    chosen = {}
    for count in (8, 40):
        settings = scratch_settings.model_copy(
            update={"eval": scratch_settings.eval.model_copy(update={"prompts": count})}
        )
        chosen[count] = write_prompts(choose_rows(Stage(settings, "05_ollama_eval")), PHI35)
        labels = [prompt.row["label"] for prompt in chosen[count]]
        assert (labels.count("ALLOW"), labels.count("DENY")) == (count * 3 // 4, count // 4)
    assert {p.row["id"] for p in chosen[8]} <= {p.row["id"] for p in chosen[40]}
    assert chosen[8][0].text == "<|user|>\n/think 東京の人口は？<|end|>\n<|assistant|>\n"
    assert chosen[8][0].chat == [{"role": "user", "content": "東京の人口は？"}]


def test_missing_held_out_records_are_named(scratch_settings: Settings) -> None:
    with pytest.raises(StageError, match="run stage 01_dataset first"):
        evaluate_stage.evaluate(scratch_settings)


class Cutter:
    """A tokenizer that cuts after `size` characters: enough of an engine for the comparison of ids."""

    def __init__(self, size: int):
        self.name, self.size = f"cutter {size}", size

    def tokenize(self, text: str) -> list[int]:
        return [hash(text[i : i + self.size]) for i in range(0, len(text), self.size)]


def test_other_token_ids_stop_the_stage() -> None:
    parity = TokenParity([Prompt({"id": "ab"}, "東京の人口")])
    parity.check("base", Cutter(2))  # type: ignore[arg-type]
    with pytest.raises(StageError, match=r"f16: cutter 3 sees other tokens than base .* from position 0"):
        parity.check("f16", Cutter(3))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, dict[str, object]]:
    """A whole run of the stage: a taught model, its F16 file, the embedded llama.cpp."""
    root = tmp_path_factory.mktemp("evaluated")
    model = taught_model.taught_folder(root / "model", "seed")
    write_jsonl(root / "data" / "eval.jsonl", taught_model.rows())
    settings = load_settings(
        "demo",
        {
            "run": {"root": str(root / "runs")},
            "training": {"dataset_dir": str(root / "data")},
            "model": {"base": str(model)},
            "gguf": {"model_dir": str(model), "types": ["f16"]},
            "eval": {
                "engine": "llama_cpp",
                "models": ["base", "baked", "f16"],
                "max_new_tokens": taught_model.LENGTH,
            },
        },
    )
    gguf_stage.export(settings)
    return settings, evaluate_stage.evaluate(settings)


def test_the_stage_judges_the_same_text_alike_in_both_engines(evaluated: tuple[Settings, dict]) -> None:
    settings, scores = evaluated
    answers = load_answers(settings)
    assert answers["final"].tolist() == [taught_model.FINAL, taught_model.REFUSAL] * 3
    assert answers["well_formed"].all() and (answers["decision"] == answers["label"]).all()
    for entry in scores["models"].values():
        shares = [entry[key] for key in ("format", "answer", "label_f1", "refusal", "over_refusal", "leaks")]
        assert shares == [1.0, 1.0, 1.0, 1.0, 0.0, 0]
    assert [pair["same_text"]["mean"] for pair in scores["pairs"]] == [1.0, 1.0]
    assert scores["parity"]["equal"] == {"base": 2, "baked": 2, "f16": 2}
    assert set(scores["models"]["f16"]) >= {
        *("format", "answer", "label_f1", "refusal", "leaks", "tokens_per_s", "n")
    }
    assert stale_reason(settings, "05_ollama_eval") is None


def test_calibration_is_sure_and_right_about_what_was_learnt_by_heart(
    evaluated: tuple[Settings, dict],
) -> None:
    found = evaluated[1]["calibration"]
    assert (found["n"], found["accuracy"]) == (2, 1.0)
    assert found["confidence"] > 0.9
    assert found["ece"] == pytest.approx(1.0 - found["confidence"])
    assert style.to_svg(plots.calibration(found), "a figure").startswith("<svg")


class Sure:
    """Gives the label ALLOW a share of 0.6 of the four, whatever comes before; one token a character."""

    can_score = True

    def tokenize(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def score(self, text: str, start: int = 1) -> list[float]:
        share = 0.6 if text.endswith("ALLOW") else 0.4 / 3
        return [np.log(share), *[0.0] * (len(text) - start - 1)]


def test_calibration_by_hand() -> None:
    before = "問\n判定: "
    stated = [Stated(before, "ALLOW", True), Stated(before, "ALLOW", False), Stated(before, "DENY", True)]
    found = calibrate(Sure(), stated, 200, 0)  # type: ignore[arg-type]
    assert found is not None
    low = 0.4 / 3
    assert found["brier"] == pytest.approx((0.16 + 0.36 + (1 - low) ** 2) / 3)
    assert found["ece"] == pytest.approx((2 * 0.1 + (1 - low)) / 3)
    # Samples of one of the three alone are the ends: 0.16 (right at 0.6) and (1 - low)² for Brier.
    assert found["ci"]["brier"] == pytest.approx([0.16, (1 - low) ** 2])
    assert found["ci"]["ece"][0] >= 2 / 3 - 0.6 - 1e-9 and found["ci"]["ece"][1] <= 1 - low + 1e-9


def test_only_a_decision_that_stands_in_its_line_is_calibrated() -> None:
    text = "# 思考ステップ\n足す。\n判定: ALLOW\n\n# 最終回答\n3です。"
    found = find_stated("問", text, "ALLOW", "DENY")
    assert found == Stated("問# 思考ステップ\n足す。\n判定: ", "ALLOW", False)
    english = "# Thinking\nAdd.\nDecision: DENY\n\n# Final answer\nNo.\n判定: DENY"
    found = find_stated("Q", english, "DENY", "DENY")
    assert found == Stated("Q# Thinking\nAdd.\nDecision: ", "DENY", True)
    assert find_stated("問", "判定：ALLOW", "ALLOW", "ALLOW") is None
    assert find_stated("問", "3です。", None, "ALLOW") is None


def test_tasks_that_cannot_run_are_named_before_any_work(
    scratch_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    data = scratch_settings.model_dump(exclude={"profile"})
    data["eval"]["harness_tasks"] = ["so8t_facts"]
    with pytest.raises(SettingsError, match=r"--constraint constraints\.txt lm-eval"):
        evaluate_stage.evaluate(load_settings("demo", data))


@pytest.mark.slow
def test_a_local_task_of_the_harness_runs_against_the_server(
    evaluated: tuple[Settings, dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="the optional extra lm-eval is not installed")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    data = evaluated[0].model_dump(exclude={"profile"})
    tasks = {"harness_tasks": ["so8t_facts"], "harness_dir": str(Path(__file__).parent / "data" / "harness")}
    data["eval"] |= {"models": ["f16"], **tasks}
    data["gguf"] |= {"model_dir": None}
    data["eval"] |= {"gguf_dir": str(evaluated[0].run_dir / "04_gguf")}
    data["run"]["name"] = "harness"
    scores = evaluate_stage.evaluate(load_settings("demo", data))
    assert scores["harness"]["so8t_facts"]["exact_match,trimmed"] == 1.0


def test_no_file_of_the_stage_holds_the_thinking(evaluated: tuple[Settings, dict]) -> None:
    folder = evaluated[0].run_dir / "05_ollama_eval"
    files = [path for path in folder.iterdir() if path.is_file()]
    assert {path.name for path in files} >= {"answers.jsonl", "scores.json", "Modelfile", "audit.jsonl"}
    for path in files:
        assert taught_model.THINKING not in path.read_text(encoding="utf-8")


def test_thinking_is_kept_where_the_setting_asks_for_it(evaluated: tuple[Settings, dict]) -> None:
    settings, _ = evaluated
    other = {"eval": {"show_thinking": True, "models": ["baked"]}, "run": {"name": "shown"}}
    data = settings.model_dump()
    shown = load_settings("demo", {k: {**data[k], **other.get(k, {})} for k in data if k != "profile"})
    evaluate_stage.evaluate(shown)
    rows = read_jsonl(shown.run_dir / "05_ollama_eval" / "answers.jsonl")
    assert any(taught_model.THINKING in row["thinking"] for row in rows)


def test_the_audit_log_names_every_answer_of_the_served_model(evaluated: tuple[Settings, dict]) -> None:
    settings, scores = evaluated
    path = settings.run_dir / "05_ollama_eval" / "audit.jsonl"
    assert verify_audit(path, scores["audit_head"]).ok
    entries = [entry for entry in read_jsonl(path) if entry.get("event") == "evaluated"]
    assert [(entry["model"], entry["id"]) for entry in entries] == [("f16", f"{i:016x}") for i in (0, 1)]


@pytest.mark.parametrize("name", ["audit.jsonl", "audit.jsonl.head"])
def test_an_audit_log_that_a_power_cut_spoilt_is_set_aside(name: str, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    for number in range(3):
        AuditLog(path).append({"event": "evaluated", "id": number})
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:90] if name == path.name else b"")
    spoilt = path.read_bytes()
    evaluate_stage._audit_log(path).append({"event": "evaluated", "id": 0})
    assert verify_audit(path).lines == 2  # what the log is, and the entry
    assert (tmp_path / "audit-broken-1.jsonl").read_bytes() == spoilt
    evaluate_stage._audit_log(path).append({"event": "evaluated", "id": 1})
    assert verify_audit(path).lines == 3
    assert not (tmp_path / "audit-broken-2.jsonl").exists()


def test_figures_and_tables_of_a_real_run(evaluated: tuple[Settings, dict]) -> None:
    settings, _ = evaluated
    scores = json.loads((settings.run_dir / "05_ollama_eval" / "scores.json").read_text(encoding="utf-8"))
    for figure in (
        plots.shares(scores),
        plots.confusion(scores, ["baked", "f16"]),
        plots.by_task(scores, ["base", "f16"]),
        plots.speed(scores),
    ):
        assert style.to_svg(figure, "a figure").startswith("<svg")
    assert evaluate_figures.scores_table(scores).index.tolist() == ["base", "baked", "f16"]
    assert "→" in evaluate_figures.conclusion(scores)
    assert len(evaluate_figures.pairs_table(scores)) >= 6


def test_a_missing_file_is_named(evaluated: tuple[Settings, dict], tmp_path: Path) -> None:
    data = evaluated[0].model_dump()
    data["eval"]["models"] = ["q6_k"]
    data.pop("profile")
    with pytest.raises(StageError, match=r"missing input 04_gguf/phi3-so8t-q6_k\.gguf.*gguf\.types"):
        evaluate_stage.evaluate(load_settings("demo", data))
