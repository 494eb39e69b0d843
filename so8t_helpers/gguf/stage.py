"""04_gguf: the baked folder becomes GGUF files that llama.cpp and Ollama load, each with its figures."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from so8t_helpers.gguf import imatrix
from so8t_helpers.gguf.layout import GgufTensor, PlannedFile, collect_tensors, plan_file
from so8t_helpers.gguf.measure import Measurements
from so8t_helpers.gguf.metadata import Model, read_model
from so8t_helpers.gguf.parity import check_tokens
from so8t_helpers.gguf.types import FILE_TYPES, byte_size
from so8t_helpers.gguf.vocabulary import check_pre_tokenizer, check_vocabulary
from so8t_helpers.gguf.writer import (
    Importance,
    journal_path,
    part_path,
    source_bytes,
    unfinished,
    write_files,
)
from so8t_helpers.phi3 import tokenizer_files
from so8t_helpers.phi3.source import local_base
from so8t_helpers.phi3.weights import TensorPlace, read_checkpoint
from so8t_helpers.run import origin
from so8t_helpers.run.files import StageError, check_disk, read_json, remove, run_hashes, write_json
from so8t_helpers.run.progress import Progress
from so8t_helpers.run.stage import Stage, open_stage, other_input, stage_input
from so8t_helpers.settings import Settings
from so8t_helpers.so8 import rotation

STAGE = "04_gguf"
_OPTIONAL_FILES = (*tokenizer_files.FILES, "generation_config.json", "README.md", origin.FILE)
_PARITY_TEXTS = 32  # held-out texts whose token ids are compared, besides the built-in ones


@dataclass(frozen=True)
class GgufResult:
    """The files of a run and their figures (the content of quality.json)."""

    files: dict[str, Path]
    quality: dict[str, Any]


def check(settings: Settings) -> None:
    """Look at the named model, else at the base whose tokenizer a bake copies; nothing is made or written.

    Raises:
        SettingsError, StageError: a missing file, a tensor that does not fit, another architecture.
    """
    folder, base = other_input(settings, STAGE), local_base(settings)
    if folder is not None:
        _read_folder(Stage(settings, STAGE), folder)
    elif base is not None:
        try:
            check_pre_tokenizer(base)
        except StageError as error:  # what it lacks may have been put into the baked folder
            baked = stage_input(settings, None, "03_bake", "model")
            if not baked.is_dir():
                raise StageError(f"model.base: {error}") from None
            check_vocabulary(baked)


def export(settings: Settings) -> GgufResult:
    """Write the profile's GGUF files from the baked folder, check them in llama.cpp, measure their quality.

    Raises:
        StageError: a missing file, a tensor that does not fit, a weight that is not finite, too little disk,
            or token ids that differ from the HF tokenizer's.
    """
    with open_stage(settings, STAGE) as stage:
        folder = stage_input(settings, settings.gguf.model_dir, "03_bake", "model")
        check(settings)
        model, tensors = _read_folder(stage, folder)
        name, types = settings.gguf.name, settings.gguf.types
        files: dict[str, Path] = {kind: stage.directory / f"{name}-{kind}.gguf" for kind in types}
        _remove_others(stage, files.values())
        measure = Measurements(settings, stage, folder, tensors)
        matrix = measure.importance_matrix() if settings.gguf.imatrix else None
        carried, keys = _provenance(settings, stage, folder), matrix.metadata() if matrix else {}
        plans = {
            kind: plan_file(path, FILE_TYPES[kind], tensors, model, name, carried, keys)
            for kind, path in files.items()
        }
        importance = matrix.importance() if matrix else {}
        _write(settings, stage, list(plans.values()), tensors, importance)
        smallest = min(plans.values(), key=lambda plan: plan.size).path
        timeout = settings.eval.timeout_seconds
        samples = check_tokens(smallest, folder, measure.held_out[:_PARITY_TEXTS], timeout)
        quality: dict[str, Any] = {"token_parity": {"texts": samples, "equal": True}}
        quality["files"] = {kind: _size(plan, tensors, model) for kind, plan in plans.items()}
        if measure.held_out:
            found = measure.quality(plans, importance, _gates(settings, stage))
            for kind, figures in found.pop("files").items():
                quality["files"][kind] |= figures
            quality |= found
        write_json(stage.directory / "quality.json", quality)
        for kind, entry in quality["files"].items():
            stage.facts[f"{kind} MiB"] = round(entry["bytes"] / 2**20, 1)
            if "kl_mean" in entry and kind != "f16":
                stage.facts[f"{kind} KL from F16"] = f"{entry['kl_mean']:.2e}"
        return GgufResult(files, quality)


def _read_folder(stage: Stage, folder: Path) -> tuple[Model, list[GgufTensor]]:
    """Register a model's files; return what its configuration says, and its tensors, still on disk."""
    places = _register_model(stage, folder)
    model = read_model(folder, sum(prod(place.shape) for place in places.values()))
    return model, collect_tensors(places, model)


def _register_model(stage: Stage, folder: Path) -> dict[str, TensorPlace]:
    """Register all that decides the files' bytes, before any long work; return the tensors' places."""
    label = _label(folder)
    made_by = "run 03_bake, or set gguf.model_dir to a Phi3 folder"
    stage.read_file(f"{label}config.json", folder / "config.json", made_by)
    check_vocabulary(folder)
    for name in _OPTIONAL_FILES:
        if (folder / name).is_file():
            stage.read_file(f"{label}{name}", folder / name)
    read_json(folder / origin.FILE)
    places = read_checkpoint(folder)
    for path in {place.path for place in places.values()}:
        stage.read_file(f"{label}{path.name}", path)
    return places


def _label(folder: Path) -> str:
    """Prefix of the model's input labels: a folder that a run baked is a link of the chain of provenance."""
    return "03_bake/model/" if (folder.parent / "manifest.json").is_file() else "model/"


def _provenance(settings: Settings, stage: Stage, folder: Path) -> str:
    """The JSON text of `so8t.provenance`: what the baked folder carries, and the hashes of its files."""
    path = folder / origin.FILE
    if path.is_file():
        carried: dict[str, Any] = read_json(path)
    else:  # a model from elsewhere: only its own files can be named
        carried = {"format": "so8t-provenance", "version": origin.VERSION, "run": settings.run.name}
        carried |= {"base": None, "sha256": {}}
    label = _label(folder)
    named = {k.removeprefix(label): path for k, path in stage.inputs.items() if k.startswith(label)}
    with run_hashes(settings) as cache:
        model = {name: cache.sha256(path) for name, path in named.items()}
    return json.dumps(carried | {"model": model}, ensure_ascii=False)


def _remove_others(stage: Stage, files: Iterable[Path]) -> None:
    """Files of types or names that the profile no longer asks for would pass for this run's."""
    keep = {file for path in files for file in (path, part_path(path), journal_path(path))}
    if stage.settings.gguf.imatrix:
        keep.add(stage.directory / imatrix.FILE)
    for path in (*stage.directory.glob("*.gguf"), *stage.directory.glob(".*.gguf.*")):
        if path not in keep:
            remove(path)
    remove(stage.directory / "quality.json")


def _write(
    settings: Settings,
    stage: Stage,
    plans: list[PlannedFile],
    tensors: list[GgufTensor],
    importance: Importance,
) -> None:
    todo = unfinished(plans, tensors, importance)
    needed = sum(plan.size for plan, _, _ in todo if not part_path(plan.path).exists())
    check_disk(stage.directory, needed, f"{STAGE}: {len(todo)} GGUF files")
    counted = source_bytes(tensors[: min((done for _, _, done in todo), default=len(tensors))])
    with Progress(settings, STAGE, source_bytes(tensors) // 2**20, "MiB", "write") as bar:
        bar.skip(counted // 2**20)
        threads = settings.gguf.threads or os.cpu_count() or 1
        write_files(plans, tensors, threads, bar.update_bytes, importance)


def _gates(settings: Settings, stage: Stage) -> rotation.Gates | None:
    """The gates that this run baked into the model; none where the model came from elsewhere."""
    if settings.gguf.model_dir is not None:
        return None
    path = stage_input(settings, settings.bake.adapter_dir, "02_train", "adapter") / rotation.GATES_FILE
    if not path.is_file():
        return None
    return rotation.load_gates(stage.read_file(f"02_train/adapter/{rotation.GATES_FILE}", path))


def _size(plan: PlannedFile, tensors: Sequence[GgufTensor], model: Model) -> dict[str, Any]:
    kinds, sizes = Counter[str](), Counter[str]()
    for tensor in tensors:
        kind = plan.types[tensor.name]
        kinds[kind.name] += 1
        sizes[kind.name] += byte_size(kind, tensor.shape)
    return {
        "bytes": plan.size,
        "bits_per_weight": 8 * (plan.size - len(plan.header)) / model.parameters,
        "tensor_types": dict(kinds.most_common()),
        "tensor_bytes": dict(sizes.most_common()),
    }
