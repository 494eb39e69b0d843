"""Arms that go on through all stages: an ordinary run each, with notebooks and reports of its own."""

from __future__ import annotations

from typing import Any

import pandas as pd

from so8t_helpers.run.files import StageError, read_json
from so8t_helpers.run.stage import STAGES, read_manifest
from so8t_helpers.settings import Settings, merge
from so8t_helpers.study.data import Data
from so8t_helpers.study.plan import Study, letters
from so8t_helpers.verbs import batch

_SCORES = {
    "format": "in format",
    "answer": "answers right",
    "label_f1": "label F1",
    "refusal": "refused where due",
    "over_refusal": "refused where not",
}


def full_settings(study: Study, arm: str, tuned: Settings, data: Data) -> Settings:
    """Return the settings of an arm's run: as tuned, the first seed, the study's own training samples."""
    name = f"{study.settings.run.name}-{letters(arm)}"[:64]
    run = {"name": name, "seed": study.seeds[0]}
    return merge(tuned, {"run": run, "training": {"dataset_dir": str(data.train.parent)}})


def carry_out_stages(settings: Settings) -> None:
    """Carry out 02 to 05 by their notebooks, where they are not fresh. Raises StageError: one failed."""
    last = batch.run_stages(settings, STAGES[1:])[-1]
    if last.state not in {"done", "fresh"}:
        raise StageError(f"run {settings.run.name}: {last.stage} {last.state}: {last.detail}")


def table(runs: dict[str, Settings]) -> pd.DataFrame:
    """Return what stages 04 and 05 say of each arm's smallest file, one row an arm.

    One training each: a difference between arms here has no interval over seeds.
    """
    return pd.DataFrame.from_dict(
        {arm: _row(settings) for arm, settings in runs.items()}, orient="index"
    ).rename_axis("arm")


def _row(settings: Settings) -> dict[str, Any]:
    models = _read(settings, "05_ollama_eval", "scores.json")["models"]
    quality = _read(settings, "04_gguf", "quality.json")
    asked = [model for model in settings.eval.models if model in models][-1]
    smallest = settings.gguf.types[-1]
    file = quality["files"][smallest]
    errors = [row["rotated"] for row in quality.get("o_proj") or [] if row["file"] == smallest]
    scores = models[asked]
    row: dict[str, Any] = {"asked": asked}
    row |= {said: _percent(scores.get(key)) for key, said in _SCORES.items()}
    row |= {"KL from F16": file.get("kl_mean"), "perplexity": file["perplexity"]}
    row["F16's"] = quality["files"].get("f16", {}).get("perplexity")
    row["o_proj's error"] = sum(errors) / len(errors) if errors else None
    return row


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def _read(settings: Settings, stage: str, name: str) -> dict[str, Any]:
    if read_manifest(settings, stage) is None:
        raise StageError(f"run {settings.run.name}: {stage} has not been completed")
    found: dict[str, Any] = read_json(settings.run_dir / stage / name)
    return found
