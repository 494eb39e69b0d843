"""ggml's own quantisers, the fastest build of them that is at hand.

xllamacpp's extension carries all of ggml and, where the system's linker exports it (Linux, macOS), its
`ggml_quantize_chunk`; its compiler made twice as fast code of Q6_K as libgguf's, and a fifth faster of Q4_K.
libgguf, the same sources in a package of their own, serves where it is not exported (Windows). Their bytes
are equal, with and without importance (tested). Both release the interpreter's lock.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import libgguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

# Rows are split over our own threads, as many as the profile says; libgguf would start its own in each.
os.environ.setdefault("LIBGGUF_NUM_THREADS", "1")

Rows = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Quantise = Callable[[Rows, GGMLQuantizationType, Rows | None], Bytes]


@cache
def best_quantiser() -> Quantise:
    """Return the fastest function from (rows, type, importance) to bytes: see `exported` and `packaged`."""
    return exported() or packaged


def packaged(rows: Rows, kind: GGMLQuantizationType, importance: Rows | None) -> Bytes:
    """Quantise (n, row length) with libgguf. -> (n, bytes a row)."""
    return np.asarray(libgguf.quantize_rows(rows, kind, importance)).view(np.uint8)


def exported() -> Quantise | None:
    """Return a function like `packaged` on xllamacpp's ggml, None where its symbols are not to be had.

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
