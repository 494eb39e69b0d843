"""The first pass: chunks of input lines become files of rows, quarantined lines and an index.

What is written depends on the chunk alone, so the number of processes never shows in the output.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import pickle
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from so8t_helpers.dataset.duplicates import compared
from so8t_helpers.dataset.likeness import APART
from so8t_helpers.dataset.quarantine import Quarantined
from so8t_helpers.dataset.reading import Chunk, read_lines
from so8t_helpers.dataset.sample import Plan, Sample, Sampler
from so8t_helpers.settings import SettingsError

# What the later passes know of a kept row.
INDEX = np.dtype(
    {
        "names": [
            *("line", "offset", "text", "question", "group", "kind", "parted"),
            *("label", "format", "language", "licence", "domain", "tokens", "thought"),
        ],
        "formats": [
            *("<u8", "<u8", "<u8", "<u8", "<u8", "<u4", "?"),
            *("u1", "u1", "u1", "<u2", "<u2", "<u4", "<u8"),
        ],
    }
)
BATCH, BATCH_BYTES = 256, 2 * 2**20  # lines judged at once, and where long lines end a batch
WRITE_BUFFER = 2**20  # Python's own 8 KiB would be a system call for every other row


@dataclass
class ChunkResult:
    """What one chunk came to."""

    lines: int
    kept: int = 0
    # (group, name) -> number, e.g. ("reason", "bad_json") -> 3
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    flags: Counter[tuple[str, str]] = field(default_factory=Counter)  # see `Sampler.flags`
    # What the index's numbers stand for, in this chunk.
    domains: dict[str, int] = field(default_factory=dict)
    licences: dict[str, int] = field(default_factory=dict)


def part(work: Path, kind: str, index: int) -> Path:
    """Return the path of one of a chunk's files."""
    return work / f"{kind}-{index:06d}"


def process_chunk(sampler: Sampler, chunk: Chunk, work: Path) -> ChunkResult:
    """Judge every line of a chunk and write its rows, quarantine, index and MinHash."""
    result = ChunkResult(chunk.lines)
    sampler.flags = result.flags
    offset = text_offset = 0
    with (
        part(work, "rows", chunk.index).open("wb", WRITE_BUFFER) as rows,
        part(work, "quarantine", chunk.index).open("wb") as bad,
        part(work, "index", chunk.index).open("wb") as index,
        part(work, "texts", chunk.index).open("wb", WRITE_BUFFER) as texts,
        part(work, "keys", chunk.index).open("wb") as keys,
        part(work, "low", chunk.index).open("wb") as low,
    ):
        for lines in _batches(chunk):
            entries: list[tuple[int, ...]] = []  # the fields of INDEX
            questions: list[str] = []
            file = chunk.file
            outcomes = sampler.batch(lines, file.line_encoding, file.name, file.given)
            for (line, _), outcome in zip(lines, outcomes, strict=True):
                if isinstance(outcome, Quarantined):
                    bad.write(outcome.entry(chunk.file.name, line))
                    result.counts["reason", outcome.reason] += 1
                    continue
                licence = _number(result.licences, outcome.licence)
                domain = _number(result.domains, outcome.domain)
                entries.append(
                    (
                        line,
                        offset,
                        text_offset,
                        outcome.draw,
                        outcome.group,
                        outcome.kind,
                        APART in outcome.question,
                        outcome.label,
                        outcome.format,
                        outcome.language,
                        licence,
                        domain,
                        outcome.tokens,
                        outcome.thought,
                    )
                )
                questions.append(outcome.question)
                offset += rows.write(outcome.row)
                if sampler.settings.deduplicate:
                    text_offset += texts.write(f"{outcome.question}\n".encode("utf-8", "surrogatepass"))
                _count(result.counts, outcome)
            known = np.array(entries, dtype=INDEX)
            index.write(known.tobytes())
            if sampler.settings.deduplicate and questions:
                threshold = sampler.settings.near_duplicate_threshold
                bands = compared(questions, known["kind"], threshold)
                for to, content in zip((keys, low), bands, strict=True):
                    to.write(content.tobytes())
            result.kept += len(entries)
    return result


def first_pass(plan: Plan, chunks: list[Chunk], work: Path, workers: int) -> Iterator[ChunkResult]:
    """Carry out the pass in this process, in several, or on Ray; results come in the chunks' order."""
    if plan.settings.engine == "ray":
        yield from _on_ray(plan, chunks, work, workers)
    elif workers == 1 or len(chunks) == 1:
        sampler = Sampler(plan)
        for chunk in chunks:
            yield process_chunk(sampler, chunk, work)
    else:
        # Spawned, not forked: a notebook's process has threads, and Windows knows nothing else.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(plan,)) as pool:
            yield from pool.map(_work, chunks, [work] * len(chunks))


_samplers: list[Sampler] = []


def _start_worker(plan: Plan) -> None:
    _samplers.append(Sampler(plan))
    # What is loaded now stays: the collector need not look at it again. Records make no cycles: looking for
    # them once a chunk is enough.
    gc.freeze()
    gc.disable()


def _work(chunk: Chunk, work: Path) -> ChunkResult:
    result = process_chunk(_samplers[0], chunk, work)
    gc.collect()
    return result


def _batches(chunk: Chunk) -> Iterator[list[tuple[int, bytes | None]]]:
    """Yield a chunk's lines, some at a time."""
    lines: list[tuple[int, bytes | None]] = []
    held = 0
    for line, raw in read_lines(chunk):
        lines.append((line, raw))
        held += len(raw or b"")
        if len(lines) == BATCH or held > BATCH_BYTES:
            yield lines
            lines, held = [], 0
    if lines:
        yield lines


def _number(names: dict[str, int], name: str) -> int:
    """Return a name's number, a new one while there is room: the field holds 16 bits."""
    return names.setdefault(name, len(names)) if len(names) < 65535 else names.get(name, 0)


def _count(counts: Counter[tuple[str, str]], sample: Sample) -> None:
    counts.update(("personal data masked", kind) for kind in sample.masked)
    if sample.harm:
        counts["unsafe, refused", sample.harm] += 1
    if sample.cut:
        counts["thinking", "cut at a sentence"] += 1
    if sample.thinking:
        counts["thinking", sample.thinking] += 1
    if sample.fault:
        counts["a teacher's thinking, not used for", sample.fault] += 1
    if sample.refuses is not None:
        counts["answers to DENY and REFUSE", "refuse" if sample.refuses else "comply"] += 1


class _Worker:
    """One of Ray's actors: what is loaded once serves many chunks."""

    def __init__(self, plan: Plan, work: Path):
        self.sampler, self.work = Sampler(plan), work

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        result = process_chunk(self.sampler, pickle.loads(row["chunk"]), self.work)
        return {"result": pickle.dumps(result)}


def _on_ray(plan: Plan, chunks: list[Chunk], work: Path, workers: int) -> Iterator[ChunkResult]:
    """Carry out the pass on the cluster that RAY_ADDRESS names, else on one started on this machine.

    Raises:
        SettingsError: where Ray is not installed.
    """
    try:
        import ray  # noqa: PLC0415  (an optional extra)
        import ray.data  # noqa: PLC0415
    except ImportError as error:
        message = "dataset.engine: ray is not installed; pip install 'so8t-workbench[ray]'"
        raise SettingsError(message) from error
    started = not ray.is_initialized()
    if started:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    try:
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        rows = ray.data.from_items(
            [{"chunk": pickle.dumps(chunk)} for chunk in chunks], override_num_blocks=len(chunks)
        ).map(
            cast(Any, _Worker),
            fn_constructor_args=(plan, work),
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(chunks))),
        )
        for row in rows.iter_rows():
            yield pickle.loads(row["result"])
    finally:
        if started:
            ray.shutdown()
