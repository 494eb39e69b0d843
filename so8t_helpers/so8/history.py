"""What a training left of its rotations: angles and distances of every block at every snapshot."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.numpy import load_file

from so8t_helpers.run.files import StageError
from so8t_helpers.so8 import rotation


@dataclass(frozen=True, eq=False)
class AngleHistory:
    """The rotations of a run at every snapshot of its training.

    S snapshots, L layers, B blocks a layer.

    Attributes:
        steps: (S,) optimizer step of each snapshot; the first is the start.
        layers: (L,) decoder layer of each row.
        free: (S, L, B, 28) the upper triangles of the generators A.
        angles: (S, L, B, 4) principal angles in radians, largest first.
    """

    steps: np.ndarray
    layers: np.ndarray
    free: np.ndarray
    angles: np.ndarray

    @cached_property
    def degrees(self) -> np.ndarray:
        """The angles in degrees, (S, L, B, 4)."""
        return np.rad2deg(self.angles)

    @cached_property
    def drift(self) -> np.ndarray:
        """Mean change |theta_t - theta_0| of a layer's angles since the start, in degrees, (S, L)."""
        return np.abs(self.degrees - self.degrees[0]).mean(axis=(2, 3))

    @cached_property
    def distance(self) -> np.ndarray:
        """Geodesic distance of every block from its start, in radians, (S, L, B)."""
        start, snapshots = self.blocks(0), range(len(self.steps))
        return np.stack([rotation.geodesic_distance(start, self.blocks(s)).numpy() for s in snapshots])

    def blocks(self, snapshot: int) -> torch.Tensor:
        """Return the rotations of one snapshot, (L, B, 8, 8)."""
        return rotation.rotation(torch.from_numpy(self.free[snapshot]))

    def matrix(self, snapshot: int, layer: int, block: int) -> np.ndarray:
        """Return one rotation, (8, 8); `layer` is the row in `layers`."""
        return rotation.rotation(torch.from_numpy(self.free[snapshot, layer, block])).numpy()


def read_angles(path: Path) -> AngleHistory:
    """Read 02_train's angles.safetensors.

    Raises:
        StageError: the file is missing or is not one.
    """
    if not path.is_file():
        raise StageError(f"no file {path}; 02_train writes it when so8t.enabled is true")
    tensors = load_file(path)
    missing = {"steps", "layers", "free", "angles"} - tensors.keys()
    if missing:
        raise StageError(f"{path}: no tensor {sorted(missing)}; run 02_train again")
    return AngleHistory(tensors["steps"], tensors["layers"], tensors["free"], tensors["angles"])


def most_moved(history: AngleHistory, count: int = 8, snapshot: int = -1) -> pd.DataFrame:
    """Return the blocks farthest from their start: layer, block, distance and largest angle."""
    distance = history.distance[snapshot]  # (L, B)
    layers, blocks = np.unravel_index(np.argsort(distance, axis=None)[::-1][:count], distance.shape)
    return pd.DataFrame(
        {
            "layer": history.layers[layers],
            "block": blocks,
            "distance (rad)": distance[layers, blocks],
            "θ₁ at the start (°)": history.degrees[0, layers, blocks, 0],
            "θ₁ (°)": history.degrees[snapshot, layers, blocks, 0],
        }
    )


def summary(history: AngleHistory, name: str) -> str:
    """Say in Markdown what a run's rotations did, and what to look at where that is bad."""
    by_layer, last = history.drift[-1], history.degrees[-1]
    top = most_moved(history, 1).iloc[0]
    return (
        f"**In run `{name}` the principal angles moved by {by_layer.mean():.2f}° on average, most in layer "
        f"{history.layers[by_layer.argmax()]} ({by_layer.max():.2f}°). The block that moved most is "
        f"{top['block']:.0f} of layer {top['layer']:.0f}, {top['distance (rad)']:.3f} rad from its start. "
        f"The largest angle is {last.max():.1f}° of 180°.** "
        "If an angle comes near 180°, lower `so8t.init_scale` or `training.learning_rate`; if nothing moved, "
        "look at the learning rate and at `so8t.layer_indices`."
    )
