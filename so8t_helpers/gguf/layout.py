"""The plan of a set of GGUF files, all in the checkpoint's order: one pass writes each from front to back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

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
    """One tensor by its GGUF name: a place in a shard, or config.json's own numbers (longrope factors)."""

    name: str
    shape: tuple[int, ...]
    source: TensorPlace | NDArray[np.float32]

    @property
    def rows(self) -> int:
        return self.shape[0] if len(self.shape) > 1 else 1


@dataclass(frozen=True)
class PlannedFile:
    """One GGUF file to write: type and offset of each tensor, and `header`, all bytes before the first."""

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
    imatrix: dict[str, str | int],
) -> PlannedFile:
    """Lay out one file; for `name`, `provenance` and `imatrix` see `add_metadata`."""
    writer = GGUFWriter(None, ARCHITECTURE)  # of metadata alone: the tensors' bytes never pass through it
    add_metadata(writer, model, name, file_type, provenance, imatrix if file_type.is_k_quant else {})
    shape = model.shape
    types, starts, position = {}, {}, 0
    for tensor in tensors:
        kind = tensor_type(file_type, tensor.name, tensor.shape, shape.num_layers, shape.tie_embeddings)
        size = byte_size(kind, tensor.shape)
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=kind)
        types[tensor.name], starts[tensor.name] = kind, position
        position += _align(size)
    with TemporaryDirectory() as scratch:
        writer.write_header_to_file(Path(scratch) / "header")
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = (Path(scratch) / "header").read_bytes()
    header = header.ljust(_align(len(header)), b"\0")
    offsets = {name: len(header) + start for name, start in starts.items()}
    return PlannedFile(path, file_type, types, offsets, header, len(header) + position)


def _align(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT
