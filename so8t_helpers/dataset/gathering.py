"""What is fetched, asked or trained before lines are judged: robots.txt, a teacher's thinking, a classifier.

These are looks at all lines in one process, made only where the profile asks for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from so8t_helpers.dataset import reading, records, teacher
from so8t_helpers.dataset.policy import harm, ngrams
from so8t_helpers.dataset.policy.robots import file_name
from so8t_helpers.dataset.reading import Chunk
from so8t_helpers.dataset.records import Record, RejectedError
from so8t_helpers.dataset.sample import Plan, Sampler
from so8t_helpers.settings import Settings, SettingsError


def fetch_robots(chunks: list[Chunk], folder: Path, agent: str) -> None:
    """Fetch the robots.txt of every host that the records name, each once."""
    from so8t_helpers.dataset.policy import robots  # noqa: PLC0415  (an option)

    seen: set[str] = set()
    for record in _records(chunks):
        name = file_name(record.url) if record.url else None
        if record.url and name and name not in seen:
            seen.add(name)
            robots.fetch(record.url, folder, agent)


def ask_teacher(settings: Settings, plan: Plan, chunks: list[Chunk]) -> int:
    """Have the teacher think for the records that need it; return how many it was asked for."""
    sampler = Sampler(plan)
    thoughts = teacher.Thoughts(plan.thoughts) if plan.thoughts else None
    assert thoughts is not None, "a plan with a teacher has a cache"

    def needy() -> Iterator[Record]:
        for chunk in chunks:
            for _, raw in reading.read_lines(chunk):
                record = sampler.needs_teacher(raw, chunk.file.encoding)
                if record is not None:
                    yield record

    waiting = (record for record in needy() if thoughts.get(record) is None)
    first = next(waiting, None)
    if first is None:
        return 0
    with teacher.open_teacher(settings) as engine:
        asked = teacher.ask(engine, _chain(first, waiting), thoughts, settings.dataset.teacher_max_tokens)
    thoughts.close()
    return asked


def train_classifier(settings: Settings, path: Path) -> dict[str, Any]:
    """Train the n-gram classifier from the user's labelled records; return its figures.

    Raises:
        SettingsError: a line without text or without a label of its own, or too few records.
    """
    texts, unsafe = [], []
    files = reading.inspect(reading.find_files(settings.dataset.nsfw_training))
    for chunk in reading.split(files):
        for line, raw in reading.read_lines(chunk):
            try:
                text, flag = records.labelled_text(raw, chunk.file.encoding)
            except RejectedError as error:
                raise SettingsError(f"{chunk.file.path}:{line}: {error.detail}") from error
            texts.append(harm.normalised(text))
            unsafe.append(flag)
    return ngrams.train(texts, unsafe, path, settings.run.seed, settings.dataset.nsfw_threshold)


def _records(chunks: list[Chunk]) -> Iterator[Record]:
    for chunk in chunks:
        for _, raw in reading.read_lines(chunk):
            if raw is None:
                continue
            try:
                yield records.normalise(records.parse_json(records.to_utf8(raw, chunk.file.encoding)))
            except RejectedError:
                continue


def _chain(first: Record, rest: Iterator[Record]) -> Iterator[Record]:
    yield first
    yield from rest
