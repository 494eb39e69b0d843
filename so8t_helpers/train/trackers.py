"""The training's figures to TensorBoard, trackio, wandb or MLflow, through accelerate's own classes.

A tracker that is missing or down never stops a training: one warning says so, and it is left alone.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from so8t_helpers.run.origin import public_name
from so8t_helpers.run.stage import stage_settings
from so8t_helpers.settings import Settings

log = logging.getLogger(__name__)

PROJECT = "so8t"
# A server that does not answer would hold every step up for minutes of retries; a user's own setting wins.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
_SECRET_NAMES = re.compile("KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
_SHORTEST_SECRET = 6  # a shorter value would blot out ordinary words


class Trackers:
    """The trackers of one training; calls go to each that still works.

    Args:
        settings: `training.trackers` names them; the run's name is theirs.
        first: the step that the training goes on from; what an interrupted run logged beyond it is void.
    """

    def __init__(self, settings: Settings, first: int):
        self.run, self.first = settings.run.name, first
        self.folder = settings.run_dir / "trackers"
        self.alive: dict[str, Any] = {}
        for name in dict.fromkeys(settings.training.trackers):
            self._guarded(name, partial(self._start, name, settings))

    def log(self, values: dict[str, Any], step: int) -> None:
        """Log the finite numbers among `values` at optimizer step `step`."""
        numbers = {
            k: v for k, v in values.items() if isinstance(v, int | float) and math.isfinite(v) and k != "step"
        }
        for name, tracker in list(self.alive.items()):
            self._guarded(name, partial(tracker.log, numbers, step=step))

    def angles(self, layers: list[int], angles: Tensor, step: int) -> None:
        """Log a histogram of each gated layer's principal angles (layers, d/8, 4)."""
        for name, tracker in list(self.alive.items()):
            draw = _HISTOGRAMS.get(name)
            if draw is not None:
                self._guarded(name, partial(draw, tracker, layers, angles, step))

    def finish(self) -> None:
        """Close them all."""
        for name, tracker in list(self.alive.items()):
            self._guarded(name, tracker.finish)
        self.alive.clear()

    def _start(self, name: str, settings: Settings) -> None:
        from accelerate import PartialState, tracking  # noqa: PLC0415  (takes a second)

        PartialState()  # what accelerate's trackers ask whether this is the first process
        importlib.import_module(name)
        tracker = _MAKERS[name](tracking, self)
        tracker.start()
        tracker.store_init_configuration(_configuration(settings))
        self.alive[name] = tracker

    def _guarded(self, name: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:  # whatever it is, the training is worth more
            self.alive.pop(name, None)
            missing = isinstance(error, ModuleNotFoundError)
            remedy = (
                f"pip install {_PACKAGES.get(name, name)}" if missing else "the training goes on without it"
            )
            log.warning("training.trackers: %s: %s (%s)", name, _said(error), remedy)


def _tensorboard(tracking: Any, own: Trackers) -> Any:
    return tracking.TensorBoardTracker(own.run, str(own.folder / "tensorboard"), purge_step=own.first + 1)


def _mlflow(tracking: Any, own: Trackers) -> Any:
    import mlflow  # noqa: PLC0415  (optional)

    for key, value in _PATIENCE.items():
        os.environ.setdefault(key, value)
    if not (address := os.environ.get("MLFLOW_TRACKING_URI")):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # a folder needs no database and no server
        folder = own.folder / "mlflow"
        folder.mkdir(parents=True, exist_ok=True)
        address = folder.as_uri()
    mlflow.set_tracking_uri(address)  # said in any case: it would keep to what an earlier training said
    return tracking.MLflowTracker(experiment_name=PROJECT, run_name=own.run)


def _wandb(tracking: Any, own: Trackers) -> Any:
    own.folder.mkdir(parents=True, exist_ok=True)
    return tracking.WandBTracker(PROJECT, name=own.run, dir=str(own.folder))


def _trackio(tracking: Any, own: Trackers) -> Any:
    return tracking.TrackioTracker(PROJECT, name=own.run)


def _tensorboard_histograms(tracker: Any, layers: list[int], angles: Tensor, step: int) -> None:
    for layer, values in zip(layers, angles, strict=True):
        tracker.writer.add_histogram(f"principal angles/layer {layer}", values.flatten(), step)


def _wandb_histograms(tracker: Any, layers: list[int], angles: Tensor, step: int) -> None:
    import wandb  # noqa: PLC0415  (optional)

    named = {f"principal angles/layer {n}": a.flatten().numpy() for n, a in zip(layers, angles, strict=True)}
    tracker.run.log({name: wandb.Histogram(values) for name, values in named.items()}, step=step)


_MAKERS = {"tensorboard": _tensorboard, "mlflow": _mlflow, "wandb": _wandb, "trackio": _trackio}
_HISTOGRAMS = {"tensorboard": _tensorboard_histograms, "wandb": _wandb_histograms}
_PACKAGES = {"mlflow": "mlflow-skinny"}


def _configuration(settings: Settings) -> dict[str, str | int | float | bool]:
    """Return what decides the training, flat; of a folder its name alone, since a path tells of a machine."""
    flat = stage_settings(settings, "02_train")
    flat["model.base"] = public_name(settings.model.base)
    for key in ("training.dataset_dir", "training.continue_from"):
        flat[key] = Path(flat[key]).name if flat[key] else None
    return {k: v if isinstance(v, str | int | float | bool) else str(v) for k, v in flat.items()}


def _said(error: Exception) -> str:
    """Return an error's first line without what the environment holds as a secret, or a URL as a password."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    for name, value in os.environ.items():
        if _SECRET_NAMES.search(name) and len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, "…")
    return re.sub(r"//[^/@\s]+@", "//…@", text)
