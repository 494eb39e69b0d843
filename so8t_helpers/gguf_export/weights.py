"""Weights by their GGUF names, as float32 tensors: from a GGUF file or from the checkpoint it was made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader

from so8t_helpers.baking.tensors import TensorPlace
from so8t_helpers.gguf_export.convert import dequantize
from so8t_helpers.gguf_export.layout import Tensor

Read = Callable[[str], torch.Tensor]


def gguf_weights(path: Path) -> Read:
    """Return a function that reads and dequantises one tensor of a GGUF file by name."""
    reader = GGUFReader(path)
    places = {
        t.name: (t.tensor_type, tuple(int(n) for n in reversed(t.shape)), int(t.data_offset), int(t.n_bytes))
        for t in reader.tensors
    }

    def read(name: str) -> torch.Tensor:
        kind, shape, offset, nbytes = places[name]
        # Read, not mapped: mapped pages would stay in this process's memory.
        data = np.fromfile(path, dtype=np.uint8, count=nbytes, offset=offset)
        rows = data.reshape(shape[0] if len(shape) > 1 else 1, -1)
        return torch.from_numpy(dequantize(rows, kind).reshape(shape))

    return read


def checkpoint_weights(tensors: Sequence[Tensor]) -> Read:
    """Return a function that reads one tensor of the checkpoint by its GGUF name."""
    sources = {tensor.name: tensor.source for tensor in tensors}

    def read(name: str) -> torch.Tensor:
        source = sources[name]
        return source.read().float() if isinstance(source, TensorPlace) else torch.from_numpy(source)

    return read


def tensor_types(path: Path) -> dict[str, GGMLQuantizationType]:
    """Return the ggml type of every tensor of a GGUF file."""
    return {t.name: t.tensor_type for t in GGUFReader(path).tensors}
