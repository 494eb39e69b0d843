"""What a profile may have fetched, asked or trained before lines are judged; each reads all lines itself."""

from __future__ import annotations

from itertools import chain, islice
from pathlib import Path
from typing import Any

from so8t_helpers.dataset import teacher
from so8t_helpers.dataset.inputs.files import inspect
from so8t_helpers.dataset.inputs.tables import as_lines
from so8t_helpers.dataset.policy import ngrams, robots
from so8t_helpers.dataset.policy.harm import normalised
from so8t_helpers.dataset.quarantine import RejectedError
from so8t_helpers.dataset.reading import Chunk, read_lines, split
from so8t_helpers.dataset.records import labelled_text, normalise, parse_json
from so8t_helpers.dataset.sample import Plan, Sampler
from so8t_helpers.settings import Settings, SettingsError


def fetch_robots(chunks: list[Chunk], folder: Path, agent: str) -> None:
    """Fetch the robots.txt of every host that the records name, each once."""
    seen: set[str | None] = {None}  # what is no web address
    for chunk in chunks:
        for _, raw in read_lines(chunk):
            try:
                url = normalise(parse_json(raw, chunk.file.line_encoding), chunk.file.given).url
            except RejectedError:
                continue
            if url and (name := robots.file_name(url)) not in seen:
                seen.add(name)
                robots.fetch(url, folder, agent)


def ask_teacher(settings: Settings, plan: Plan, chunks: list[Chunk]) -> None:
    """Have the teacher think for the records that need it and are not in its cache, and keep each answer.

    Only what it writes at this moment, `dataset.teacher_parallel` records, is lost to a kill.
    """
    sampler = Sampler(plan)
    thoughts = sampler.thoughts
    assert thoughts is not None, "a plan with a teacher has a cache"
    missing = (
        record
        for chunk in chunks
        for _, raw in read_lines(chunk)
        if (record := sampler.needs_teacher(raw, chunk.file.line_encoding, chunk.file.given))
        and thoughts.get(record) is None
    )
    first = next(missing, None)
    if first is None:  # the engine need not be opened
        return
    records = chain([first], missing)
    with teacher.open_teacher(settings) as engine:
        while batch := list(islice(records, settings.dataset.teacher_parallel)):
            asked = [[{"role": "user", "content": thoughts.request(record)}] for record in batch]
            prompts = [engine.dialect.prompt(messages) for messages in asked]
            answers = engine.complete_many(prompts, max_tokens=settings.dataset.teacher_max_tokens)
            thoughts.put(zip(batch, (answer.text for answer in answers), strict=True))


def train_classifier(settings: Settings, paths: list[Path], output: Path, work: Path) -> dict[str, Any]:
    """Train the n-gram classifier from the user's labelled records; return its figures.

    `work` is a folder for what lies there only meanwhile.

    Raises:
        SettingsError: a line without text or without a label of its own, or too few records.
    """
    texts, unsafe = [], []
    for chunk in split(as_lines(inspect(paths), work / "nsfw_training")):
        for line, raw in read_lines(chunk):
            try:
                text, flag = labelled_text(raw, chunk.file.line_encoding)
            except RejectedError as error:
                raise SettingsError(f"{chunk.file.path}:{line}: {error.detail}") from error
            texts.append(normalised(text))
            unsafe.append(flag)
    return ngrams.train(texts, unsafe, output, settings.run.seed, settings.dataset.nsfw_threshold)
