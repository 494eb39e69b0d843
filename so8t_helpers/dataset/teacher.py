"""Thinking from a teacher model, for records without reasoning of their own, checked against the record.

It is cached by content (model and prompt) in one file for all runs: a stage that was stopped goes on where it
was, and one that is run again asks nothing. The prompts are texts of the profile (`dataset.teacher_prompts`).
"""

from __future__ import annotations

import hashlib
import re
import sqlite3
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from so8t_helpers.dataset.records import Record
from so8t_helpers.dataset.thinking import WORDS
from so8t_helpers.run.files import sha256_file
from so8t_helpers.settings import Settings, SettingsError, resolve
from so8t_helpers.thinking.format import contains_markers, decision_of
from so8t_helpers.thinking.language import LANGUAGES, language_of

if TYPE_CHECKING:  # every worker process imports this module, and engines bring torch along
    from so8t_helpers.engines.base import Engine

NEEDED = ("{question}", "{answer}")
# What the check sees of what the record does not say. It takes no paraphrase for a fact, and no fact for a
# paraphrase: a claim in other words, and a name in Chinese characters without a title, pass.
_NUMBER = re.compile(r"\d+(?:[,.]\d+)*")
_NAMES = {
    # Katakana, Latin letters, and Chinese characters before a title.
    "ja": re.compile(
        r"[ァ-ヺー]{2,}|[A-Za-z][A-Za-z0-9]+|[\u3005\u3400-\u9fff]+(?=さん|様|氏|先生|くん|ちゃん)"
    ),
    # Words with a capital that do not begin a sentence.
    "en": re.compile(r"(?<=[a-z0-9,;:'’\"(] )[\"'(]?([A-Z][\w’'-]+)"),
}
_LABELS = {
    word: label for words in WORDS.values() for label, word in words.labels.items()
} | {label: label for label in WORDS["en"].labels}  # fmt: skip
_SPELLED = sorted(_LABELS, key=len, reverse=True)  # 不許可 before 許可
_LABEL = re.compile("|".join(rf"(?<![A-Za-z]){w}(?![A-Za-z])" if w.isascii() else w for w in _SPELLED))


class Thoughts:
    """The teacher's cache: a record's prompt -> its text, and what is wrong with it ("": nothing)."""

    def __init__(self, path: Path, prompts: dict[str, str]):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(path)
        self._prompts = prompts
        table = "thought (key TEXT PRIMARY KEY, text TEXT NOT NULL, fault TEXT NOT NULL)"
        self._database.execute(f"CREATE TABLE IF NOT EXISTS {table}")

    def get(self, record: Record) -> tuple[str, str] | None:
        """Return a record's thinking and its fault; None where the teacher has not been asked."""
        query = "SELECT text, fault FROM thought WHERE key = ?"
        row = self._database.execute(query, (self._key(record),)).fetchone()
        return None if row is None else (str(row[0]), str(row[1]))

    def put(self, items: Iterable[tuple[Record, str]]) -> None:
        """Check and keep some texts; they survive whatever comes after."""
        rows = [(self._key(record), text.strip(), fault(text.strip(), record)) for record, text in items]
        self._database.executemany("INSERT OR REPLACE INTO thought VALUES (?, ?, ?)", rows)
        self._database.commit()

    def request(self, record: Record) -> str:
        """Return what the teacher is asked of a record, as policy left it; a dialogue's turns come first."""
        values = {"question": "\n".join((*record.history, record.question)), "answer": record.answer}
        values |= {"label": record.label, "task": record.task or "", "domain": record.domain or ""}
        # At once, so that a record that holds "{answer}" stays as it is.
        prompt = self._prompts[language_of(record.question)]
        return re.sub(r"\{(\w+)\}", lambda place: values.get(place[1], place[0]), prompt)

    def _key(self, record: Record) -> str:
        return hashlib.sha256(self.request(record).encode("utf-8", "surrogatepass")).hexdigest()


def fault(text: str, record: Record) -> str:
    """Say why a teacher's text may not stand as a record's thinking: what kind of thing it says by itself.

    It must be in the question's language, hold no mark of the formats and no decision, and no number, label
    or name that is not in the record; for what is seen as one, see `_NAMES`. "": nothing is wrong.
    """
    if not text:
        return "empty"
    if contains_markers(text, "english") or decision_of(text) is not None:
        return "a mark of the formats, or a decision"
    language = language_of(record.question)
    if language_of(text) != language:
        return "another language"
    parts = (*record.history, record.question, record.answer, record.system, record.task, record.domain)
    said, known = (unicodedata.normalize("NFKC", t) for t in (text, "\n".join(filter(None, parts))))
    numbers = {number.replace(",", "") for number in _NUMBER.findall(known)}
    if any(number.replace(",", "") not in numbers for number in _NUMBER.findall(said)):
        return "a number"
    known = known.lower()
    for word in _LABEL.findall(said):
        if _LABELS[word] != record.label and word.lower() not in known:
            return "a label"
    if any(name.lower() not in known for name in _NAMES[language].findall(said)):
        return "a name"
    return ""


def read_prompts(settings: Settings) -> dict[str, str]:
    """Return the prompt for each language, with the places {question}, {answer}, {label}, {task}, {domain}.

    Raises:
        SettingsError: one is missing, or has no place for the question or the answer.
    """
    prompts = {}
    for language, path in prompt_paths(settings).items():
        if not path.is_file():
            raise SettingsError(f"dataset.teacher_prompts: no file {path}; it holds one for each language")
        prompts[language] = path.read_text(encoding="utf-8-sig").strip()
        if missing := [place for place in NEEDED if place not in prompts[language]]:
            raise SettingsError(f"{path}: expected the place {missing[0]}, where the record's own stands")
    return prompts


def prompt_paths(settings: Settings) -> dict[str, Path]:
    """Return where the prompt for each language is."""
    return {name: resolve(settings.dataset.teacher_prompts) / f"{name}.txt" for name in LANGUAGES}


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
    """Return the cache of the profile's teacher: another model, length or prompt has another file.

    Raises:
        SettingsError: no such teacher.
    """
    path = teacher_path(settings)
    files = [path] if path.is_file() else [path / "config.json", *sorted(path.glob("*.safetensors"))]
    prompts = read_prompts(settings)
    name = f"{[sha256_file(file) for file in files]} {settings.dataset.teacher_max_tokens} {prompts}"
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return resolve(settings.run.root) / ".teacher" / f"{digest}.sqlite"


def open_teacher(settings: Settings) -> Engine:
    """Open the engine that the profile names: a GGUF file or a model folder."""
    path, parallel = teacher_path(settings), settings.dataset.teacher_parallel
    if path.is_file():
        from so8t_helpers.engines.llama_cpp import open_llama_cpp  # noqa: PLC0415  (an option)

        return open_llama_cpp(path, num_ctx=settings.training.sequence_length * 2, parallel=parallel)
    from so8t_helpers.engines.transformers_engine import open_transformers  # noqa: PLC0415

    return open_transformers(path, parallel=parallel)
