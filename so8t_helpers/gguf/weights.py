"""Weights by their GGUF names, as float32 tensors: from a GGUF file or from the checkpoint it was made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader
from numpy.typing import NDArray
from torch import Tensor

from so8t_helpers.gguf.convert import dequantize_rows, quantize_rows
from so8t_helpers.gguf.layout import GgufTensor
from so8t_helpers.phi3.stream import Read
from so8t_helpers.phi3.weights import TensorPlace
from so8t_helpers.so8 import rotation


def gguf_weights(path: Path) -> Read:
    """Return a function that reads and dequantises one tensor of a GGUF file by name."""
    reader = GGUFReader(path)
    places = {
        t.name: (t.tensor_type, tuple(int(n) for n in reversed(t.shape)), int(t.data_offset), int(t.n_bytes))
        for t in reader.tensors
    }

    def read(name: str) -> Tensor:
        kind, shape, offset, nbytes = places[name]
        # Read, not mapped: mapped pages would stay in this process's memory.
        data = np.fromfile(path, dtype=np.uint8, count=nbytes, offset=offset)
        rows = data.reshape(shape[0] if len(shape) > 1 else 1, -1)
        return torch.from_numpy(dequantize_rows(rows, kind).reshape(shape))

    return read


def checkpoint_weights(tensors: Sequence[GgufTensor]) -> Read:
    """Return a function that reads one tensor of the checkpoint by its GGUF name."""
    sources = {tensor.name: tensor.source for tensor in tensors}

    def read(name: str) -> Tensor:
        source = sources[name]
        return source.read().float() if isinstance(source, TensorPlace) else torch.from_numpy(source)

    return read


def rounded_weights(
    read: Read,
    types: Mapping[str, GGMLQuantizationType],
    threads: int,
    blocks: Mapping[str, Tensor] | None = None,
) -> Read:
    """Return a reader of the weights as quantised to `types`; vectors and what it does not name stay exact.

    Args:
        blocks: rotations by name; these weights are quantised before R is baked in.
    """

    def rounded(name: str) -> Tensor:
        weight = read(name)
        if name not in types or weight.dim() < 2:
            return weight
        return quantised(weight, types[name], (blocks or {}).get(name), threads)

    return rounded


def quantised(weight: Tensor, kind: GGMLQuantizationType, blocks: Tensor | None, threads: int) -> Tensor:
    """Return what a quantised weight (out, in) computes with; `blocks` are baked in after it is quantised."""
    if blocks is not None:
        plain = rotation.bake_rotation(weight, blocks.transpose(-1, -2)).contiguous()  # W = W' R^T
        return rotation.bake_rotation(quantised(plain, kind, None, threads), blocks)
    rows = weight.numpy()
    step = -(-len(rows) // threads)

    def convert(start: int) -> NDArray[np.float32]:
        return dequantize_rows(quantize_rows(rows[start : start + step], kind), kind)

    with ThreadPoolExecutor(threads) as pool:
        return torch.from_numpy(np.concatenate(list(pool.map(convert, range(0, len(rows), step)))))
