"""04_gguf: the baked folder becomes GGUF files that llama.cpp and Ollama load, each with its figures."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from gguf import GGUFReader
from transformers import AutoTokenizer

from so8t_helpers import origin
from so8t_helpers.checkpoint import TensorPlace, read_checkpoint
from so8t_helpers.gguf_export.forward import read_config
from so8t_helpers.gguf_export.layout import PlannedFile, Tensor, collect_tensors, new_writer, plan_file
from so8t_helpers.gguf_export.metadata import Model, add_metadata, read_model
from so8t_helpers.gguf_export.parity import check_tokens
from so8t_helpers.gguf_export.quality import compare, run_texts, take_tokens
from so8t_helpers.gguf_export.types import FILE_TYPES, byte_size
from so8t_helpers.gguf_export.weights import checkpoint_weights, gguf_weights
from so8t_helpers.gguf_export.writer import part_path, unfinished, write_files
from so8t_helpers.progress import progress
from so8t_helpers.run_folder import (
    HashCache,
    Stage,
    StageError,
    check_disk,
    open_stage,
    read_jsonl,
    stage_input,
    write_json,
)
from so8t_helpers.settings import Settings

STAGE = "04_gguf"
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")
_OPTIONAL_FILES = (
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "README.md",
    origin.FILE,
)
_SHORT_VALUE = 60  # characters
_PARITY_TEXTS = 32  # held-out texts whose token ids are compared, beside the built-in ones


@dataclass(frozen=True)
class GgufResult:
    """The files of a run and their figures (the content of quality.json)."""

    files: dict[str, Path]
    quality: dict[str, Any]

    def table(self) -> pd.DataFrame:
        """One row a file: size, bits a weight, perplexity, KL divergence and agreement with F16."""
        rows = [
            {
                "file": kind,
                "MiB": entry["bytes"] / 2**20,
                "bits a weight": entry["bits_per_weight"],
                "perplexity": entry.get("perplexity"),
                "KL from F16 (nats)": entry.get("kl_mean"),
                "top token as F16": entry.get("top1_agreement"),
                "tensor types": ", ".join(f"{n} {t}" for t, n in entry["tensor_types"].items()),
            }
            for kind, entry in self.quality["files"].items()
        ]
        return pd.DataFrame(rows).set_index("file")

    def metadata(self) -> pd.Series:
        """The keys of the smallest file with short values, in the order in which they are written."""
        path = min(self.files.values(), key=lambda p: p.stat().st_size)
        fields = GGUFReader(path).fields
        # The reader's own keys begin with "GGUF."; the vocabulary and the chat template fill pages.
        values = {k: f.contents() for k, f in fields.items() if not k.startswith("GGUF.")}
        return pd.Series({k: v for k, v in values.items() if len(str(v)) < _SHORT_VALUE}, name="value")


def export(settings: Settings) -> GgufResult:
    """Write the profile's GGUF files from the baked folder, check them in llama.cpp, measure their quality.

    Raises:
        StageError: a missing file, a tensor that does not fit, a weight that is not finite, too little disk,
            or token ids that differ from the HF tokenizer's.
    """
    with open_stage(settings, STAGE) as stage:
        folder = stage_input(settings, settings.gguf.model_dir, "03_bake", "model")
        places = _register_model(stage, folder)
        model = read_model(folder, sum(_weights(place) for place in places.values()))
        tensors = collect_tensors(places, model)
        carried = _provenance(settings, stage, folder)
        files: dict[str, Path] = {kind: _file_path(stage, kind) for kind in settings.gguf.types}
        _remove_others(stage, set(files.values()))
        plans = {kind: _plan(settings, kind, path, tensors, model, carried) for kind, path in files.items()}
        _write(settings, stage, list(plans.values()), tensors)
        held_out = _held_out(settings, stage)
        smallest = min(plans.values(), key=lambda plan: plan.size).path
        samples = check_tokens(smallest, folder, held_out[:_PARITY_TEXTS], settings.eval.timeout_seconds)
        quality = {
            "token_parity": {"texts": samples, "equal": True},
            "files": {kind: _size(plan, tensors, model) for kind, plan in plans.items()},
        }
        if held_out:
            _measure(settings, quality, files, folder, held_out, tensors)
        write_json(stage.directory / "quality.json", quality)
        stage.facts |= _facts(quality)
        return GgufResult(files, quality)


def _register_model(stage: Stage, folder: Path) -> dict[str, TensorPlace]:
    """Register all that decides the files' bytes, before any long work; return the tensors' places."""
    label = _label(folder)
    made_by = "run 03_bake, or set gguf.model_dir to a Phi3 folder"
    stage.read_file(f"{label}config.json", folder / "config.json", made_by)
    copy = "copy it from the base model's folder, transformers 5 does not save it"
    for name in _TOKENIZER_FILES:
        stage.read_file(f"{label}{name}", folder / name, copy)
    for name in _OPTIONAL_FILES:
        if (folder / name).is_file():
            stage.read_file(f"{label}{name}", folder / name)
    places = read_checkpoint(folder)
    for path in {place.path for place in places.values()}:
        stage.read_file(f"{label}{path.name}", path)
    return places


def _label(folder: Path) -> str:
    """Prefix of the model's input labels: a folder that a run baked is a link of the chain of provenance."""
    return "03_bake/model/" if (folder.parent / "manifest.json").is_file() else "model/"


def _weights(place: TensorPlace) -> int:
    count = 1
    for size in place.shape:
        count *= size
    return count


def _provenance(settings: Settings, stage: Stage, folder: Path) -> str:
    """The JSON text of `so8t.provenance`: what the baked folder carries, and the hashes of its files."""
    path = folder / origin.FILE
    if path.is_file():
        carried = json.loads(path.read_text(encoding="utf-8"))
    else:  # a model from elsewhere: only its own files can be named
        carried = {"format": "so8t-provenance", "version": origin.VERSION, "run": settings.run.name}
        carried |= {"base": None, "sha256": {}}
    cache, label = HashCache(settings.run_dir / ".hashes.json"), _label(folder)
    model = {k.removeprefix(label): cache.sha256(p) for k, p in stage.inputs.items() if k.startswith(label)}
    cache.save()
    return json.dumps(carried | {"model": model}, ensure_ascii=False)


def _file_path(stage: Stage, kind: str) -> Path:
    return stage.directory / f"{stage.settings.gguf.name}-{kind}.gguf"


def _remove_others(stage: Stage, wanted: set[Path]) -> None:
    """Files of types or names that the profile no longer asks for would pass for this run's."""
    for path in stage.directory.glob("*.gguf"):
        if path not in wanted:
            path.unlink()
    (stage.directory / "quality.json").unlink(missing_ok=True)


def _plan(
    settings: Settings, kind: str, path: Path, tensors: Sequence[Tensor], model: Model, carried: str
) -> PlannedFile:
    writer = new_writer()
    add_metadata(writer, model, settings.gguf.name, FILE_TYPES[kind], carried)
    return plan_file(path, FILE_TYPES[kind], tensors, model, writer)


def _write(settings: Settings, stage: Stage, plans: list[PlannedFile], tensors: list[Tensor]) -> None:
    todo = [plan for plan, _, _ in unfinished(plans, tensors, {})]
    needed = sum(plan.size for plan in todo if not part_path(plan.path).exists())
    check_disk(stage.directory, needed, f"{STAGE}: {len(todo)} GGUF files")
    total = sum(t.source.nbytes for t in tensors if isinstance(t.source, TensorPlace))
    with progress(settings, STAGE, total // 2**20, "MiB", "write") as bar:
        counted = 0

        def count(size: int) -> None:
            nonlocal counted
            counted += size
            bar.update(counted // 2**20 - bar.done)

        write_files(plans, tensors, settings.gguf.threads or os.cpu_count() or 1, count)


def _held_out(settings: Settings, stage: Stage) -> list[str]:
    """The held-out texts; none where this step is used alone, without a dataset."""
    path = stage_input(settings, settings.training.dataset_dir, "01_dataset") / "eval.jsonl"
    if not path.is_file() and settings.gguf.model_dir is not None:
        return []
    stage.read_file("01_dataset/eval.jsonl", path, "run 01_dataset, or set training.dataset_dir")
    return [row["text"] for row in read_jsonl(path)]


def _size(plan: PlannedFile, tensors: Sequence[Tensor], model: Model) -> dict[str, Any]:
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


def _measure(
    settings: Settings,
    quality: dict[str, Any],
    files: dict[str, Path],
    folder: Path,
    held_out: list[str],
    tensors: list[Tensor],
) -> None:
    """Add every file's perplexity, KL divergence and agreement to `quality`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = read_config(folder)
    # Longer texts would take longrope's other factors, and another model would be measured.
    longest = min(config.original_max_position_embeddings, settings.training.sequence_length)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in held_out]
    texts = take_tokens(ids, settings.gguf.quality_tokens, longest)
    if not texts:
        raise StageError(f"{STAGE}: 01_dataset/eval.jsonl holds no text of two tokens; run 01_dataset again")
    quality["held_out"] = {"texts": len(texts), "tokens": sum(len(t) for t in texts)}
    quality["reference"] = "f16" if "f16" in files else "the model folder"
    others = [kind for kind in files if kind != "f16"]
    with progress(settings, STAGE, (len(others) + 1) * config.num_hidden_layers, "layer", "measure") as bar:
        source = gguf_weights(files["f16"]) if "f16" in files else checkpoint_weights(tensors)
        reference = run_texts(config, source, texts, bar.update)
        quality["files"].get("f16", {}).update(compare(reference, reference))
        for kind in others:
            states = run_texts(config, gguf_weights(files[kind]), texts, bar.update)
            quality["files"][kind].update(compare(states, reference))


def _facts(quality: dict[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for kind, entry in quality["files"].items():
        facts[f"{kind} MiB"] = round(entry["bytes"] / 2**20, 1)
        if "kl_mean" in entry and kind != "f16":
            facts[f"{kind} KL from F16"] = f"{entry['kl_mean']:.2e}"
    return facts
