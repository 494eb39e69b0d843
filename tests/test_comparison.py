"""The comparison page: curves over each other, what differs, the answers that changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from safetensors.numpy import save_file

from so8t_helpers.report import comparison as plots
from so8t_helpers.report.comparison import write_comparison
from so8t_helpers.run.files import write_json, write_jsonl, write_yaml
from so8t_helpers.run.stage import open_stage
from so8t_helpers.settings import Settings, merge
from tests.small_notebooks import small_settings

ANSWERS = {
    "one": [("a", "3です", True), ("b", "東京です", True), ("c", "同じ", True)],
    "two": [("a", "三です", True), ("b", "京都です", False), ("c", "同じ", True)],
}


def _finished(folder: Path, name: str, r: int, loss: float) -> Settings:
    """A run with the artefacts of stages 02 and 05 that the page reads."""
    settings = merge(small_settings(folder), {"run": {"name": name}, "lora": {"r": r}})
    with open_stage(settings, "02_train") as stage:
        steps = np.arange(1, 41)
        frame = pd.DataFrame({"step": steps, "task_loss": loss + 1 / steps, "pet_loss": 1.0 + 0 * steps})
        frame.to_parquet(stage.directory / "metrics.parquet")
        angles = np.linspace(0, 1, 5, dtype=np.float32)[:, None, None, None] * np.ones(
            (5, 2, 3, 4), np.float32
        )
        save_file({"steps": np.arange(5), "angles": angles}, stage.directory / "angles.safetensors")
        stage.facts["last task loss"] = loss
    with open_stage(settings, "05_ollama_eval") as stage:
        share = sum(correct for _, _, correct in ANSWERS[name]) / 3
        write_json(stage.directory / "scores.json", {"models": {"q4_k_m": {"answer": share, "format": 1.0}}})
        rows = [
            {"id": i, "model": "q4_k_m", "prompt": f"質問 {i}", "final": final, "correct": correct}
            for i, final, correct in ANSWERS[name]
        ]
        write_jsonl(stage.directory / "answers.jsonl", rows)
        stage.facts["answer q4_k_m"] = share
    write_yaml(settings.run_dir / "params.yaml", settings.model_dump())
    return settings


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> BeautifulSoup:
    folder = tmp_path_factory.mktemp("compare")
    runs = [_finished(folder, "one", 4, 0.5), _finished(folder, "two", 8, 0.25)]
    path = write_comparison(runs, "one-vs-two")
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def _table(page: BeautifulSoup, caption: str) -> dict[str, list[str]]:
    table = page.find("caption", string=caption).parent
    rows = [[cell.get_text() for cell in row.find_all(["th", "td"])] for row in table.select("tbody tr")]
    return {row[0]: row[1:] for row in rows}


def test_the_page_opens_with_what_came_out(page: BeautifulSoup):
    assert page.select_one(".answer p").get_text() == (
        "Correct answers of q4_k_m: one is best with 100.0% (two 66.7%); "
        "last task loss: two is best with 0.250 (one 0.500)."
    )


def test_only_what_differs_is_listed_as_different(page: BeautifulSoup):
    assert _table(page, "Settings that differ") == {"lora.r": ["4", "8 (+4)"]}
    assert _table(page, "Training: key figures") == {"last task loss": ["0.5", "0.25 (−0.25)"]}


def test_changed_answers_are_shown_with_those_that_turned_right_or_wrong_first(page: BeautifulSoup):
    rows = _table(page, "Final answers; ✓ and ✗ say whether the record’s own check passed")
    assert list(rows.items()) == [
        ("質問 b", ["✓ 東京です", "✗ 京都です"]),
        ("質問 a", ["✓ 3です", "✓ 三です"]),
    ]


def test_each_figure_names_all_runs_and_follows_the_page(page: BeautifulSoup):
    figures = page.select("figure svg")
    assert len(figures) == 4
    assert all("one, two" in svg["aria-label"] for svg in figures)


def test_drift_is_the_mean_distance_from_the_start():
    theta = np.zeros((2, 1, 2, 4))
    theta[1, 0, 0] = [0.4, -0.4, 0.0, 0.8]
    (line,) = plots.drift({"x": (np.array([0, 9]), theta)}).axes[0].get_lines()
    assert line.get_xydata().tolist() == [[0.0, 0.0], [9.0, 0.2]]


def test_a_run_has_one_colour_on_the_whole_page():
    names = [f"r{i}" for i in range(5)]
    assert len(set(plots.run_colors(names).values())) == 5
