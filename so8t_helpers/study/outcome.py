"""What is kept of one training: a folder named after all that decides its course, written whole."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from safetensors.numpy import load_file

from so8t_helpers.run.files import StageError
from so8t_helpers.run.stage import stage_settings
from so8t_helpers.settings import Settings
from so8t_helpers.so8.history import AngleHistory, read_angles
from so8t_helpers.train.heldout import PARTS

Floats: TypeAlias = NDArray[np.float64]
FACTS, WHAT_IF, ADAPTER = "outcome.json", "what_if.parquet", "adapter"
# Settings of 02_train that change nothing of its course, or stand in the key as a hash of the content.
_NOT_DECISIVE: tuple[str, ...] = (
    "model.base",
    "model.revision",
    "training.dataset_dir",
    "training.keep_checkpoints",
    "training.checkpoint_steps",
    "training.checkpoint_minutes",
)


def key_of(settings: Settings, part: str, digests: dict[str, str]) -> str:
    """Return the name of a training's folder: a hash of its settings, its data and its base."""
    decisive = decisive_settings(settings)
    content = [decisive, digests["train"], digests[part], digests["base"]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]


def decisive_settings(settings: Settings) -> dict[str, Any]:
    """Return the settings that decide a training's course, flat."""
    found = stage_settings(settings, "02_train")
    return {key: value for key, value in found.items() if key not in _NOT_DECISIVE}


@dataclass(frozen=True)
class Outcome:
    """One finished training.

    Attributes:
        facts: outcome.json: `diverged` (what stopped it, or ""), `seed`, `tokens`, `seconds_per_step`…
    """

    folder: Path
    facts: dict[str, Any]

    @cached_property
    def looks(self) -> pd.DataFrame:
        """The held-out losses, one look a row."""
        return pd.read_parquet(self.folder / "heldout.parquet")

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """One optimizer step a row."""
        return pd.read_parquet(self.folder / "metrics.parquet")

    @property
    def angles(self) -> AngleHistory | None:
        """What the training left of its rotations, None without gates."""
        path = self.folder / "angles.safetensors"
        return read_angles(path) if path.is_file() else None

    @property
    def what_if(self) -> pd.DataFrame | None:
        """The held-out losses with the rotations at other powers, one power a row; None without gates."""
        path = self.folder / WHAT_IF
        return pd.read_parquet(path) if path.is_file() else None

    @cached_property
    def _documents(self) -> dict[str, np.ndarray]:
        return load_file(self.folder / "heldout_documents.safetensors")

    def documents(self, endpoint: str) -> tuple[Floats, Floats]:
        """Return an endpoint document by document: what is summed, and what the sum is divided by, each (D,).

        Losses: nats and targets. `decision_right`: 1 or 0, and 1 where something is decided.
        """
        name, found = endpoint.removeprefix("heldout."), self._documents
        if name == "decision_right":
            right = found["right"][-1]
            return (right > 0).astype(float), (right >= 0).astype(float)
        look = int(self.looks["loss"].to_numpy().argmin()) if name == "best" else -1
        sums, counts = found["sums"][look], found["counts"]
        if name in PARTS:
            return sums[:, PARTS.index(name)], counts[:, PARTS.index(name)]
        return sums.sum(1), counts.sum(1)

    @cached_property
    def diverged(self) -> bool:
        """Whether a gradient was no number and the training stopped, or the loss is none at its end."""
        return bool(self.facts["diverged"]) or not np.isfinite(self._documents["sums"]).all()

    def value(self, endpoint: str) -> float:
        """Return an endpoint over all documents: the worst there is for a training that diverged.

        Raises:
            StageError: no document has the endpoint, such as a decision in data without labels.
        """
        if self.diverged:
            return 0.0 if higher_is_better(endpoint) else float("inf")
        total, count = self.documents(endpoint)
        if not count.sum():
            raise StageError(
                f"{endpoint}: no document of {self.facts['part']} data has one; judge by another"
            )
        return float(total.sum() / count.sum())


def higher_is_better(endpoint: str) -> bool:
    """Whether more of an endpoint is better: of shares, not of losses."""
    return endpoint == "heldout.decision_right"


def read_outcome(folder: Path, needed: tuple[str, ...] = ()) -> Outcome | None:
    """Return a finished training; None where it was not carried out, or did not keep what is needed of it.

    One that diverged has nothing to keep.
    """
    path = folder / FACTS
    if not path.is_file():
        return None
    facts = json.loads(path.read_text(encoding="utf-8"))
    whole = facts["diverged"] or all((folder / name).exists() for name in needed)
    return Outcome(folder, facts) if whole else None
