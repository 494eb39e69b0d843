"""Streamed baking: W' = (W + s·B·A) @ R, in float32, a block of rows at a time, rounded to the base's dtype.

Every piece of rows is independent: read it, merge, rotate, round, write it at its offset. So a few threads do
pieces in any order, memory is one piece a thread, and reading and writing overlap with arithmetic (torch and
file calls release the interpreter's lock).
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from so8t_helpers.bake.direct import PAGE, DirectWriter, aligned_buffer
from so8t_helpers.phi3.lora_folder import LoraUpdate, StoredLora
from so8t_helpers.phi3.shape import o_proj_name
from so8t_helpers.phi3.weights import FLOATS, TensorPlace, lay_out, rounds_to_infinity
from so8t_helpers.run.files import StageError
from so8t_helpers.run.sync import BackgroundSync
from so8t_helpers.so8 import rotation

_PIECE_BYTES = 16 * 2**20  # read and written at once
_SYNC_BYTES = 2**26  # the disk begins when so much is written, and works during the products
_CACHED = 384 * 1024  # weights merged at once: their float32 copy, 1.5 MiB, stays in the caches
_AT_WORK = min(os.cpu_count() or 1, 8)  # more cores than that would wait for the disk


@dataclass(frozen=True)
class Change:
    """What baking does to one tensor: adds `lora`, then rotates the columns by `blocks` (in/8, 8, 8)."""

    lora: StoredLora | None = None
    blocks: Tensor | None = None


def plan_changes(
    base: Mapping[str, TensorPlace], pairs: Mapping[str, StoredLora], gates: rotation.Gates | None
) -> dict[str, Change]:
    """Return the change of each tensor that is not passed through, by name.

    Raises:
        StageError: if a gate's layer or width does not fit the base, or LoRA sits outside the decoder layers.
    """
    if outside := sorted(name for name in pairs if not name.startswith("model.layers.")):
        raise StageError(f"adapter: {outside[0]} is not in a decoder layer; only those linears are baked")
    blocks: dict[str, Tensor] = {}
    for layer, rotations in (gates.rotations() if gates else {}).items():
        name, gated = o_proj_name(layer), len(rotations) * rotation.BLOCK
        if name not in base:
            raise StageError(
                f"gates: layer {layer} has no {name} in the base; they belong to another base model"
            )
        if base[name].shape[1] != gated:
            raise StageError(f"gates: width {gated}, but {name} takes {base[name].shape[1]} features")
        blocks[name] = rotations
    return {
        name: Change(pairs.get(name), blocks.get(name)) for name in base if name in pairs or name in blocks
    }


def bake_rows(rows: Tensor, lora: LoraUpdate | None = None, blocks: Tensor | None = None) -> Tensor:
    """Return (W + s·B·A) @ R for rows of W, (n, in) float32, scratch from then on; `blocks` (in/8, 8, 8)."""
    if lora is not None:
        rows.addmm_(lora.b, lora.a, alpha=lora.scale)
    return rows if blocks is None else rotation.bake_rotation(rows, blocks)


def bake_checkpoint(
    base: Mapping[str, TensorPlace],
    changes: Mapping[str, Change],
    folder: Path,
    max_shard_bytes: int,
    count_bytes: Callable[[int], None] = lambda _: None,
) -> dict[str, TensorPlace]:
    """Write the baked weight files into `folder` and return the places of their tensors.

    Args:
        base: the base's tensors in disk order.
        changes: by tensor name; all other tensors pass through byte for byte.
        folder: exists and holds no weights.
        count_bytes: called in this thread with the bytes of each finished piece.

    Raises:
        StageError: a value that is no number, or too large for the base's dtype, with the tensor's name.
    """
    targets = lay_out(list(base.values()), folder, max_shard_bytes)
    paths = sorted({target.path for target in targets.values()})
    pieces = (piece for source in base.values() for piece in _pieces(source))
    threads = _AT_WORK + 4  # so many wait for the disk meanwhile
    with (
        DirectWriter(paths) as writer,
        _one_thread_per_operation(),
        ThreadPoolExecutor(1) as syncer,  # waits for the disk while the others work
        ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        baker, sync = _Baker(changes, targets, writer), BackgroundSync(syncer, _SYNC_BYTES)
        running: set[Future[tuple[Path, int, int]]] = set()
        try:
            while True:
                running |= {pool.submit(baker.bake, *p) for p in islice(pieces, 2 * threads - len(running))}
                if not running:
                    break
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    path, size, cached = future.result()
                    count_bytes(size)
                    sync.wrote(cached)
                if sync.due():
                    sync.start(partial(_sync, path))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    sync.settle()
    for path in paths:
        _sync(path)
    return targets


def _pieces(place: TensorPlace) -> Iterator[tuple[TensorPlace, int, int]]:
    """Cut a tensor into rows [start, stop) of about `_PIECE_BYTES`."""
    rows = place.shape[0] if place.shape else 1
    step = max(1, _PIECE_BYTES // max(1, place.row_bytes))
    for start in range(0, rows, step):
        yield place, start, min(start + step, rows)


class _Baker:
    """Bakes pieces on any number of threads: reads rows, changes them and writes them in their place."""

    def __init__(
        self, changes: Mapping[str, Change], targets: Mapping[str, TensorPlace], writer: DirectWriter
    ):
        self._changes, self._targets, self._writer = changes, targets, writer
        self._scratch = _Scratch()
        self._load = lru_cache(maxsize=2)(StoredLora.load)  # pieces come tensor by tensor
        # More products at a time push each other out of the caches.
        self._computing = threading.Semaphore(_AT_WORK)

    def bake(self, source: TensorPlace, start: int, stop: int) -> tuple[Path, int, int]:
        """Bake rows [start, stop); return the file, its new bytes, and how many the system's cache holds."""
        target = self._targets[source.name]
        offset = target.offset + start * target.row_bytes
        data = self._scratch.take((stop - start) * source.row_bytes, offset % PAGE)
        source.read_into(data.numpy().data, start)
        if change := self._changes.get(source.name):
            rows = data.view(FLOATS[source.dtype]).view(stop - start, -1)
            lora = self._load(change.lora).rows(slice(start, stop)) if change.lora else None
            with self._computing:
                _bake_piece(rows, lora, change.blocks, f"{source.name}: among rows {start} to {stop - 1}")
        return target.path, len(data), self._writer.write(target.path, offset, data)


def _sync(path: Path) -> None:
    """Wait until what is written is on the disk, and give its pages back to the system; `direct` says why."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        if sys.platform == "linux":  # elsewhere the pages stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class _Scratch(threading.local):
    """A piece's bytes, one buffer a thread: fresh memory for every piece would cost more than reading it."""

    def __init__(self) -> None:
        self.buffer = aligned_buffer(_PIECE_BYTES + PAGE)

    def take(self, size: int, start: int) -> Tensor:
        """Return `size` bytes that begin `start` bytes after the beginning of a page."""
        if len(self.buffer) < start + size:  # a single row longer than a piece
            self.buffer = aligned_buffer(start + size)
        return self.buffer[start : start + size]


def _bake_piece(rows: Tensor, lora: LoraUpdate | None, blocks: Tensor | None, where: str) -> None:
    """Bake rows (n, in) of the file's dtype in place; `where` begins the error's message."""
    limit = rounds_to_infinity(rows.dtype)
    step = max(1, _CACHED // rows.shape[1])
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        baked = bake_rows(part.float(), lora and lora.rows(slice(start, start + step)), blocks)
        least, most = torch.aminmax(baked)
        if not (-limit < least.item() and most.item() < limit):  # NaN fails, too
            raise StageError(
                f"{where} is a value that is no number or too large for {rows.dtype}; look at the adapter's "
                "training, or bake onto a bfloat16 base"
            )
        part.copy_(baked)


@contextmanager
def _one_thread_per_operation() -> Iterator[None]:
    """Pieces are the parallel unit: threads inside each product would only get in each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
