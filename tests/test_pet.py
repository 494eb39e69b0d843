"""PET: phases, borders, and the penalty against a plain loop in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from so8t_helpers.settings import PetSettings
from so8t_helpers.train import pet


def test_phases_take_their_shares_of_the_steps():
    names = [pet.phase_at(PetSettings(), step, 10).name for step in range(10)]
    assert names == ["exploration"] * 2 + ["transition"] * 4 + ["stabilization"] * 4


def test_lambda_follows_the_phase_and_is_zero_when_pet_is_off():
    settings = PetSettings(lambda_exploration=0.3, lambda_transition=0.2, lambda_stabilization=0.1)
    assert [pet.phase_at(settings, s, 100).weight for s in (0, 19, 20, 59, 60, 99)] == [
        0.3,
        0.3,
        0.2,
        0.2,
        0.1,
        0.1,
    ]
    assert pet.phase_at(PetSettings(enabled=False), 5, 10).weight == 0.0


def test_an_empty_phase_is_skipped():
    settings = PetSettings(phase_shares=[0.0, 1.0, 0.0])
    assert {pet.phase_at(settings, step, 7).name for step in range(7)} == {"transition"}


@pytest.mark.parametrize("penalty", ["mse", "huber"])
def test_penalty_equals_a_plain_loop_within_documents(penalty: str):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(14, 6, generator=generator)
    documents = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 2, -1, -1, -1])
    settings = PetSettings(penalty=penalty, huber_delta=0.7)
    expected, count = 0.0, 0
    for t in range(1, 13):
        if documents[t] >= 0 and documents[t - 1] == documents[t] == documents[t + 1]:
            count += 1
            for bend in (hidden[t + 1] - 2 * hidden[t] + hidden[t - 1]).double().tolist():
                size = abs(bend)
                huber = bend * bend / 2 if size <= 0.7 else 0.7 * (size - 0.35)
                expected += (bend * bend if penalty == "mse" else huber) / 6
    valid = pet.valid_positions(documents)
    assert int(valid.sum()) == count == 5
    for borders in ((0, 14), (0, 5, 14), (0, 1, 2, 9, 13, 14)):
        parts = [
            pet.penalty_and_gradient(hidden, valid, start, end, settings)
            for start, end in itertools.pairwise(borders)
        ]
        assert sum(total.item() for total, _ in parts) == pytest.approx(expected, rel=1e-6)  # float32 sums
        found = torch.cat([gradient for _, gradient in parts])
        torch.testing.assert_close(found.double(), slope_of(hidden, documents, settings), rtol=0, atol=1e-6)


def slope_of(hidden: torch.Tensor, documents: torch.Tensor, settings: PetSettings) -> torch.Tensor:
    """The gradient by autograd in float64."""
    leaf = hidden.double().requires_grad_()
    bend = leaf[2:] - 2 * leaf[1:-1] + leaf[:-2]
    if settings.penalty == "huber":
        zero, delta = torch.zeros_like(bend), settings.huber_delta
        cost = torch.nn.functional.huber_loss(bend, zero, reduction="none", delta=delta)
    else:
        cost = bend.square()
    (cost.mean(-1) * pet.valid_positions(documents)).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def test_a_straight_line_costs_nothing():
    line = torch.arange(10.0)[:, None] * torch.tensor([[1.0, -2.0]])
    valid = pet.valid_positions(torch.zeros(10, dtype=torch.int32))
    total, gradient = pet.penalty_and_gradient(line, valid, 0, 10, PetSettings())
    assert total.item() == 0.0 and not gradient.any()
