"""A finished stage of one run taken over by another run that would compute the very same."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from so8t_helpers import report
from so8t_helpers.run_folder import (
    STAGES,
    atomic_directory,
    read_manifest,
    sha256_file,
    stage_settings,
    stale_reason,
    write_json,
)
from so8t_helpers.settings import Settings

LINK_BYTES = 2**20  # smaller files are copied: a program may append to a log, never to a weights file


def settings_key(settings: Settings, stage: str) -> str:
    """Return a hash of all settings that a stage and those before it depend on.

    Runs with equal keys compute the same stage, as far as settings decide.
    """
    stages = STAGES[: STAGES.index(stage) + 1]
    values = {name: stage_settings(settings, name) for name in stages}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def adopt(settings: Settings, stage: str, donor: Settings) -> bool:
    """Take over a donor's finished stage, its notebook and its record; False where it would not be the same.

    The same means: equal settings of the stage, and equal hashes of every input. Large files are hard links
    where the disk allows.
    """
    manifest = read_manifest(donor, stage)
    record = report.read_record(donor, stage)
    executed = donor.run_dir / "notebooks" / f"{stage}.ipynb"
    if manifest is None or record is None or record["state"] != "done" or not executed.is_file():
        return False
    if stale_reason(donor, stage) is not None:
        return False
    if stage_settings(settings, stage) != manifest["settings"]:
        return False
    inputs = _own_inputs(settings, donor, manifest)
    if inputs is None:
        return False
    source = donor.run_dir / stage
    with atomic_directory(settings.run_dir / stage) as folder:
        for relative in manifest["outputs"]:
            _link_or_copy(source / relative, folder / relative)
        write_json(folder / "manifest.json", manifest | {"inputs": inputs, "adopted_from": donor.run.name})
    target = settings.run_dir / "notebooks" / executed.name
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(executed, target)
    digest = sha256_file(settings.run_dir / stage / "manifest.json")
    write_json(report.record_path(settings, stage), record | {"manifest": digest})
    report.write_stage(settings, stage)
    return True


def _own_inputs(settings: Settings, donor: Settings, manifest: dict[str, Any]) -> dict[str, Any] | None:
    """The donor's inputs as this run would read them, None where one is missing or differs."""
    inputs = {}
    for label, entry in manifest["inputs"].items():
        path = Path(entry["path"])
        if path.is_relative_to(donor.run_dir):
            path = settings.run_dir / path.relative_to(donor.run_dir)
            if not path.is_file() or sha256_file(path) != entry["sha256"]:
                return None
        inputs[label] = entry | {"path": str(path)}
    return inputs


def _link_or_copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.stat().st_size >= LINK_BYTES:
        try:
            os.link(source, target)
            return
        except OSError:
            pass  # another disk, or one without hard links
    shutil.copy2(source, target)
