"""From a checkpoint's rows to a file's bytes: checked, widened to float32, quantised by ggml's own code.

The quantisers are ggml's reference code (`kernels`); their bytes equal those of the converter (F16, BF16,
Q8_0) and of llama-quantize but for the last bit of a product (k-quants; both tested). Nearly all of the work
releases the interpreter's lock, so rows run on several threads.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias

import libgguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from numpy.typing import NDArray

from so8t_helpers.phi3.weights import TensorPlace, rounds_to_infinity
from so8t_helpers.run.files import StageError

_Q = GGMLQuantizationType
_SAME_BYTES = {("F16", _Q.F16), ("BF16", _Q.BF16), ("F32", _Q.F32)}
_F16_LIMIT = rounds_to_infinity(torch.float16)


def convert_rows(
    place: TensorPlace, start: int, stop: int, kinds: Sequence[tuple[GGMLQuantizationType, Rows | None]]
) -> list[Bytes]:
    """Read rows [start, stop) of a tensor once and return them in every type asked for.

    Args:
        kinds: pairs of a ggml type and the importance of each column, (row length,) or None; equal pairs
            share one result.

    Raises:
        StageError: a weight that is not finite, or beyond the range of float16 where F16 is asked for.
    """
    stored = place.read(start, stop) if len(place.shape) > 1 else place.read()[None]  # a vector is one row
    data = stored.view(torch.uint8).numpy()  # (rows, bytes a row)
    # Widened by numpy: torch would start threads of its own in each of ours.
    if place.dtype == "BF16":  # the upper half of a float32
        rows = (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        rows = stored.numpy().astype(np.float32, copy=False)
    _check(rows, place, start, any(kind == _Q.F16 for kind, _ in kinds))
    results: dict[tuple[GGMLQuantizationType, bool], Bytes] = {}
    for kind, importance in kinds:
        if (kind, importance is not None) not in results:
            same = (place.dtype, kind) in _SAME_BYTES
            results[kind, importance is not None] = data if same else quantize_rows(rows, kind, importance)
    return [results[kind, importance is not None] for kind, importance in kinds]


def quantize_rows(rows: Rows, kind: GGMLQuantizationType, importance: Rows | None = None) -> Bytes:
    """Return (rows, row length) float32 as the bytes of a ggml type, (rows, bytes a row)."""
    if kind == _Q.F32:
        return np.ascontiguousarray(rows).view(np.uint8)
    return (exported() or packaged)(rows, kind, importance)


def dequantize_rows(data: Bytes, kind: GGMLQuantizationType) -> Rows:
    """Return the float32 rows that a file's bytes (rows, bytes a row) stand for."""
    if kind in {_Q.F32, _Q.F16, _Q.BF16}:
        return dequantize(data, kind)
    return np.asarray(libgguf.dequantize_rows(data, kind), dtype=np.float32)


def _check(rows: Rows, place: TensorPlace, start: int, narrow: bool) -> None:
    largest = max(abs(float(rows.max())), abs(float(rows.min())))  # NaN passes through both
    if np.isfinite(largest) and not (narrow and largest >= _F16_LIMIT):
        return
    bad = np.abs(rows) >= _F16_LIMIT if np.isfinite(largest) else ~np.isfinite(rows)
    row, column = np.argwhere(bad)[0]
    value = rows[row, column]
    where = f"{place.path}: tensor {place.name}, row {start + row}, column {column}"
    if np.isfinite(value):
        raise StageError(f"{where}: {value:g} does not fit float16; set gguf.types to bf16 instead of f16")
    raise StageError(f"{where}: the weight is {value}; train or bake again, a GGUF of it would be useless")


# Rows are split over our own threads, as many as the profile says; libgguf would start its own in each.
os.environ.setdefault("LIBGGUF_NUM_THREADS", "1")

Rows: TypeAlias = NDArray[np.float32]
Bytes: TypeAlias = NDArray[np.uint8]
Quantise = Callable[[Rows, GGMLQuantizationType, Rows | None], Bytes]


def packaged(rows: Rows, kind: GGMLQuantizationType, importance: Rows | None) -> Bytes:
    """Quantise (n, row length) with libgguf. -> (n, bytes a row)."""
    return np.asarray(libgguf.quantize_rows(rows, kind, importance)).view(np.uint8)


@cache
def exported() -> Quantise | None:
    """Return a faster function like `packaged` on xllamacpp's ggml, None where its symbols are not to be had.

    The library is opened, not imported: no Python module of it runs. `ggml_quantize_chunk(type, src, dst,
    start, nrows, n_per_row, imatrix)` stands in ggml/include/ggml.h.
    """
    spec = find_spec("xllamacpp")
    folders = spec.submodule_search_locations if spec else None
    libraries = [file for folder in folders or () for file in sorted(Path(folder).glob("xllamacpp*.so"))]
    try:
        chunk = ctypes.CDLL(str(libraries[0])).ggml_quantize_chunk
    except (IndexError, OSError, AttributeError):
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    chunk.restype = ctypes.c_size_t

    def quantise(rows: Rows, kind: GGMLQuantizationType, importance: Rows | None) -> Bytes:
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        count, length = rows.shape
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if length % block:
            raise ValueError(f"{kind.name}: rows of {length} weights are not made of blocks of {block}")
        out = np.empty((count, length // block * block_bytes), dtype=np.uint8)
        weights = None
        if importance is not None:
            importance = np.ascontiguousarray(importance, dtype=np.float32)
            if importance.shape != (length,):
                raise ValueError(f"importance of shape {importance.shape}, rows have {length} columns")
            weights = importance.ctypes.data
        written = chunk(int(kind), rows.ctypes.data, out.ctypes.data, 0, count, length, weights)
        if written != out.nbytes:
            raise RuntimeError(f"{kind.name}: ggml wrote {written} bytes, expected {out.nbytes}")
        return out

    return quantise
