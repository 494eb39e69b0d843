"""Rotations of a made-up run, for the tests of what draws them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from so8t_helpers.so8 import rotation


def write_run(
    root: Path, name: str = "demo", *, snapshots: int = 6, layers: int = 3, blocks: int = 8, seed: int = 0
) -> Path:
    """Write a run's angles.safetensors; the last layer moves most. Returns the file."""
    generator = torch.Generator().manual_seed(seed)
    start = rotation.initial_free(layers, blocks * rotation.BLOCK, 0.05, generator)
    motion = rotation.initial_free(layers, blocks * rotation.BLOCK, 0.1, generator)
    motion *= torch.arange(layers).view(-1, 1, 1) / max(layers - 1, 1)
    free = torch.stack([start + motion * step / (snapshots - 1) for step in range(snapshots)])
    path = root / name / "02_train" / "angles.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        "steps": torch.arange(snapshots) * 10,
        "layers": torch.arange(layers) * 2 + 1,
        "free": free,
        "angles": rotation.principal_angles(free),
    }
    save_file(tensors, path)
    return path
