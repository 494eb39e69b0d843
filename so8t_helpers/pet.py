"""PET: a penalty on the second difference of the last hidden states, in three phases of training.

A trajectory h_1 ... h_T that bends costs: P = mean over valid positions and features of
rho(h_{t+1} - 2 h_t + h_{t-1}), with rho the square or the Huber function. A position is valid when its two
neighbours belong to the same document, so padding and document borders never enter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from so8t_helpers.settings import PetSettings

PHASES = ("exploration", "transition", "stabilization")


@dataclass(frozen=True)
class PhaseAt:
    """The phase of one optimizer step and its lambda."""

    name: str
    weight: float


def phase_at(settings: PetSettings, step: int, total_steps: int) -> PhaseAt:
    """Return phase and lambda of optimizer step `step` (0-based) out of `total_steps`.

    A phase ends with the last step that begins before its share of the steps is used up.
    """
    lambdas = (settings.lambda_exploration, settings.lambda_transition, settings.lambda_stabilization)
    first, second, _ = settings.phase_shares
    position = step / total_steps
    # Shares such as 0.2 + 0.4 are not exact in binary; without the slack a border step could slip over.
    index = sum(position >= border - 1e-9 for border in (first, first + second))
    return PhaseAt(PHASES[index], lambdas[index] if settings.enabled else 0.0)


def valid_positions(documents: Tensor) -> Tensor:
    """Mark the middle positions whose two neighbours lie in the same document.

    Args:
        documents: (T,) document number of each token, negative for padding.

    Returns:
        (T - 2,) bool; entry t speaks of position t + 1.
    """
    left, middle, right = documents[:-2], documents[1:-1], documents[2:]
    return (left == middle) & (middle == right) & (middle >= 0)


def penalty_sum(hidden: Tensor, valid: Tensor, settings: PetSettings) -> Tensor:
    """Sum over valid positions of the mean over features of rho(second difference).

    Args:
        hidden: (T, d) output of the final norm.
        valid: (T - 2,) from `valid_positions`.

    Returns:
        Scalar float32. Divide by the number of valid positions of the whole batch for the mean.
    """
    states = hidden.float()
    bend = states[2:] - 2 * states[1:-1] + states[:-2]  # (T - 2, d)
    if settings.penalty == "huber":
        delta = settings.huber_delta
        size = bend.abs()
        cost = torch.where(size <= delta, 0.5 * bend.square(), delta * (size - 0.5 * delta))
    else:
        cost = bend.square()
    return (cost.mean(-1) * valid).sum()
