"""02_train against its twin made of the libraries: 20 steps, the same numbers but for rounding."""

from __future__ import annotations

import pytest

from so8t_helpers import demo
from so8t_helpers.run.files import demo_folder
from so8t_helpers.settings import Settings, merge
from so8t_helpers.train import stage
from tests.twin import compare

STEPS = 20
CHOSEN = {
    "model": {"quantization": "none"},
    "lora": {"r": 8, "alpha": 16, "dropout": 0.0},
    "training": {"max_steps": STEPS, "max_grad_norm": 0.5, "warmup_share": 0.1},
}


OWN = {
    "lora": CHOSEN["lora"] | {"rslora": True, "b_rate": 8e-3},
    "so8t": {"init_scale": 0.0, "learning_rate": 2e-2},
    "pet": {"relative": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, OWN], ids=["as the seed says", "own rates, from the identity"])
def test_twenty_steps_are_those_of_the_libraries(demo_run: Settings, tmp_path, more: dict):
    """As near to the libraries' training in float64 as their own in float32 is, with room for another order.

    Two float32 computations of one thing differ from the exact one by amounts of one size; which is nearer is
    chance, so ours may be four times as far off, and losses by 1e-6 of themselves at least.
    """
    demo.prepare(demo_run)
    data = {"dataset_dir": str(demo_run.run_dir / "01_dataset")}
    settings = merge(demo_run, CHOSEN | more | {"run": {"name": "twin", "root": str(tmp_path)}})
    settings = merge(settings, {"training": data, "model": {"base": str(demo_folder(demo_run, "base"))}})
    stage.train(settings)
    found = compare(settings, demo_folder(demo_run, "base"), tmp_path / "start")

    for ours, exactly, libraries in (
        (found.metrics["task_loss"], found.exact.losses, found.theirs.losses),
        (found.metrics["pet_loss"], found.exact.pet, found.theirs.pet),
    ):
        for own, right, other in zip(ours, exactly, libraries, strict=True):
            assert abs(own - right) <= max(4 * abs(other - right), 1e-6 * abs(right))
    assert found.off <= 4 * found.theirs_off
    assert found.off < 1e-3  # and small, whatever the libraries' float32 does
