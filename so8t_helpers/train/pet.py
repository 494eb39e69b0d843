"""PET: a penalty on the second difference of the last hidden states, in three phases of training.

P = mean over valid positions and features of rho(h_{t+1} - 2 h_t + h_{t-1}) for a trajectory h_1 ... h_T,
with rho the square or the Huber function. A position is valid when its two
neighbours belong to the same document, so padding and document borders never enter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

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


def inverse_scale(hidden: Tensor, valid: Tensor, chunk: int) -> Tensor:
    """Return one over the root mean square of the hidden states at valid positions, () float32.

    `pet.relative` multiplies the states by it, as by a constant: they come out of a norm, so there is little
    to be gained by shrinking them. A float32 copy exists of `chunk` tokens at a time.
    """
    squares = [rows.float().square().mean(-1) for rows in hidden[1:-1].split(chunk)]
    return ((torch.cat(squares) * valid).sum() / valid.sum().clamp(min=1)).clamp(min=1e-12).rsqrt()


def penalty_and_gradient(
    hidden: Tensor, valid: Tensor, start: int, end: int, settings: PetSettings, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One stretch of the sum over valid positions of the mean over features of rho(second difference).

    With s_t the derivative of the sum by the second difference at t, its gradient by h_t is
    s_{t-1} - 2 s_t + s_{t+1}: a second difference once more. Stretch by stretch, float32 copies of the hidden
    states exist for a few hundred tokens at a time.

    Args:
        hidden: (T, d) output of the final norm, T >= 3.
        valid: (T - 2,) from `valid_positions`.
        scale: () what the states are multiplied by beforehand, from `inverse_scale`; None for 1.
        start, end: the stretch; the sums over stretches that cover 0 ... T make the whole.

    Returns:
        Scalar float32, the cost of the stretch's positions (divide by the valid positions of the whole batch
        for the mean), and (end - start, d) float32, the whole sum's gradient by the stretch's hidden states.
    """
    first, last = max(start - 1, 1), min(end + 1, len(hidden) - 1)  # middles of differences it enters
    states = hidden[first - 1 : last + 1].float()
    if scale is not None:
        states = states * scale
    difference = states[2:] - 2 * states[1:-1] + states[:-2]  # (last - first, d)
    counted = valid[first - 1 : last - 1, None]
    if settings.penalty == "huber":
        gradient = difference.clamp(-settings.huber_delta, settings.huber_delta)
        cost = gradient * (difference - 0.5 * gradient)
    else:
        gradient, cost = 2 * difference, difference.square()
    own = slice(max(start, first) - first, min(end, last) - first)
    total = (cost[own].mean(-1, keepdim=True) * counted[own]).sum()
    gradient = gradient * (counted / hidden.shape[1])
    # Widened to the middles start - 1 ... end.
    gradient = functional.pad(gradient, (0, 0, first - start + 1, end + 1 - last))
    by_states = gradient[2:] - 2 * gradient[1:-1] + gradient[:-2]
    return total, by_states if scale is None else by_states * scale
