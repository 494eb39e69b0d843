"""The second pass: find duplicates, hold out, and put every row where it belongs, in the input's order."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import orjson

from so8t_helpers.dataset.card import OUTPUTS, Tally
from so8t_helpers.dataset.chunks import INDEX, ChunkResult, part
from so8t_helpers.dataset.duplicates import ALIKE_BANDS, KEPT, NearFiles, banding, links, near_duplicates
from so8t_helpers.dataset.quarantine import Quarantined
from so8t_helpers.dataset.reading import Chunk
from so8t_helpers.dataset.sample import FORMATS
from so8t_helpers.dataset.splitting import Links, clusters, held_out, two_labels
from so8t_helpers.run.files import HashCache, atomic_path, remove
from so8t_helpers.run.sync import BackgroundSync
from so8t_helpers.settings import Settings

BLOCK_BYTES = 2**20  # larger ones would be fresh pages each time, at five times the cost
SYNC_BYTES = 2**26  # the disk works while the rest is written, not all at the end


class Rows:
    """The kept rows of all chunks: their index, mapped, and where each one's text lies."""

    def __init__(self, chunks: list[Chunk], results: list[ChunkResult], work: Path):
        self.chunks, self.work = chunks, work
        self.starts = np.cumsum([0, *(result.kept for result in results)])
        with (work / "index").open("wb") as out:
            for i in range(len(chunks)):
                with part(work, "index", i).open("rb") as file:
                    shutil.copyfileobj(file, out, 2**20)
        self.index = np.memmap(work / "index", INDEX, "r") if self.starts[-1] else np.zeros(0, INDEX)

    def chunk_of(self, row: int) -> Chunk:
        """Return the chunk that a row came from."""
        return self.chunks[int(np.searchsorted(self.starts, row, side="right")) - 1]

    def where(self, row: int) -> str:
        """Return a row's file and line."""
        return f"{self.chunk_of(row).file.name}:{int(self.index['line'][row])}"

    def text(self, row: int) -> str:
        """Return a row's normalised question and context, read from its chunk's file."""
        with part(self.work, "texts", self.chunk_of(row).index).open("rb") as file:
            file.seek(int(self.index["text"][row]))
            return file.readline()[:-1].decode("utf-8", "surrogatepass")


class _Output:
    """One of the stage's files, hashed and brought to the disk by other threads while it is written."""

    def __init__(self, file: IO[bytes], hashing: ThreadPoolExecutor, syncing: ThreadPoolExecutor):
        self._file, self._pool, self._sync = file, hashing, BackgroundSync(syncing, SYNC_BYTES)
        self.hash = hashlib.sha256()
        self._hashing: Future[None] | None = None

    def write(self, content: bytes) -> None:
        """Append some bytes; at most one block waits to be hashed."""
        if self._hashing is not None:
            self._hashing.result()
        self._hashing = self._pool.submit(self.hash.update, content)
        self._file.write(content)
        self._sync.wrote(len(content))
        if self._sync.due():
            self._sync.start(partial(os.fsync, self._file.fileno()))

    def finish(self) -> None:
        """Wait until the other threads are done with the file."""
        self._sync.settle()
        if self._hashing is not None:
            self._hashing.result()


def assemble(
    settings: Settings,
    directory: Path,
    chunks: list[Chunk],
    results: list[ChunkResult],
    work: Path,
    hashes: HashCache,
) -> Tally:
    """Write train.jsonl, eval.jsonl and quarantine.jsonl from the chunks' files; return the counts.

    A chunk's rows are removed as soon as they are where they belong; `hashes` gets the new files' digests.
    """
    rows = Rows(chunks, results, work)
    tally = Tally(settings.training.sequence_length)
    earlier, exact, found = _duplicates(settings, rows)
    kept, share = earlier < 0, settings.dataset.eval_share
    together = clusters(rows.index, kept, found, share)
    held = held_out(rows.index, kept, together, share)
    tally.split = together.described(rows.index, held, found)
    tally.two_labels = two_labels(rows.index, kept, rows.where)
    thought = rows.index["thought"][kept & (rows.index["format"] != FORMATS.index("plain"))]
    tally.thinkings = np.sort(np.unique(thought, return_counts=True)[1])[::-1]
    with _outputs(directory, hashes) as (*splits, quarantine), ThreadPoolExecutor(1) as reading:
        for chunk, result in zip(chunks, results, strict=True):
            first = int(rows.starts[chunk.index])
            here = slice(first, first + result.kept)
            index, repeats, in_eval = rows.index[here], earlier[here] >= 0, held[here]
            masks = {"train": ~(repeats | in_eval), "eval": in_eval}
            path = part(work, "rows", chunk.index)
            duplicates: list[tuple[int, bytes]] = []  # (line, its entry in quarantine.jsonl)
            for start, edges, block in _ahead(_blocks(path, index["offset"]), reading):
                own = slice(start, start + len(edges) - 1)
                for mask, out in zip(masks.values(), splits, strict=True):
                    out.write(_taken(block, edges, mask[own]))
                for i in np.flatnonzero(repeats[own]).tolist():
                    row = first + start + i
                    original = int(earlier[row])
                    reason = "duplicate" if exact[row] else "near_duplicate"
                    digest = orjson.loads(block[edges[i] : edges[i + 1]])["source"]["sha256"]
                    line = int(rows.index["line"][row])
                    entry = Quarantined(reason, f"of {rows.where(original)}", digest).entry(
                        chunk.file.name, line
                    )
                    duplicates.append((line, entry))
                    tally.reasons[reason] += 1
            remove(path)
            quarantine.write(_quarantined(part(work, "quarantine", chunk.index), duplicates))
            tally.add_chunk(result)
            for split, mask in masks.items():
                tally.add_rows(split, index[mask], result)
    return tally


@contextmanager
def _outputs(directory: Path, hashes: HashCache) -> Iterator[list[_Output]]:
    """Open the stage's files; on success they are in place, and `hashes` knows them."""
    with ThreadPoolExecutor(1) as hashing, ThreadPoolExecutor(1) as syncing:
        outputs = []
        with ExitStack() as stack:
            for name in OUTPUTS:
                scratch = stack.enter_context(atomic_path(directory / f"{name}.jsonl"))
                outputs.append(_Output(stack.enter_context(scratch.open("wb")), hashing, syncing))
                stack.callback(outputs[-1].finish)
            yield outputs
        for name, output in zip(OUTPUTS, outputs, strict=True):
            hashes.put(directory / f"{name}.jsonl", output.hash.hexdigest())


_Block = tuple[int, list[int], bytes]


def _blocks(path: Path, offsets: np.ndarray) -> Iterator[_Block]:
    """Yield a chunk's rows some megabytes at a time: (first row, edges, bytes).

    Row `first row + i` is `bytes[edges[i] : edges[i + 1]]`. One chunk may be a whole compressed file.
    """
    edges = np.append(offsets.astype(np.int64), path.stat().st_size)
    start = 0
    with path.open("rb") as file:
        while start < len(offsets):
            stop = int(np.searchsorted(edges, edges[start] + BLOCK_BYTES, side="right")) - 1
            stop = max(start + 1, stop)
            own = (edges[start : stop + 1] - edges[start]).tolist()
            yield start, own, file.read(own[-1])
            start = stop


def _ahead(blocks: Iterator[_Block], pool: ThreadPoolExecutor) -> Iterator[_Block]:
    """Yield the blocks while another thread reads the next one."""
    coming = pool.submit(next, blocks, None)
    while (block := coming.result()) is not None:
        coming = pool.submit(next, blocks, None)
        yield block


def _taken(block: bytes, edges: list[int], chosen: np.ndarray) -> bytes:
    """Return the chosen rows of a block."""
    view = memoryview(block)
    borders = np.flatnonzero(np.diff(chosen, prepend=False, append=False)).tolist()
    return b"".join(view[edges[a] : edges[b]] for a, b in zip(borders[::2], borders[1::2], strict=True))


def _duplicates(settings: Settings, rows: Rows) -> tuple[np.ndarray, np.ndarray, Links]:
    """Return for each row the earlier one it repeats (-1: none), whether exactly, and what is alike."""
    count = len(rows.index)
    if not (count and settings.dataset.deduplicate):
        return np.full(count, -1, dtype=np.int64), np.zeros(count, dtype=bool), Links()
    threshold = settings.dataset.near_duplicate_threshold
    near_bands, all_bands = (bands := banding(threshold)[0]), bands + ALIKE_BANDS[0]
    parts = (
        (
            np.fromfile(part(rows.work, "keys", i), np.uint32).reshape(-1, all_bands),
            np.fromfile(part(rows.work, "low", i), np.uint8).reshape(-1, KEPT),
        )
        for i in range(len(rows.chunks))
    )
    files = NearFiles(rows.work, np.asarray(rows.index["parted"]), all_bands, parts)
    same = rows.index["question"] ^ rows.index["kind"].astype(np.uint64) * np.uint64(2**32 + 1)
    _, first, inverse = np.unique(same, return_index=True, return_inverse=True)
    first = first[inverse]  # of each row the first one with the same question, itself or an earlier one
    exact = first != np.arange(count)
    compared = ~exact if threshold > 0 else np.zeros_like(exact)  # 0: equal ones alone are duplicates
    near, left_out = near_duplicates(files, range(near_bands), compared, threshold, rows.text)
    earlier = np.where(exact, first, near)
    pairs, alike, skipped = links(files, range(near_bands, all_bands), earlier < 0)
    return earlier, exact, Links(pairs, alike, {"near-duplicates": left_out, "alike": skipped})


def _quarantined(path: Path, duplicates: list[tuple[int, bytes]]) -> bytes:
    """Return a chunk's quarantined lines and its duplicates in the order of their lines."""
    content = path.read_bytes()
    if not duplicates:
        return content
    lines = [(orjson.loads(raw)["line"], raw) for raw in content.splitlines(keepends=True)]
    return b"".join(raw for _, raw in sorted(lines + duplicates, key=lambda item: item[0]))
