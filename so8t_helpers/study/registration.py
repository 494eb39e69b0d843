"""What was said before the first training, and what was changed later: appended, never rewritten."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from so8t_helpers.phi3.shape import Phi3Shape
from so8t_helpers.run.files import write_json
from so8t_helpers.run.stage import utc_now, versions
from so8t_helpers.settings import Settings
from so8t_helpers.study.data import Data
from so8t_helpers.study.outcome import decisive_settings
from so8t_helpers.study.plan import Arm, Study, StudyFile, arm_settings, matched_rank
from so8t_helpers.train.adapters import count_parameters


@dataclass(frozen=True)
class Change:
    """What a study file said differently from one registration to the next."""

    date: str
    key: str
    before: Any
    after: Any


def registration_path(study: Study) -> Path:
    """Where a study's registrations are kept."""
    return study.folder / "registration.json"


def read_registrations(study: Study) -> list[dict[str, Any]]:
    """Return all registrations, the first one first."""
    path = registration_path(study)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def register(study: Study, data: Data, shape: Phi3Shape) -> list[dict[str, Any]]:
    """Write down what the study is, where that is not what was written last; return all registrations.

    Each entry holds the content, its hash, the study file's own hash, the date, the versions, and how many
    trainings were finished by then. Keys that the package did not know when it wrote the last one count as
    their defaults: an upgrade alone changes no study.
    """
    entries = read_registrations(study)
    text = json.dumps(_content(study, data, shape), sort_keys=True)
    content = json.loads(text)  # as it will be read: lists, no tuples
    if not entries or _of_today(entries[-1]["study"]) != _of_today(content):
        entry = {
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "file_sha256": study.sha256,
            "date": utc_now(),
            "trainings": len(list((study.folder / "trainings").glob("[!.]*"))),
            "versions": versions(),
            "study": content,
        }
        entries.append(entry)
        write_json(registration_path(study), entries)
    return entries


def changes(entries: list[dict[str, Any]]) -> list[Change]:
    """Return what was changed after the first registration, in order."""
    found = []
    for before, after in itertools.pairwise(entries):
        old, new = _of_today(before["study"]), _of_today(after["study"])
        for key in dict.fromkeys([*old, *new]):
            if old.get(key) != new.get(key):
                found.append(Change(after["date"], key, old.get(key), new.get(key)))
    return found


def _content(study: Study, data: Data, shape: Phi3Shape) -> dict[str, Any]:
    """All that decides what the study can find, without where things lie."""
    arms: dict[str, Any] = {}
    for name, arm in study.file.arms.items():
        settings = arm_settings(study, name, matched_rank(study, name, shape))
        lora, gates = count_parameters(settings, shape)
        arms[name] = arm.model_dump(mode="json") | {
            "parameters": {"lora": lora, "gates": gates},
            "settings": decisive_settings(settings),
        }
    return study.file.model_dump(mode="json", exclude={"arms"}) | {"arms": arms, "data": data.digests}


def _of_today(content: dict[str, Any]) -> dict[str, Any]:
    """A registration's content, flat, with today's defaults for what it does not say."""
    if isinstance(content.get("full"), list):  # arms alone, in the first versions
        content = content | {"full": {"arms": content["full"]}}
    settings = json.loads(json.dumps(decisive_settings(Settings())))
    arm = Arm.model_construct().model_dump(mode="json") | {"settings": settings}
    defaults = _flat(StudyFile.model_construct().model_dump(mode="json"))
    for name in content["arms"]:
        defaults |= _flat(arm, f"arms.{name}")
    return defaults | _flat(content)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as {"arms.lora.hypothesis": …}."""
    if not isinstance(value, dict):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return found
