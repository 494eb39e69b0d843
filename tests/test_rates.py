"""Rates by group, starts at the identity, rank-stabilised LoRA and PET relative to the states' scale."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from so8t_helpers.phi3.lora_folder import read_adapter
from so8t_helpers.phi3.shape import read_shape
from so8t_helpers.phi3.weights import read_checkpoint
from so8t_helpers.settings import Settings, validate
from so8t_helpers.so8 import rotation
from so8t_helpers.train import pet
from so8t_helpers.train.adapters import Adapters
from so8t_helpers.train.optimizer import Optimizer
from tests.phi3_folders import small_folder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rates") / "base"
    return small_folder(folder, hidden_size=64, num_attention_heads=2, num_key_value_heads=2)


def chosen(**sections: dict) -> Settings:
    training = {"optimizer": "adamw", "precision": "fp32", "learning_rate": 1e-3, "max_grad_norm": 1e9}
    return validate({"training": training, "lora": {"r": 4, "alpha": 8}} | sections, "test")


def test_the_gradient_at_the_identity_is_right():
    """Against autograd through float64's exponential; float32's is off by some 1e-7 of the largest entry."""
    generator = torch.Generator().manual_seed(4)
    free = torch.zeros(2, 5, 28)
    by_rotation = torch.randn(2, 5, 8, 8, generator=generator)
    exact = free.double().requires_grad_()
    (rotation.rotation(exact) * by_rotation.double()).sum().backward()
    found = rotation.free_gradient(free, by_rotation)
    assert (found - exact.grad).abs().max() < 1e-6 * exact.grad.abs().max()
    # d exp at 0 is the identity map: each free number gets the difference of its two entries.
    rows, columns = torch.triu_indices(8, 8, offset=1)
    expected = by_rotation[..., rows, columns] - by_rotation[..., columns, rows]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_gates_from_the_identity_change_nothing_until_they_are_trained(base: Path):
    adapters = Adapters(read_shape(base), chosen(so8t={"init_scale": 0.0}), CPU)
    assert torch.equal(adapters.rotations, torch.eye(8).expand_as(adapters.rotations))


@pytest.mark.parametrize(
    ("sections", "ratios"),
    [
        ({}, (1, 1, 1)),
        ({"so8t": {"learning_rate": 0.02}}, (1, 1, 20)),
        ({"lora": {"r": 4, "alpha": 8, "b_rate": 0.016}}, (1, 16, 1)),
        ({"so8t": {"learning_rate": 5e-4}, "lora": {"r": 4, "alpha": 8, "b_rate": 0.004}}, (1, 4, 0.5)),
    ],
)
def test_each_group_has_its_own_rate(base: Path, sections: dict, ratios: tuple[float, float, float]):
    """AdamW's first step moves every number by its rate, whatever the gradient's size."""
    settings = chosen(**sections)
    adapters = Adapters(read_shape(base), settings, CPU)
    optimizer = Optimizer(adapters, settings.training)
    generator = torch.Generator().manual_seed(2)
    for gradient in adapters.gradients():
        gradient.copy_(torch.randn(gradient.shape, generator=generator))
    before = {key: view.detach().clone() for key, view in adapters.matrices.items()}
    free = adapters.free.detach().clone()
    optimizer.step(5e-4)  # half of the rate, as a schedule would have it
    for key, view in adapters.matrices.items():
        rate = 5e-4 * ratios["ab".index(key[2])]
        moved = (view.detach() - before[key]).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, rate), rtol=1e-2, atol=0)
    moved = (adapters.free.detach() - free).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 5e-4 * ratios[2]), rtol=1e-2, atol=0)


def test_an_optimizer_with_groups_is_taken_up_where_it_was(base: Path):
    settings = chosen(so8t={"learning_rate": 0.02}, lora={"r": 4, "alpha": 8, "b_rate": 0.016})
    results = []
    for interrupted in (False, True):
        adapters = Adapters(read_shape(base), settings, CPU)
        optimizer = Optimizer(adapters, settings.training)
        generator = torch.Generator().manual_seed(2)
        for step in range(4):
            if interrupted and step == 2:
                state = {"loss_scale": optimizer.loss_scale, "good_steps": optimizer.good_steps}
                tensors = {name: tensor.clone() for name, tensor in optimizer.tensors().items()}
                optimizer = Optimizer(adapters, settings.training)
                optimizer.restore(tensors, state)
            for gradient in adapters.gradients():
                gradient.copy_(torch.randn(gradient.shape, generator=generator))
            optimizer.step(1e-3)
        results.append((adapters.lora.detach().clone(), adapters.free.detach().clone()))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_rank_stabilised_lora_is_peft_s_own(base: Path, tmp_path: Path):
    settings = chosen(lora={"r": 4, "alpha": 8, "rslora": True})
    adapters = Adapters(read_shape(base), settings, CPU)
    adapters.save(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))["use_rslora"] is True
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path))
    scales = {m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")}
    assert scales == {8 / math.sqrt(4)}
    assert {lora.scale for lora in read_adapter(tmp_path, read_checkpoint(base)).values()} == scales


@pytest.mark.parametrize("penalty", ["mse", "huber"])
def test_relative_pet_knows_no_scale_and_its_gradient_is_exact(penalty: str):
    """Against float64's autograd over states divided by their root mean square, held constant."""
    generator = torch.Generator().manual_seed(6)
    hidden = torch.randn(40, 16, generator=generator) * 7
    documents = torch.tensor([0] * 17 + [1] * 15 + [-1] * 8)
    valid = pet.valid_positions(documents)
    settings = chosen(pet={"relative": True, "penalty": penalty, "huber_delta": 0.8}).pet
    scale = pet.inverse_scale(hidden, valid, 9)
    exact = hidden.double().requires_grad_()
    constant = exact.detach()[1:-1][valid].square().mean().rsqrt()
    difference = (exact[2:] - 2 * exact[1:-1] + exact[:-2])[valid] * constant
    cost = difference.square()
    if penalty == "huber":  # torch's has 0.5 d^2 within delta, as ours
        cost = torch.nn.functional.huber_loss(difference, torch.zeros_like(difference), "none", delta=0.8)
    cost.mean(-1).sum().backward()
    parts = [
        pet.penalty_and_gradient(hidden, valid, a, min(a + 11, 40), settings, scale) for a in range(0, 40, 11)
    ]
    assert sum(part[0].item() for part in parts) == pytest.approx(cost.mean(-1).sum().item(), rel=1e-5)
    found = torch.cat([part[1] for part in parts])
    assert (found - exact.grad).norm() < 1e-5 * exact.grad.norm()
    larger = pet.inverse_scale(hidden * 1000, valid, 9)
    again = pet.penalty_and_gradient(hidden * 1000, valid, 0, 40, settings, larger)[0]
    assert again.item() == pytest.approx(sum(part[0].item() for part in parts), rel=1e-4)
