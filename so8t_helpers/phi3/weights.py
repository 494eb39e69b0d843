"""Safetensors checkpoints, read and written in pieces: one header, then bytes at known offsets.

`safe_open` maps whole files into memory, and what it has touched counts as ours; `save_file` wants all
tensors at once. Plain reads and writes at offsets need one small buffer, and several threads can share the
work, since the place of every tensor is known before the first one is made.
File format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from so8t_helpers.run.files import StageError, read_json, reading, write_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_HEADER_LIMIT = 100_000_000  # bytes; the reference reader refuses more


def rounds_to_infinity(dtype: torch.dtype) -> float:
    """Return the smallest magnitude that rounds to infinity: half a unit above the format's largest value."""
    info = torch.finfo(dtype)  # max = (2 - eps) 2^e; a tie goes to the even neighbour, which would be 2^(e+1)
    return info.max / (2 - info.eps) * (2 - info.eps / 2)


@dataclass(frozen=True)
class TensorPlace:
    """Where one tensor lies: `nbytes` bytes of `dtype` (safetensors' name) from `offset` of `path`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int

    @property
    def row_bytes(self) -> int:
        return self.nbytes // self.shape[0] if self.shape and self.shape[0] else self.nbytes

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return rows [start, stop) in the file's dtype, in memory of their own.

        Raises:
            StageError: not 16- or 32-bit floats, or the file ends before these rows do.
        """
        if self.dtype not in FLOATS:
            raise StageError(f"{self.path}: tensor {self.name} is {self.dtype}, expected {', '.join(FLOATS)}")
        stop = self.shape[0] if stop is None else stop
        buffer = bytearray((stop - start) * self.row_bytes)
        self.read_into(buffer, start)
        return torch.frombuffer(buffer, dtype=FLOATS[self.dtype]).view(stop - start, *self.shape[1:])

    def read_into(self, buffer: bytearray | memoryview, start: int) -> None:
        """Fill a buffer of bytes with the rows from `start` on; a StageError if the file ends before."""
        with self.path.open("rb") as file:
            file.seek(self.offset + start * self.row_bytes)
            if file.readinto(buffer) != len(buffer):
                raise StageError(f"{self.path}: ends inside tensor {self.name}; fetch the file again")


def read_checkpoint(folder: Path) -> dict[str, TensorPlace]:
    """Return the places of all tensors of a model folder, in the order they lie on disk.

    Raises:
        StageError: no such file, a shard or tensor missing, or a header that does not fit its file.
    """
    index_path = folder / INDEX_FILE
    if (folder / SINGLE_FILE).is_file():
        return read_header(folder / SINGLE_FILE)
    if not index_path.is_file():
        raise StageError(
            f"{folder}: expected {SINGLE_FILE} or {INDEX_FILE}; other weight formats are not read"
        )
    shards: dict[str, str] = read_json(index_path)["weight_map"]
    # A folder is its own: a name with a way in it would read a file of somewhere else.
    if outside := next((s for s in shards.values() if s in {"", ".", ".."} or re.search(r"[/\\:]", s)), None):
        raise StageError(
            f"{index_path}: names shard {outside!r}, expected a file of its folder; fetch it again"
        )
    places: dict[str, TensorPlace] = {}
    for shard in sorted(set(shards.values())):
        if not (folder / shard).is_file():
            raise StageError(f"{index_path}: names shard {shard}, which is not there; fetch the model again")
        places |= {name: p for name, p in read_header(folder / shard).items() if shards.get(name) == shard}
    if missing := sorted(shards.keys() - places.keys()):
        raise StageError(f"{index_path}: {len(missing)} tensors are not in their shards, first {missing[0]}")
    return places


def weight_reader(folder: Path) -> Callable[[str], Tensor]:
    """Return a function that reads one tensor of a model folder by name; a StageError for one not there."""
    places = read_checkpoint(folder)

    def read(name: str) -> Tensor:
        if name not in places:
            raise StageError(f"{folder}: no tensor {name}; a Phi3 model has it, is this another one?")
        return places[name].read()

    return read


def read_header(path: Path) -> dict[str, TensorPlace]:
    """Return the places of a safetensors file's tensors by offset; a StageError if cut short or not one."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _HEADER_LIMIT):
            raise StageError(f"{path}: not a safetensors file, or cut short ({size} bytes)")
        text = file.read(length)
    places = []
    with reading(path, "the header of a safetensors file"):
        header = json.loads(text)
        header.pop("__metadata__", None)
        for name, item in header.items():
            (begin, end), dtype, shape = item["data_offsets"], item["dtype"], tuple(item["shape"])
            if 8 + length + end > size:
                raise StageError(f"{path}: ends inside tensor {name} ({size} bytes); fetch the file again")
            if begin < 0 or (dtype in FLOATS and end - begin != prod(shape) * FLOATS[dtype].itemsize):
                raise StageError(
                    f"{path}: tensor {name}, {dtype} {shape}, cannot be bytes {begin} to {end}; fetch the "
                    "file again"
                )
            places.append(TensorPlace(name, dtype, shape, path, 8 + length + begin, end - begin))
    return {place.name: place for place in sorted(places, key=lambda place: place.offset)}


def lay_out(sources: Sequence[TensorPlace], folder: Path, max_bytes: int) -> dict[str, TensorPlace]:
    """Create a model's empty weight files in `folder` and return where each tensor goes.

    Tensors keep their order, dtype and shape; a new shard begins when the next tensor would take the current
    one over `max_bytes`. Names and index are those that transformers' `save_pretrained` gives.
    """
    shards: list[list[TensorPlace]] = [[]]
    filled = 0
    for source in sources:
        if shards[-1] and filled + source.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(source)
        filled += source.nbytes
    count = len(shards)
    targets: dict[str, TensorPlace] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{count:05d}.safetensors" if count > 1 else SINGLE_FILE
        targets |= _create(folder / name, shard)
    if count > 1:
        weight_map = {name: target.path.name for name, target in targets.items()}
        total = {
            "total_parameters": sum(prod(s.shape) for s in sources),
            "total_size": sum(s.nbytes for s in sources),
        }
        write_json(folder / INDEX_FILE, {"metadata": total, "weight_map": dict(sorted(weight_map.items()))})
    return targets


def _create(path: Path, sources: list[TensorPlace]) -> dict[str, TensorPlace]:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    position = 0
    for source in sources:
        begin, position = position, position + source.nbytes
        offsets = [begin, position]
        header[source.name] = {"dtype": source.dtype, "shape": list(source.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    return {place.name: place for place in read_header(path).values()}
