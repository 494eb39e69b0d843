"""The demo's own base model and records: made on first use, the same every time, kept in the run area."""

from __future__ import annotations

from pathlib import Path

from so8t_helpers.run.files import demo_place, make_once
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

    return make_once(demo_place(settings, "base"), make)


def ensure_records(settings: Settings) -> Path:
    """Return the path of the demo's `records.jsonl`; beside it `robots/<host>.txt` for the hosts it names."""
    from so8t_helpers.demo import records  # noqa: PLC0415

    return make_once(demo_place(settings, "records"), records.write_records) / "records.jsonl"
