"""The prompts of the evaluation: held-out records, the same for every model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from so8t_helpers.phi3.chat import Dialect
from so8t_helpers.run.files import read_jsonl
from so8t_helpers.run.stage import Stage, stage_input


@dataclass(frozen=True)
class Prompt:
    """A held-out record (`row`) as a question: its `text` is the chat up to where the assistant begins."""

    row: dict[str, Any]
    text: str

    @property
    def chat(self) -> list[dict[str, str]]:
        """The chat as a client sends it: the question without the think command, which the engine puts."""
        turns = [dict(turn) for turn in self.row["messages"][:-1]]
        turns[-1]["content"] = self.row["question"]
        return turns


def choose_rows(stage: Stage) -> list[dict[str, Any]]:
    """Read the held-out records and take `eval.prompts` of them, the labels in their own shares.

    The choice depends on the records' ids alone, so that a run over more prompts contains the smaller one's.

    Raises:
        StageError: no held-out records.
    """
    settings = stage.settings
    folder = stage_input(settings, settings.training.dataset_dir, "01_dataset")
    path = stage.read_file("01_dataset/eval.jsonl", folder / "eval.jsonl", "run stage 01_dataset first")
    rows = sorted(read_jsonl(path, "id", "label", "messages"), key=lambda row: str(row["id"]))
    count = min(settings.eval.prompts or len(rows), len(rows))
    labels = pd.Series([row["label"] for row in rows])
    # Each record's place within its label as a share; the smallest places keep the labels' proportions.
    place = (labels.groupby(labels).cumcount() + 0.5) / labels.map(labels.value_counts())
    order = pd.DataFrame({"place": place, "label": labels}).sort_values(["place", "label"]).index
    return [rows[i] for i in order[:count]]


def write_prompts(rows: list[dict[str, Any]], dialect: Dialect) -> list[Prompt]:
    """Render the chosen records in the models' dialect."""
    return [Prompt(row, dialect.prompt(row["messages"][:-1])) for row in rows]
