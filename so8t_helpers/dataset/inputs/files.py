"""The files of `dataset.inputs`: which ones, what each is, and that it is whole."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from so8t_helpers.dataset.fields import Given, given_by
from so8t_helpers.dataset.inputs.hub import HUB, data_files, fetched
from so8t_helpers.dataset.inputs.kinds import BINARY, BOM, HEADLESS, encoding_of, format_of
from so8t_helpers.dataset.inputs.packing import open_bytes, packing_of
from so8t_helpers.run.files import demo_folder, reading
from so8t_helpers.run.patterns import DATA, data_name, matching
from so8t_helpers.settings import InputEntry, Settings, SettingsError, resolve

SAMPLE_BYTES = 2**20
# A part of the path of a public data set's own folder, and how that folder is fetched.
_HOW_TO_GET = {
    "gsm8k/grade_school_math/": "; this command fetches it, in the project's folder: "
    "git clone --depth 1 https://github.com/openai/grade-school-math data/gsm8k"
}


@dataclass(frozen=True)
class InputFile:
    """One input file.

    Attributes:
        name: how rows and reports call it.
        format: "jsonl", or one whose records `tables` writes as lines of JSON.
        compression: "gzip", "zstd", "bzip2", "xz" or "none".
        encoding: of a text, as Python names it.
        entry: what the profile says of it; `given` of its records, None where it says nothing of them.
        lines: where `tables` has written its records; None for a file of lines.
    """

    path: Path
    name: str
    format: str
    compression: str
    encoding: str
    bom: bool
    entry: InputEntry
    given: Given | None
    lines: Path | None = None

    @property
    def line_encoding(self) -> str:
        """The encoding of its lines of JSON."""
        return "utf-8" if self.lines else self.encoding


def find_files(patterns: list[str], key: str) -> list[Path]:
    """Return the files that the patterns of a setting name, each once, in the patterns' order.

    Raises:
        SettingsError: where a pattern matches nothing; it names `key`.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        if not (matches := matching(pattern)):
            raise SettingsError(
                f"{key}: no file matches {pattern!r} (looked for {resolve(pattern)}){_hint(pattern)}"
            )
        found |= dict.fromkeys(matches)
    return list(found)


def entries(settings: Settings) -> list[InputEntry]:
    """Return the entries of `dataset.inputs`, plain strings too, without the demo's."""
    named = settings.dataset.inputs
    return [InputEntry(path=entry) if isinstance(entry, str) else entry for entry in named if entry != "demo"]


def input_files(settings: Settings, fetch: bool = True) -> list[tuple[Path, InputEntry]]:
    """Return the files of `dataset.inputs`, each once and with the entry that says most of it.

    The word "demo" stands for the demo's records. With `fetch`, a data set of the hub is fetched where it
    has not been, and the demo's records must be there; without, both are left out where they are not.

    Raises:
        SettingsError: an entry that names no file, or a field that there is none of.
    """
    found: dict[Path, InputEntry] = {}
    if fetch and "demo" in settings.dataset.inputs:
        demo = demo_folder(settings, "records") / "records.jsonl"
        found[demo] = InputEntry(path=str(demo))
    for entry in entries(settings):
        given_by(entry)
        if entry.path.startswith(HUB):
            snapshot = fetched(settings, entry, fetch)
            paths = [snapshot] if snapshot else []
        else:
            paths = data_files(entry) or find_files([entry.path], "dataset.inputs")
        for path in paths:
            if path not in found or entry != InputEntry(path=entry.path):
                found[path] = entry
    return list(found.items())


def inspect(paths: list[Path], said: list[InputEntry] | None = None) -> list[InputFile]:
    """Look at the head of every file: how it is packed, which format and encoding it has.

    Raises:
        SettingsError: a file that is not read; it says what it looks like and what would make it readable.
        StageError: a packed file whose beginning is damaged.
    """
    files = []
    of_each = said or [InputEntry(path=str(path)) for path in paths]
    for path, name, entry in zip(paths, _short_names(paths), of_each, strict=True):
        packing = packing_of(path)
        with reading(path, f"a whole {packing} file"), open_bytes(path, packing) as file:
            sample = file.read(SAMPLE_BYTES)
        if len(sample) == SAMPLE_BYTES:  # a cut inside a character would make the last line invalid
            sample = sample[: sample.rfind(b"\n") + 1] or sample
        encoding = encoding_of(sample, entry)
        kind = format_of(path, sample, encoding, entry)
        if isinstance(entry.columns, list) and kind not in HEADLESS:
            raise SettingsError(
                f"{path}: its columns have names of their own ({kind}); say which is which, such as "
                "`columns: {question: …, answer: …}`"
            )
        given = given_by(entry)
        files.append(
            InputFile(
                path,
                name,
                kind,
                packing,
                "binary" if kind in BINARY else encoding,
                sample.startswith(BOM),
                entry,
                None if given == Given() else given,
            )
        )
    return files


def check_whole(files: list[InputFile]) -> None:
    """Raise StageError for a packed file that is cut or damaged."""
    for file in files:
        if file.compression != "none":
            with whole(file), open_bytes(file.path, file.compression) as unpacked:
                while unpacked.read(2**20):
                    pass


def whole(file: InputFile) -> AbstractContextManager[None]:
    """While a file is read: whatever its packing raises is a StageError that names it."""
    return reading(
        file.path, f"a whole {file.compression} file" if file.compression != "none" else file.format
    )


def _hint(pattern: str) -> str:
    """Say how a public data set's folder is fetched, or which other files lie where a pattern looks."""
    if how := next((how for part, how in _HOW_TO_GET.items() if part in pattern), None):
        return how
    folder = resolve(pattern).parent
    others = (
        sorted(p.name for p in folder.iterdir() if data_name(p.name).endswith(DATA))
        if folder.is_dir()
        else []
    )
    return f"; {folder} holds {', '.join(others[:5])}: name those, or the folder" if others else ""


def _short_names(paths: list[Path]) -> list[str]:
    """Names without the machine's folders: the file name, or as many parents as tell files apart."""
    depth = 1
    while len(set(names := ["/".join(path.parts[-depth:]) for path in paths])) < len(set(paths)):
        depth += 1
    return names
