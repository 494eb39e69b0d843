"""The plan of a set of GGUF files: which checkpoint tensor goes where, as what, at which byte.

All files hold the same tensors in the order in which they lie in the checkpoint, so one pass over the
shards writes every file from front to back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray

from so8t_helpers.gguf.metadata import ARCHITECTURE, Model, add_metadata
from so8t_helpers.gguf.types import FileType, byte_size, tensor_type
from so8t_helpers.phi3.shape import HEAD, gguf_name
from so8t_helpers.phi3.weights import FLOATS, TensorPlace
from so8t_helpers.run.files import StageError

ALIGNMENT = 32  # GGUF's default `general.alignment`


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the model: its name in the GGUF, its shape, and where its weights come from.

    `source` is a place in a shard, or the numbers themselves for what config.json holds (longrope factors).
    """

    name: str
    shape: tuple[int, ...]
    source: TensorPlace | NDArray[np.float32]


@dataclass(frozen=True)
class PlannedFile:
    """One GGUF file to write.

    Attributes:
        types: the ggml type of each tensor; offsets: where its bytes begin, from the start of the file.
        header: all bytes before the first tensor.
        size: bytes of the whole file.
    """

    path: Path
    file_type: FileType
    types: dict[str, GGMLQuantizationType]
    offsets: dict[str, int]
    header: bytes
    size: int


def source_stamps(tensors: Sequence[GgufTensor]) -> list[tuple[str, int, int]]:
    """Return name, size and time of change of the shards: equal stamps mean equal weights."""
    paths = sorted({t.source.path for t in tensors if isinstance(t.source, TensorPlace)})
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


def collect_tensors(places: dict[str, TensorPlace], model: Model) -> list[GgufTensor]:
    """Return the model's tensors, longrope factors first, then in the checkpoint's order.

    Raises:
        StageError: a tensor that Phi3 does not have, one that it misses, a wrong shape or dtype.
    """
    shape = model.shape
    tensors = []
    for name, factor in (("long", shape.long_factor), ("short", shape.short_factor)):
        if factor is not None:
            numbers = np.array(factor, dtype=np.float32)
            tensors.append(GgufTensor(f"rope_factors_{name}.weight", numbers.shape, numbers))
    expected = shape.tensor_shapes()
    for name, place in places.items():
        if name == HEAD and shape.tie_embeddings:
            continue  # a copy of the embedding, which llama.cpp uses for both
        target = gguf_name(name)
        if target is None or name not in expected:
            raise StageError(
                f"{place.path}: tensor {name} has no place in a GGUF of a Phi3 model of {shape.num_layers} "
                "layers; export a baked or merged model, without adapters or buffers"
            )
        if place.shape != expected[name]:
            raise StageError(
                f"{place.path}: tensor {name} has shape {place.shape}, config.json says {expected[name]}"
            )
        if place.dtype not in FLOATS:
            raise StageError(f"{place.path}: tensor {name} is {place.dtype}, expected {', '.join(FLOATS)}")
        tensors.append(GgufTensor(target, place.shape, place))
    if missing := sorted(str(gguf_name(name)) for name in expected.keys() - places.keys()):
        raise StageError(f"{model.folder}: {len(missing)} tensors are missing, the first is {missing[0]}")
    return tensors


def plan_file(
    path: Path,
    file_type: FileType,
    tensors: Sequence[GgufTensor],
    model: Model,
    name: str,
    provenance: str,
    imatrix: dict[str, str | int] | None = None,
) -> PlannedFile:
    """Lay out one file; for `name`, `provenance` and `imatrix` see `add_metadata`."""
    writer = GGUFWriter(None, ARCHITECTURE)  # of metadata alone: the tensors' bytes never pass through it
    add_metadata(writer, model, name, file_type, provenance, imatrix if file_type.is_k_quant else None)
    shape = model.shape
    types, sizes = {}, {}
    for tensor in tensors:
        kind = tensor_type(file_type, tensor.name, tensor.shape, shape.num_layers, shape.tie_embeddings)
        types[tensor.name], sizes[tensor.name] = kind, byte_size(kind, tensor.shape)
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), sizes[tensor.name], raw_dtype=kind
        )
    header = _header_bytes(writer, path)
    offsets, position = {}, len(header)
    for tensor in tensors:
        offsets[tensor.name] = position
        position = _align(position + sizes[tensor.name])
    return PlannedFile(path, file_type, types, offsets, header, position)


def _header_bytes(writer: GGUFWriter, path: Path) -> bytes:
    scratch = path.with_name(f".{path.name}.header")
    scratch.parent.mkdir(parents=True, exist_ok=True)
    try:
        writer.write_header_to_file(scratch)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = scratch.read_bytes()
    finally:
        scratch.unlink(missing_ok=True)
    return header.ljust(_align(len(header)), b"\0")


def _align(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT
