"""Is the model as sure of its decision as it is right? Its probability for the label that it states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from so8t_helpers.engines.base import Engine
from so8t_helpers.evaluate.statistics import Floats, percentiles, resamples
from so8t_helpers.thinking.format import DECISION_LINES, LABELS, parse

_BINS = 10


@dataclass(frozen=True)
class Stated:
    """A decision in an answer: the text `before` its label, the label, whether that is the record's."""

    before: str
    decision: str
    correct: bool


def find_stated(prompt: str, text: str, decision: str | None, label: str) -> Stated | None:
    """Find where an answer states its decision; None where it does not do so in the line that we train."""
    style = parse(text).style
    if decision is None or style is None or (place := text.rfind(DECISION_LINES[style] + decision)) < 0:
        return None
    # llama.cpp and transformers differ in one space before the first word: the training had none.
    return Stated(
        prompt + text[: place + len(DECISION_LINES[style])].lstrip(" "), decision, decision == label
    )


def calibrate(engine: Engine, stated: list[Stated], samples: int, seed: int) -> dict[str, Any] | None:
    """Hold the probability of each stated label against how often such labels are right.

    The four labels are put in turn where the stated one stands, and the model's probabilities of those four
    texts are normalised. Reported are the Brier score of the stated label and the expected calibration error
    over ten equal bins (Naeini et al. 2015; Guo et al. 2017, arXiv:1706.04599, eq. 3), both with bootstrap
    intervals over the decisions; that of the error lies high, since in a sample chance adds to every gap.

    None is returned for an engine that cannot score, and where nothing was stated.
    """
    if not engine.can_score or not stated:
        return None
    sure = np.array([_confidence(engine, one) for one in stated])
    right = np.array([one.correct for one in stated], dtype=float)
    squares = (sure - right) ** 2
    which, bins = _bin(sure), []
    for chosen in (which == i for i in np.unique(which)):
        confidence, accuracy = float(sure[chosen].mean()), float(right[chosen].mean())
        bins.append({"n": int(chosen.sum()), "confidence": confidence, "accuracy": accuracy})
    draws = resamples(len(stated), samples, seed)
    return {
        "n": len(stated),
        "confidence": float(sure.mean()),
        "accuracy": float(right.mean()),
        "brier": float(squares.mean()),
        "ece": _ece(sure, right),
        "ci": {
            "brier": percentiles(squares[draws].mean(axis=1)),
            "ece": percentiles(np.array([_ece(sure[draw], right[draw]) for draw in draws])),
        },
        "bins": bins,
    }


def _bin(sure: Floats) -> NDArray[np.int64]:
    return np.minimum((sure * _BINS).astype(np.int64), _BINS - 1)


def _ece(sure: Floats, right: Floats) -> float:
    """Mean over the decisions of the gap between confidence and accuracy in their bin."""
    return float(np.abs(np.bincount(_bin(sure), weights=sure - right)).sum() / len(sure))


def _confidence(engine: Engine, stated: Stated) -> float:
    """The model's probability of the stated label among the four."""
    texts = [stated.before + label for label in LABELS]
    ids = [engine.tokenize(text) for text in texts]
    # A label may share tokens with what stands before it: from where the four part, all is counted.
    same = next(i for i, column in enumerate(zip(*ids, strict=False)) if len(set(column)) > 1)
    logs = np.array([sum(engine.score(text, start=same)) for text in texts])
    shares = np.exp(logs - logs.max())
    return float(shares[LABELS.index(stated.decision)] / shares.sum())
