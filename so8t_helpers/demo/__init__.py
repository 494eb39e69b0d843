"""The demo's own base model and records: made on first use, the same every time, kept in the run area."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from so8t_helpers.run import files
from so8t_helpers.settings import Settings


def prepare(settings: Settings) -> None:
    """Make what a profile calls "demo" and is not there yet: the base, the records."""
    if settings.model.base == "demo":
        ensure_base(settings)
    if "demo" in settings.dataset.inputs:
        ensure_records(settings)


def ensure_base(settings: Settings) -> Path:
    """Return the folder of the demo's base model, in a published one's form; made once (a minute)."""

    def make(folder: Path) -> None:
        from so8t_helpers.demo import base_model  # noqa: PLC0415  (torch is not needed for the records)

        base_model.write_base(settings, folder)

    return _ensure(settings, "base", make)


def ensure_records(settings: Settings) -> Path:
    """Return the path of the demo's `records.jsonl`; beside it `robots/<host>.txt` for the hosts it names."""
    from so8t_helpers.demo import records  # noqa: PLC0415

    return _ensure(settings, "records", records.write_records) / "records.jsonl"


def _ensure(settings: Settings, name: str, make: Callable[[Path], None]) -> Path:
    """Return the finished folder `name`; one process makes it, others that start meanwhile wait."""
    target = files.demo_place(settings, name)
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{name}.lock")):
            if not target.is_dir():
                with files.atomic_directory(target) as scratch:
                    make(scratch)
    return target
