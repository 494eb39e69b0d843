"""Data sets as the `datasets` library has them: its folders on disk, and the hub's."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import orjson

from so8t_helpers.run.files import atomic_path, read_json
from so8t_helpers.settings import InputEntry, Settings, SettingsError, resolve

HUB = "hub:"


def data_files(entry: InputEntry) -> list[Path]:
    """Return the files of a folder that `save_to_disk` wrote, in their order; none for any other path.

    Raises:
        SettingsError: the folder has several splits and the entry names none of them.
    """
    folder = resolve(entry.path)
    if (folder / "dataset_dict.json").is_file():
        splits = [str(split) for split in read_json(folder / "dataset_dict.json")["splits"]]
        chosen = entry.split or (splits[0] if len(splits) == 1 else "")
        if chosen not in splits:
            raise SettingsError(
                f"{folder}: a data set with the splits {', '.join(splits)}; choose one in dataset.inputs: "
                f"`- {{path: {entry.path}, split: {splits[0]}}}`"
            )
        folder /= chosen
    if not (folder / "state.json").is_file():
        return []
    return [folder / part["filename"] for part in read_json(folder / "state.json")["_data_files"]]


def fetched(settings: Settings, entry: InputEntry, fetch: bool) -> Path | None:
    """Return the records of a data set of the hub as lines of JSON; fetched once, then kept in the run area.

    None where they have not been fetched and are not to be.

    Raises:
        SettingsError: no `datasets` library, no network, no such data set, split or revision.
    """
    name = entry.path.removeprefix(HUB)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise SettingsError(f"dataset.inputs: {entry.path!r}: expected hub:owner/name")
    parts = [name, entry.subset, entry.revision, entry.split or "train"]
    file = re.sub(r"[^\w.-]+", "--", "--".join(filter(None, parts))) + ".jsonl"
    path = resolve(settings.run.root) / ".inputs" / file
    if not path.is_file():
        datasets = _library(entry)
        if not fetch:
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        # A cache of its own: from a common one the library takes another revision where the network fails.
        # It is the library that holds its files open; what it does not let go stays there, hidden.
        with tempfile.TemporaryDirectory(
            dir=path.parent, prefix=".fetch-", ignore_cleanup_errors=True
        ) as cache:
            rows = _rows(datasets, name, entry, cache)
            with atomic_path(path) as scratch, scratch.open("wb") as out:
                for row in rows:
                    out.write(orjson.dumps(row, default=str, option=orjson.OPT_APPEND_NEWLINE))
            del rows
    return path


def _library(entry: InputEntry) -> Any:
    try:
        import datasets  # noqa: PLC0415  (an optional extra)
    except ImportError as error:
        raise SettingsError(
            f"dataset.inputs: {entry.path}: the library `datasets` fetches it and is not installed; "
            "pip install 'so8t-workbench[datasets]'"
        ) from error
    return datasets


def _rows(datasets: Any, name: str, entry: InputEntry, cache: str) -> Any:
    """Load one split; code of a repository is never run: the library does not from version 4 on."""
    try:
        return datasets.load_dataset(
            name, entry.subset, split=entry.split or "train", revision=entry.revision, cache_dir=cache
        )
    except Exception as error:  # of the network, of the hub, of the library
        said = " ".join(str(error).split())[:300]
        raise SettingsError(
            f"dataset.inputs: {entry.path}: not fetched from the hub ({type(error).__name__}: {said}); check "
            "name, split, revision and the network, or download it and name the folder"
        ) from error
