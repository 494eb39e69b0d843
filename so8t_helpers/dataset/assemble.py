"""The second pass: find duplicates, hold out, and put every row where it belongs, in the input's order."""

from __future__ import annotations

import shutil
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import numpy as np
import orjson

from so8t_helpers import run_folder
from so8t_helpers.dataset import chunk_pass
from so8t_helpers.dataset.card import Tally
from so8t_helpers.dataset.chunk_pass import INDEX, ChunkResult, part
from so8t_helpers.dataset.dedup import KEPT, normalise_question
from so8t_helpers.dataset.near import NearFiles, exact_duplicates, near_duplicates
from so8t_helpers.dataset.reading import Chunk
from so8t_helpers.dataset.sample import FORMATS, Quarantined
from so8t_helpers.dataset.splitting import held_out
from so8t_helpers.settings import Settings


class Rows:
    """The kept rows of all chunks: their index, mapped, and where each one's text lies."""

    def __init__(self, chunks: list[Chunk], results: list[ChunkResult], work: Path):
        self.chunks, self.work = chunks, work
        self.starts = np.cumsum([0, *(result.kept for result in results)])
        self.index = _joined(work, "index", len(chunks))

    def chunk_of(self, row: int) -> Chunk:
        """Return the chunk that a row came from."""
        return self.chunks[int(np.searchsorted(self.starts, row, side="right")) - 1]

    def where(self, row: int) -> str:
        """Return a row's file and line."""
        return f"{self.chunk_of(row).file.name}:{int(self.index['line'][row])}"

    def question(self, row: int) -> str:
        """Return a row's normalised question, read from its chunk's file."""
        with part(self.work, "rows", self.chunk_of(row).index).open("rb") as file:
            file.seek(int(self.index["offset"][row]))
            return normalise_question(orjson.loads(file.readline())["question"])


def assemble(
    settings: Settings, directory: Path, chunks: list[Chunk], results: list[ChunkResult], work: Path
) -> Tally:
    """Write train.jsonl, eval.jsonl and quarantine.jsonl from the chunks' files; return the counts."""
    rows = Rows(chunks, results, work)
    tally = Tally(settings.training.sequence_length)
    earlier, exact = _duplicates(settings, rows, results, tally)
    held = held_out(rows.index, earlier < 0, FORMATS.index("plain"), settings.dataset.eval_share)
    with ExitStack() as stack:
        out: dict[str, IO[bytes]] = {}
        for name in ("train", "eval", "quarantine"):
            scratch = stack.enter_context(run_folder.atomic_path(directory / f"{name}.jsonl"))
            out[name] = stack.enter_context(scratch.open("wb"))
        for chunk, result in zip(chunks, results, strict=True):
            here = slice(rows.starts[chunk.index], rows.starts[chunk.index + 1])
            index, kept, in_eval = rows.index[here], earlier[here] < 0, held[here]
            duplicates: list[tuple[int, bytes]] = []
            # 0 train, 1 eval, 2 duplicate
            targets = np.where(kept, in_eval.astype(np.uint8), 2).tolist()
            with part(work, "rows", chunk.index).open("rb") as file:
                for i, (row, target) in enumerate(zip(file, targets, strict=True), start=int(here.start)):
                    if target == 2:
                        reason = "duplicate" if exact[i] else "near_duplicate"
                        digest = orjson.loads(row)["source"]["sha256"]
                        item = Quarantined(reason, f"of {rows.where(int(earlier[i]))}", digest)
                        line = int(rows.index["line"][i])
                        duplicates.append((line, chunk_pass.quarantine_line(chunk.file.name, line, item)))
                        tally.reasons[reason] += 1
                    else:
                        out["eval" if target else "train"].write(row)
            _merge_quarantine(out["quarantine"], part(work, "quarantine", chunk.index), duplicates)
            tally.add_chunk(result)
            tally.add_rows("train", index[kept & ~in_eval], result)
            tally.add_rows("eval", index[kept & in_eval], result)
    return tally


def _duplicates(
    settings: Settings, rows: Rows, results: list[ChunkResult], tally: Tally
) -> tuple[np.ndarray, np.ndarray]:
    """Return for each row the earlier one it repeats (-1: none), and whether exactly."""
    count = len(rows.index)
    if not settings.dataset.deduplicate:
        return np.full(count, -1, dtype=np.int64), np.zeros(count, dtype=bool)
    threshold = settings.dataset.near_duplicate_threshold
    files = NearFiles(rows.work, count, threshold)
    for result in results:
        keys = np.fromfile(part(rows.work, "keys", result.index), np.uint32).reshape(-1, files.bands)
        low = np.fromfile(part(rows.work, "low", result.index), np.uint8).reshape(-1, KEPT)
        files.add(keys, low)
    files.close()
    first = exact_duplicates(rows.index["question"])
    exact = first != np.arange(count)
    near, skipped = near_duplicates(files, ~exact, threshold, rows.question)
    if skipped:
        tally.other.setdefault("near-duplicates", Counter())["comparisons left out"] += skipped
    return np.where(exact, first, near), exact


def _merge_quarantine(out: IO[bytes], path: Path, duplicates: list[tuple[int, bytes]]) -> None:
    """Write a chunk's quarantined lines and its duplicates in the order of their lines."""
    lines = [(orjson.loads(raw)["line"], raw) for raw in path.read_bytes().splitlines(keepends=True)]
    out.writelines(raw for _, raw in sorted(lines + duplicates, key=lambda item: item[0]))


def _joined(work: Path, kind: str, count: int) -> np.ndarray:
    """Return the chunks' index files as one array, mapped from disk."""
    path = work / kind
    with path.open("wb") as out:
        for i in range(count):
            with part(work, kind, i).open("rb") as file:
                shutil.copyfileobj(file, out, 2**20)
    if path.stat().st_size == 0:
        return np.zeros(0, dtype=INDEX)
    return np.memmap(path, dtype=INDEX, mode="r")
