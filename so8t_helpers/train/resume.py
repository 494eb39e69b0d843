"""Checkpoints that survive a kill at any moment: written aside, hashed, renamed, verified before use.

A checkpoint is a folder `step-N` with safetensors and JSON alone (no pickles), and a `complete.json` that
holds their hashes and the fingerprint of the training it belongs to.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save_file
from torch import Tensor

from so8t_helpers.run.files import atomic_directory, remove, sha256_file, write_json

log = logging.getLogger(__name__)

_TENSORS, _STATE, _MARKER = "state.safetensors", "state.json", "complete.json"


@dataclass
class Checkpoint:
    """Tensors by name, and the rest of the state as JSON."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save(folder: Path, step: int, fingerprint: str, checkpoint: Checkpoint, keep: int) -> None:
    """Write `folder/step-N`, then remove all but the newest `keep`."""
    with atomic_directory(folder / f"step-{step:07d}") as scratch:
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in checkpoint.tensors.items()}, scratch / _TENSORS
        )
        write_json(scratch / _STATE, checkpoint.state)
        hashes = {name: sha256_file(scratch / name) for name in (_TENSORS, _STATE)}
        write_json(scratch / _MARKER, {"fingerprint": fingerprint, "sha256": hashes})
    for old in sorted(folder.glob("step-*"))[:-keep]:
        remove(old)


def newest(folder: Path, fingerprint: str) -> Checkpoint | None:
    """Return the newest checkpoint that verifies and belongs to this training; None when there is none."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        reason = _unusable(path, fingerprint)
        if reason is None:
            state = json.loads((path / _STATE).read_text(encoding="utf-8"))
            # Read, not mapped: what stays in use would keep Windows from removing the checkpoint. Cloned, as
            # the optimizer writes into them, and they are views of one bytes object, at odd addresses.
            tensors = load((path / _TENSORS).read_bytes())
            return Checkpoint({name: tensor.clone() for name, tensor in tensors.items()}, state)
        log.warning("checkpoint %s skipped: %s", path.name, reason)
    return None


def _unusable(path: Path, fingerprint: str) -> str | None:
    try:
        marker = json.loads((path / _MARKER).read_text(encoding="utf-8"))
        if marker["fingerprint"] != fingerprint:
            return "it belongs to other settings or data"
        for name, digest in marker["sha256"].items():
            if sha256_file(path / name) != digest:
                return f"{name} does not have the recorded hash"
    except (OSError, ValueError, KeyError) as error:
        return f"incomplete ({type(error).__name__})"
    return None
