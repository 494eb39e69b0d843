"""One pass over the checkpoint that writes all GGUF files: each shard is read once, whatever their number.

Several threads quantise chunks of rows, this one puts them in their places in order, so memory holds a few
chunks whatever the model's size. A file grows as `.<name>.part`, its journal says how many tensors are safely
on disk, and an interrupted pass goes on from there. One more thread waits for the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from so8t_helpers.gguf.convert import Bytes, convert_rows, quantize_rows
from so8t_helpers.gguf.layout import GgufTensor, PlannedFile, source_stamps
from so8t_helpers.phi3.weights import TensorPlace
from so8t_helpers.run.files import remove, replace, write_json
from so8t_helpers.run.sync import BackgroundSync

CHUNK_WEIGHTS = 1 << 21  # 2 M weights: about 20 MiB with its copies, a tenth of a second of Q4_K
_SYNC_BYTES = 1 << 28  # what an interruption may cost each file

Importance = dict[str, NDArray[np.float32]]


@dataclass
class _Part:
    """A file being written: its tensors that are whole, and what brings it to the disk."""

    plan: PlannedFile
    key: str
    file: IO[bytes]
    done: int
    sync: BackgroundSync

    def put(self, offset: int, data: Bytes) -> None:
        self.file.seek(offset)
        self.file.write(data.data)
        self.sync.wrote(data.nbytes)

    def tensor_done(self, count: int) -> None:
        """Count a tensor; have all so far synced and journalled if it is time and the disk has kept up."""
        self.done = count
        if self.sync.due():
            self.file.flush()
            self.sync.start(partial(self._sync, count))

    def settle(self) -> None:
        """Sync and journal what is left, at the end of a pass or where it is interrupted."""
        self.sync.settle()
        self.file.flush()
        self._sync(self.done)

    def _sync(self, count: int) -> None:
        os.fsync(self.file.fileno())
        write_json(journal_path(self.plan.path), {"key": self.key, "done": count})


@dataclass(frozen=True)
class _Job:
    """Rows [start, stop) of a tensor, for the files that still lack it."""

    index: int
    tensor: GgufTensor
    start: int
    stop: int
    parts: list[_Part]


def journal_path(path: Path) -> Path:
    """Where the progress of a file stands, and after its end the proof of what it was made from."""
    return path.with_name(f".{path.name}.json")


def part_path(path: Path) -> Path:
    """Where a file grows until it is whole."""
    return path.with_name(f".{path.name}.part")


def file_key(plan: PlannedFile, tensors: Sequence[GgufTensor], importance: Importance) -> str:
    """Hash of all that decides a file's bytes; shards count by their stamps."""
    digest = hashlib.sha256(plan.header)
    digest.update(repr(source_stamps(tensors)).encode())
    if plan.file_type.is_k_quant:
        for name in sorted(importance):
            digest.update(name.encode() + importance[name].tobytes())
    return digest.hexdigest()


def unfinished(
    plans: Sequence[PlannedFile], tensors: Sequence[GgufTensor], importance: Importance
) -> list[tuple[PlannedFile, str, int]]:
    """Return the files that are not whole, each with its key and the number of tensors already written."""
    found = []
    for plan in plans:
        key, done = file_key(plan, tensors, importance), 0
        with suppress(OSError, ValueError):  # no journal, or one cut short
            journal = json.loads(journal_path(plan.path).read_text(encoding="utf-8"))
            done = journal["done"] if journal["key"] == key else 0
        whole = plan.path.is_file() and plan.path.stat().st_size == plan.size and done == len(tensors)
        if not whole:
            found.append((plan, key, done if part_path(plan.path).is_file() else 0))
    return found


def source_bytes(tensors: Sequence[GgufTensor]) -> int:
    return sum(t.source.nbytes for t in tensors if isinstance(t.source, TensorPlace))


def write_files(
    plans: Sequence[PlannedFile],
    tensors: Sequence[GgufTensor],
    threads: int,
    on_read: Callable[[int], None],
    importance: Importance,
) -> list[Path]:
    """Write the files that are not whole yet, in one pass over the checkpoint, and return them.

    Args:
        threads: how many chunks are quantised at once.
        on_read: called with the number of checkpoint bytes done just now.
        importance: by tensor, the mean square of each input column, for the k-quant files.

    Raises:
        StageError: a weight that is not finite or does not fit; finished tensors stay in the journal.
    """
    open_plans = unfinished(plans, tensors, importance)
    with (
        ExitStack() as stack,
        ThreadPoolExecutor(1, "sync") as syncer,
        ThreadPoolExecutor(threads, "gguf") as pool,
    ):
        parts = [_open_part(stack, syncer, plan, key, done) for plan, key, done in open_plans]
        waiting: deque[tuple[_Job, Future[list[Bytes]]]] = deque()
        try:
            for job in _jobs(tensors, parts):
                waiting.append((job, pool.submit(_convert, job, importance)))
                if len(waiting) > 2 * threads:
                    _finish(*waiting.popleft(), on_read)
            while waiting:
                _finish(*waiting.popleft(), on_read)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            for part in parts:
                part.settle()
    for part in parts:
        replace(part_path(part.plan.path), part.plan.path)
    return [part.plan.path for part in parts]


def _open_part(stack: ExitStack, syncer: ThreadPoolExecutor, plan: PlannedFile, key: str, done: int) -> _Part:
    path = part_path(plan.path)
    if not done:
        remove(journal_path(plan.path))
        with path.open("wb") as file:
            file.write(plan.header)
            file.truncate(plan.size)  # zeros, so the padding between tensors need not be written
    return _Part(plan, key, stack.enter_context(path.open("r+b")), done, BackgroundSync(syncer, _SYNC_BYTES))


def _jobs(tensors: Sequence[GgufTensor], parts: list[_Part]) -> Iterator[_Job]:
    begun = [part.done for part in parts]
    for index, tensor in enumerate(tensors):
        lacking = [part for part, done in zip(parts, begun, strict=True) if done <= index]
        if not lacking:
            continue
        step = max(1, CHUNK_WEIGHTS // tensor.shape[-1])
        for start in range(0, tensor.rows, step):
            yield _Job(index, tensor, start, min(start + step, tensor.rows), lacking)


def _convert(job: _Job, importance: Importance) -> list[Bytes]:
    """One result a file of the job."""
    name, source = job.tensor.name, job.tensor.source
    kinds = [
        (part.plan.types[name], importance.get(name) if part.plan.file_type.is_k_quant else None)
        for part in job.parts
    ]
    if not isinstance(source, TensorPlace):
        return [quantize_rows(source[None], kind) for kind, _ in kinds]
    return convert_rows(source, job.start, job.stop, kinds)


def _finish(job: _Job, future: Future[list[Bytes]], on_read: Callable[[int], None]) -> None:
    for part, data in zip(job.parts, future.result(), strict=True):
        row_bytes = data.nbytes // (job.stop - job.start)
        part.put(part.plan.offsets[job.tensor.name] + job.start * row_bytes, data)
        if job.stop == job.tensor.rows:
            part.tensor_done(job.index + 1)
    on_read(source_bytes([job.tensor]) * (job.stop - job.start) // job.tensor.rows)
