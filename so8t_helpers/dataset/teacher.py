"""Thinking from a teacher model, for records that say nothing but their label.

It is cached by content (model and prompt) in one file for all runs: a stage that was stopped goes on where it
was, and one that is run again asks nothing.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from so8t_helpers.dataset.records import Record
from so8t_helpers.run.files import sha256_file
from so8t_helpers.settings import Settings, SettingsError, resolve
from so8t_helpers.thinking.format import contains_markers, decision_of

if TYPE_CHECKING:  # every worker process imports this module, and engines bring torch along
    from so8t_helpers.engines.base import Engine

INSTRUCTIONS = {
    "ja": "質問とその答えを読み、答えに至る考えを、短い日本語の文で順に書いてください。"
    "新しい事実を加えず、見出しや記号を使わず、考えだけを書いてください。",
    "en": "Read the question and its answer, and write down the thoughts that lead to the answer, in order "
    "and in short English sentences. Add no new facts, use no headings or symbols, and write nothing else.",
}
_TURNS = {"ja": ("質問", "答え"), "en": ("Question", "Answer")}
BATCH = 16


class Thoughts:
    """The teacher's cache: prompt hash -> text; "" for what could not be used."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(path)
        table = "thought (key TEXT PRIMARY KEY, text TEXT NOT NULL)"
        self._database.execute(f"CREATE TABLE IF NOT EXISTS {table}")

    def get(self, record: Record) -> str | None:
        """Return the thinking for a record; None where the teacher has not been asked."""
        row = self._database.execute("SELECT text FROM thought WHERE key = ?", (_key(record),)).fetchone()
        return None if row is None else str(row[0])

    def put(self, items: Iterable[tuple[Record, str]]) -> None:
        """Keep some texts; they survive whatever comes after."""
        rows = [(_key(record), text) for record, text in items]
        self._database.executemany("INSERT OR REPLACE INTO thought VALUES (?, ?)", rows)
        self._database.commit()


def teacher_path(settings: Settings) -> Path:
    """Return the GGUF file or the model folder of the profile's teacher.

    Raises:
        SettingsError: no such teacher.
    """
    path = resolve(settings.dataset.teacher or "")
    if not path.is_file() and not (path / "config.json").is_file():
        raise SettingsError(f"dataset.teacher: neither a GGUF file nor a model folder: {path}")
    return path


def cache_path(settings: Settings) -> Path:
    """Return the cache of the profile's teacher: another model or length has another file.

    Raises:
        SettingsError: no such teacher.
    """
    path = teacher_path(settings)
    files = [path] if path.is_file() else [path / "config.json", *sorted(path.glob("*.safetensors"))]
    identity = "".join(map(sha256_file, files))
    name = f"{identity} {settings.dataset.teacher_max_tokens} {INSTRUCTIONS['ja']}"
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return resolve(settings.run.root) / ".teacher" / f"{digest}.sqlite"


def open_teacher(settings: Settings) -> Engine:
    """Open the engine that the profile names: a GGUF file or a model folder."""
    path = teacher_path(settings)
    if path.is_file():
        from so8t_helpers.engines.llama_cpp import open_llama_cpp  # noqa: PLC0415  (an option)

        return open_llama_cpp(path, num_ctx=settings.training.sequence_length * 2)
    from so8t_helpers.engines.transformers_engine import open_transformers  # noqa: PLC0415

    return open_transformers(path)


def request(record: Record) -> str:
    """Return what the teacher is asked: policy has been applied, so nothing personal or unsafe is in it."""
    question, answer = _TURNS[record.language]
    instruction = INSTRUCTIONS[record.language]
    return f"{instruction}\n\n{question}: {record.question}\n\n{answer}: {record.answer}"


def usable(text: str) -> str:
    """Return the teacher's text where it may stand as thinking, else ""."""
    text = text.strip()
    return "" if contains_markers(text, "english") or decision_of(text) is not None else text


def _key(record: Record) -> str:
    return hashlib.sha256(request(record).encode()).hexdigest()
