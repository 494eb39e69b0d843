"""The origin that a baked model carries: hashes of all it was made from.

A baked folder holds it as `so8t_provenance.json`, its model card shows it, and a GGUF file carries the same
text under the key `so8t.provenance`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from so8t_helpers.run.files import run_hashes
from so8t_helpers.run.stage import Stage, maker, manifest_in
from so8t_helpers.settings import Settings, resolve

FILE = "so8t_provenance.json"
GGUF_KEY = "so8t.provenance"
VERSION = 1
LLAMA = "llama:"


def of_bake(settings: Settings, stage: Stage, commit: str | None = None) -> dict[str, Any]:
    """Return the hashes that a baked model carries on; `stage` has registered all that it read.

    `commit` is the base's, where it came from the hub: a branch or no revision says little a year later.

    A hash that stands for several files is that of their sorted lines "sha256  label". `dataset` and
    `settings` are those of the training that made the adapter; null where it has no manifest.
    """
    with run_hashes(settings) as cache:
        digests = {label: cache.sha256(path) for label, path in stage.inputs.items()}
    return {
        "format": "so8t-provenance",
        "version": VERSION,
        "run": settings.run.name,
        "base": {
            "id": public_name(settings.model.base),
            "revision": settings.model.revision,
            "commit": commit,
        },
        "sha256": hashes(digests, stage.inputs),
    }


def llama_source(base: str) -> Path | None:
    """Return the Llama folder or file that a `model.base` of the form "llama:PATH" names, None for others."""
    return resolve(base.removeprefix(LLAMA)) if base.startswith(LLAMA) else None


def public_name(base: str) -> str:
    """Return what others are told of a `model.base`: of a path the name alone, the rest is this machine's."""
    source = llama_source(base)
    if source is not None:
        return source.name
    return resolve(base).name if resolve(base).is_dir() else base


def hashes(read: dict[str, str], paths: dict[str, Path]) -> dict[str, str | None]:
    """The five hashes a model carries, from the hashes and paths of what the bake read, by label."""
    makers = [maker(label, path) for label, path in paths.items() if label.startswith("02_train/")]
    training = manifest_in(makers[-1]) if makers else None
    adapter = {k: v for k, v in read.items() if "so8t_gates" not in k}
    gates = {k: v for k, v in read.items() if "so8t_gates" in k}
    trained_on = {k: entry["sha256"] for k, entry in training["inputs"].items()} if training else {}
    settings = json.dumps(training["settings"], sort_keys=True, ensure_ascii=False) if training else None
    return {
        "base": _combined(read, "base/"),
        "adapter": _combined(adapter, "02_train/"),
        "gates": _combined(gates, "02_train/"),
        "dataset": _combined(trained_on, "01_dataset/"),
        "settings": hashlib.sha256(settings.encode()).hexdigest() if settings else None,
    }


def _combined(digests: dict[str, str], prefix: str) -> str | None:
    lines = sorted(f"{value}  {label}\n" for label, value in digests.items() if label.startswith(prefix))
    return hashlib.sha256("".join(lines).encode()).hexdigest() if lines else None
