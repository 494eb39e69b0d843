"""From a checkpoint's rows to a file's bytes: checked, widened to float32, quantised by ggml's own code.

The quantisers are ggml's reference code (`kernels`); their bytes equal those of the converter (F16, BF16,
Q8_0) and of llama-quantize but for the last bit of a product (k-quants; both tested). Nearly all of the work
releases the interpreter's lock, so rows run on several threads.
"""

from __future__ import annotations

from collections.abc import Iterable

import libgguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from so8t_helpers.checkpoint import TensorPlace, rounds_to_infinity
from so8t_helpers.gguf_export.kernels import Bytes, Rows, best_quantiser
from so8t_helpers.run_folder import StageError

_Q = GGMLQuantizationType
_SAME_BYTES = {("F16", _Q.F16), ("BF16", _Q.BF16), ("F32", _Q.F32)}
_F16_LIMIT = rounds_to_infinity(torch.float16)


def convert_rows(
    place: TensorPlace,
    start: int,
    stop: int,
    kinds: Iterable[tuple[GGMLQuantizationType, Rows | None]],
) -> list[Bytes]:
    """Read rows [start, stop) of a tensor once and return them in every wanted type.

    Args:
        place: where the tensor lies.
        kinds: pairs of a ggml type and the importance of each column, (row length,) or None.

    Raises:
        StageError: a weight that is not finite, or beyond the range of float16 where F16 is wanted.
    """
    stored = _stored(place, start, stop)
    rows = widen(stored, place.dtype)
    kinds = list(kinds)
    _check(rows, place, start, any(kind == _Q.F16 for kind, _ in kinds))
    return [
        stored.view(np.uint8) if (place.dtype, kind) in _SAME_BYTES else quantize(rows, kind, importance)
        for kind, importance in kinds
    ]


def quantize(rows: Rows, kind: GGMLQuantizationType, importance: Rows | None = None) -> Bytes:
    """Return (rows, row length) float32 as the bytes of a ggml type, (rows, bytes a row)."""
    if kind == _Q.F32:
        return np.ascontiguousarray(rows).view(np.uint8)
    return best_quantiser()(rows, kind, importance)


def dequantize(data: Bytes, kind: GGMLQuantizationType) -> Rows:
    """Return the float32 rows that a file's bytes (rows, bytes a row) stand for."""
    if kind == _Q.F32:
        return data.view(np.float32)
    if kind == _Q.F16:
        return data.view(np.float16).astype(np.float32)
    if kind == _Q.BF16:
        return widen(data.view(np.uint16), "BF16")
    return np.asarray(libgguf.dequantize_rows(data, kind), dtype=np.float32)


def widen(stored: NDArray[np.generic], dtype: str) -> Rows:
    """Return stored numbers as float32; bfloat16 comes as its 16 bits, the upper half of a float32."""
    if dtype == "BF16":
        return (stored.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32, copy=False)


def _stored(place: TensorPlace, start: int, stop: int) -> NDArray[np.generic]:
    """Rows in the checkpoint's dtype, (rows, row length), bfloat16 as its bits; a vector is one row."""
    vector = len(place.shape) == 1
    tensor = place.read() if vector else place.read(start, stop)
    if place.dtype == "BF16":  # which numpy does not know
        tensor = tensor.view(torch.int16)
    numbers: NDArray[np.generic] = tensor.numpy()
    return numbers[None] if vector else numbers


def _check(rows: Rows, place: TensorPlace, start: int, narrow: bool) -> None:
    largest = max(abs(float(rows.max())), abs(float(rows.min())))  # NaN passes through both
    if np.isfinite(largest) and not (narrow and largest >= _F16_LIMIT):
        return
    bad = ~np.isfinite(rows) if not np.isfinite(largest) else np.abs(rows) >= _F16_LIMIT
    row, column = (int(i) for i in np.argwhere(bad)[0])
    value = rows[row, column]
    where = f"{place.path}: tensor {place.name}, row {start + row}, column {column}"
    if np.isfinite(value):
        raise StageError(f"{where}: {value:g} does not fit float16; set gguf.types to bf16 instead of f16")
    raise StageError(f"{where}: the weight is {value}; train or bake again, a GGUF of it would be useless")
