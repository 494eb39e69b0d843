"""Streamed baking: W' = (W + s·B·A) @ R, in float32, a block of rows at a time, rounded to the base's dtype.

Every block of rows of every tensor is independent: read it, merge, rotate, round, write it at its offset. So
a few threads do blocks in any order, memory is a few megabytes a thread whatever the model's size, and
reading and writing overlap with arithmetic (torch and file calls release the interpreter's lock).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from so8t_helpers import rotation
from so8t_helpers.baking.adapter import LoraPair
from so8t_helpers.checkpoint import FLOATS, TensorPlace, lay_out
from so8t_helpers.run_folder import StageError

_BLOCK_BYTES = 2 * 2**20  # on disk; its float32 copy then still fits a core's cache


@dataclass(frozen=True)
class Change:
    """What baking does to one tensor: adds `lora`, then turns the columns by `blocks` (in/8, 8, 8)."""

    lora: LoraPair | None = None
    blocks: Tensor | None = None


def o_proj_name(layer: int) -> str:
    """Name of the weight behind the gate of a decoder layer."""
    return f"model.layers.{layer}.self_attn.o_proj.weight"


def plan_changes(
    base: Mapping[str, TensorPlace], pairs: Mapping[str, LoraPair], gates: rotation.Gates | None
) -> dict[str, Change]:
    """Return the change of each tensor that is not passed through, by name.

    The rotations are exponentiated in float64 and rounded once to float32.

    Raises:
        StageError: if a gate's layer or width does not fit the base, or LoRA sits outside the decoder layers.
    """
    if outside := sorted(name for name in pairs if not name.startswith("model.layers.")):
        raise StageError(f"adapter: {outside[0]} is not in a decoder layer; only those linears are baked")
    blocks: dict[str, Tensor] = {}
    for free, layer in zip(gates.free, gates.layers, strict=True) if gates else ():
        name = o_proj_name(layer)
        if name not in base:
            raise StageError(
                f"gates: layer {layer} has no {name} in the base; they belong to another base model"
            )
        width = base[name].shape[1]
        if width != len(free) * rotation.BLOCK:
            raise StageError(f"gates: width {len(free) * rotation.BLOCK}, but {name} takes {width} features")
        blocks[name] = rotation.rotation(free.double()).float()
    return {
        name: Change(pairs.get(name), blocks.get(name)) for name in base if name in pairs or name in blocks
    }


def bake_rows(
    rows: Tensor, lora: tuple[Tensor, Tensor, float] | None = None, blocks: Tensor | None = None
) -> Tensor:
    """Return (W + s·B·A) @ R for some rows of W.

    Args:
        rows: (n, in) float32 rows of W; used as scratch.
        lora: (B's same rows (n, r), A (r, in), s), or None.
        blocks: (in/8, 8, 8) float32 rotations, or None.
    """
    if lora is not None:
        rows.addmm_(lora[0], lora[1], alpha=lora[2])
    return rows if blocks is None else rotation.bake_rotation(rows, blocks)


def bake_checkpoint(
    base: Mapping[str, TensorPlace],
    changes: Mapping[str, Change],
    folder: Path,
    max_shard_bytes: int,
    count_bytes: Callable[[int], None] = lambda _: None,
    threads: int | None = None,
) -> dict[str, TensorPlace]:
    """Write the baked weight files into `folder` and return the places of their tensors.

    Args:
        base: the base's tensors in disk order.
        changes: by tensor name; all other tensors pass through byte for byte.
        folder: exists and holds no weights.
        max_shard_bytes: a larger model is cut into shards.
        count_bytes: called in this thread with the bytes each finished block had.
        threads: default one a core and one more, which covers the waits for the disk.

    Raises:
        StageError: a value that is no number, or too large for the base's dtype, with the tensor's name.
    """
    targets = lay_out(list(base.values()), folder, max_shard_bytes)
    load = lru_cache(maxsize=2)(lambda lora: lora.load())  # blocks come tensor by tensor
    jobs = (
        (source, targets[name], start, stop)
        for name, source in base.items()
        for start, stop in _row_blocks(source)
    )

    def work(source: TensorPlace, target: TensorPlace, start: int, stop: int) -> int:
        change = changes.get(source.name)
        if change is None:
            return _copy(source, target, start, stop)
        return _bake_block(source, target, start, stop, change, load)

    threads = threads or (os.cpu_count() or 1) + 1
    with (
        _one_thread_per_operation(),
        ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        running: set[Future[int]] = set()
        try:
            while True:
                running |= {pool.submit(work, *job) for job in islice(jobs, 2 * threads - len(running))}
                if not running:
                    break
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    count_bytes(future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for path in sorted({target.path for target in targets.values()}):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    return targets


def _row_blocks(place: TensorPlace) -> Iterator[tuple[int, int]]:
    rows = place.shape[0] if place.shape else 1
    step = max(1, _BLOCK_BYTES // max(1, place.row_bytes))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _copy(source: TensorPlace, target: TensorPlace, start: int, stop: int) -> int:
    first, size = start * source.row_bytes, (stop - start) * source.row_bytes
    with source.path.open("rb") as file:
        file.seek(source.offset + first)
        data = file.read(size)
    _write(target, first, data)
    return size


def _bake_block(
    source: TensorPlace,
    target: TensorPlace,
    start: int,
    stop: int,
    change: Change,
    load: Callable[[LoraPair], tuple[Tensor, Tensor]],
) -> int:
    lora = None
    if change.lora is not None:
        a, b = load(change.lora)
        lora = (b[start:stop], a, change.lora.scale)
    rounded = bake_rows(source.read(start, stop).float(), lora, change.blocks).to(FLOATS[source.dtype])
    if not torch.isfinite(rounded).all():
        raise StageError(
            f"{source.name}: rows {start} to {stop - 1} hold a value that is no number or too large for "
            f"{source.dtype}; look at the adapter's training, or bake onto a bfloat16 base"
        )
    _write(target, start * source.row_bytes, rounded.view(torch.uint8).numpy().data.cast("B"))
    return (stop - start) * source.row_bytes


def _write(target: TensorPlace, first: int, data: bytes | memoryview) -> None:
    with target.path.open("rb+") as file:
        file.seek(target.offset + first)
        file.write(data)


@contextmanager
def _one_thread_per_operation() -> Iterator[None]:
    """Blocks are the parallel unit here: threads inside each product would only get in each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
