"""Files that a setting names by a path, a glob or a folder: which they are, and whether they still are."""

from __future__ import annotations

from pathlib import Path

from so8t_helpers.settings import resolve

PACKED = (".gz", ".zst", ".bz2", ".xz")
DATA = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".xlsx")
# What editors and people leave beside a file that they change.
_LEFT_OVER = (".bak", ".old", ".orig", ".tmp", ".swp", ".part", "~")
# What a `datasets` folder holds besides its data.
_DESCRIPTIONS = {"dataset_info.json", "dataset_dict.json", "dataset_infos.json", "state.json"}


def matching(pattern: str) -> list[Path]:
    """Return the files that a path, glob or folder names, sorted; none is no error.

    A file that is named itself is taken whatever it is called. A folder stands for the data files in it, and
    neither folders nor globs for hidden files and what was left over from an edit.
    """
    path = resolve(pattern)
    if path.is_file():
        return [path]
    anchor = Path(path.anchor)
    if path.is_dir():
        found = (file for file in path.rglob("*") if _is_data(file.name) and not _hidden(file, path))
    else:
        named = path.relative_to(anchor)
        hidden = any(part.startswith(".") for part in named.parts)
        found = (file for file in anchor.glob(str(named)) if hidden or not file.name.startswith("."))
    return sorted(file for file in found if file.is_file() and not file.name.endswith(_LEFT_OVER))


def changed(pattern: str, before: list[str]) -> str | None:
    """Say which file a pattern names now and did not before, or the other way round; None: none."""
    now = [str(path) for path in matching(pattern)]
    new, gone = (sorted(set(a) - set(b)) for a, b in ((now, before), (before, now)))
    return f"{new[0]} is new" if new else f"{gone[0]} is gone" if gone else None


def data_name(name: str) -> str:
    """Return a file's name in lower case, without what says how it is packed."""
    name = name.lower()
    return name.removesuffix(next((end for end in PACKED if name.endswith(end)), ""))


def _is_data(name: str) -> bool:
    own_work = name in _DESCRIPTIONS or (name.startswith("cache-") and name.endswith(".arrow"))
    return data_name(name).endswith(DATA) and not own_work


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)
