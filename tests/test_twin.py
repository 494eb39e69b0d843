"""02_train against its twin made of the libraries: 20 steps, the same numbers but for rounding."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from so8t_helpers import demo
from so8t_helpers.phi3.shape import read_shape
from so8t_helpers.phi3.tokenizer_files import load_tokenizer
from so8t_helpers.run.files import demo_folder, read_jsonl
from so8t_helpers.settings import Settings, merge
from so8t_helpers.so8 import rotation
from so8t_helpers.train import batches, stage
from so8t_helpers.train.adapters import Adapters
from tests.twin import make_twin, numbers, train_twin

STEPS = 20
CHOSEN = {
    "model": {"quantization": "none"},
    "lora": {"r": 8, "alpha": 16, "dropout": 0.0},
    "training": {"max_steps": STEPS, "max_grad_norm": 0.5, "warmup_share": 0.1},
}


def files(settings: Settings) -> dict[str, Tensor]:
    folder = settings.run_dir / "02_train" / "adapter"
    return load_file(folder / "adapter_model.safetensors") | load_file(folder / rotation.GATES_FILE)


def distance(found: dict[str, Tensor], exact: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """How far numbers are from the exact ones, over how far those came from the start."""
    off = sum((found[k].double() - exact[k].double()).square().sum() for k in exact)
    moved = sum((exact[k].double() - start[k].double()).square().sum() for k in exact)
    return float((off / moved).sqrt())


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
    metrics = pd.read_parquet(settings.run_dir / "02_train" / "metrics.parquet")

    folder = demo_folder(demo_run, "base")
    adapters = Adapters(read_shape(folder), settings, torch.device("cpu"))
    adapters.save(tmp_path / "start")
    start = load_file(tmp_path / "start" / "adapter_model.safetensors")
    start |= load_file(tmp_path / "start" / rotation.GATES_FILE)
    steps = list(packed(settings, folder, metrics))
    twins = {dtype: make_twin(folder, settings, start, dtype) for dtype in (torch.float32, torch.float64)}
    for twin in twins.values():
        train_twin(twin, settings, steps)
    exact, theirs = twins[torch.float64], twins[torch.float32]

    for ours, exactly, libraries in (
        (metrics["task_loss"], exact.losses, theirs.losses),
        (metrics["pet_loss"], exact.pet, theirs.pet),
    ):
        for found, right, other in zip(ours, exactly, libraries, strict=True):
            assert abs(found - right) <= max(4 * abs(other - right), 1e-6 * abs(right))
    off = distance(files(settings), numbers(exact), start)
    assert off <= 4 * distance(numbers(theirs), numbers(exact), start)
    assert off < 1e-3  # and small, whatever the libraries' float32 does


def packed(settings: Settings, folder, metrics: pd.DataFrame):
    """The batches as 02_train lays them out, with the rate and lambda that it recorded for each step."""
    rows = read_jsonl(Path(str(settings.training.dataset_dir)) / "train.jsonl")
    tokenizer = load_tokenizer(folder)
    length = settings.training.sequence_length
    samples = batches.tokenize(rows, tokenizer, length)
    plan = batches.plan(settings, samples)
    for number, groups in enumerate(plan.steps):
        sequences = [
            batches.build_sequence(
                [samples[i] for i in chosen], length, tokenizer.pad_token_id or 0, plan.most_documents
            )
            for group in groups
            for chosen in group
        ]
        yield sequences, metrics["lr"][number], metrics["pet_lambda"][number]
