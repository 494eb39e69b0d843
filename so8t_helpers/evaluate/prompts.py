"""The prompts of the evaluation: held-out records, the same for every model."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from so8t_helpers.phi3.chat import render
from so8t_helpers.run.files import StageError, read_jsonl
from so8t_helpers.run.stage import Stage, stage_input


@dataclass(frozen=True)
class Prompt:
    """A held-out record as a question.

    Attributes:
        row: the record of 01_dataset/eval.jsonl.
        text: the rendered chat up to where the assistant begins, as every engine is given it.
    """

    row: dict[str, Any]
    text: str

    @property
    def chat(self) -> list[dict[str, str]]:
        """The chat as a client sends it: the question without the think command, which the engine puts."""
        turns = [dict(turn) for turn in self.row["messages"][:-1]]
        turns[-1]["content"] = self.row["question"]
        return turns


def choose_prompts(stage: Stage) -> list[Prompt]:
    """Read the held-out records and take `eval.prompts` of them, the labels in their own shares.

    The choice depends on the records' ids alone, so that a run over more prompts contains the smaller one's.

    Raises:
        StageError: no held-out records.
    """
    settings = stage.settings
    folder = stage_input(settings, settings.training.dataset_dir, "01_dataset")
    path = stage.read_file("01_dataset/eval.jsonl", folder / "eval.jsonl", "run stage 01_dataset first")
    rows = sorted(read_jsonl(path), key=lambda row: str(row["id"]))
    if not rows:
        raise StageError(f"{path} holds no record; raise dataset.eval_share")
    count = min(settings.eval.prompts or len(rows), len(rows))
    by_label: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_label[row["label"]].append(row)
    # Each record's place within its label as a share; the smallest places keep the labels' proportions.
    place = {
        row["id"]: ((i + 0.5) / len(group), label)
        for label, group in by_label.items()
        for i, row in enumerate(group)
    }
    chosen = sorted(rows, key=lambda row: place[row["id"]])[:count]
    return [Prompt(row, render(row["messages"][:-1], add_generation_prompt=True)) for row in chosen]
