"""What a study trains on, tunes by and is judged by: three sets that share no record."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from so8t_helpers import demo
from so8t_helpers.dataset import stage as dataset_stage
from so8t_helpers.phi3.source import base_folder
from so8t_helpers.run.files import StageError, read_jsonl, run_hashes, sha256_file, write_jsonl
from so8t_helpers.run.stage import stage_input, stale_reason
from so8t_helpers.study.plan import Study

PARTS = ("tuning", "held-out")  # what a training is judged by


@dataclass(frozen=True)
class Data:
    """Files of rows, and hashes that stand for them in a training's key.

    Attributes:
        train: what all trainings learn from. judges: by the names in `PARTS`.
        base: the base model's folder. digests: SHA-256 of each, by "train", "base" and the names in `PARTS`.
    """

    train: Path
    judges: dict[str, Path]
    base: Path
    digests: dict[str, str]


def prepare(study: Study) -> Data:
    """Make base, data set and tuning split where they are missing, and return where they lie.

    Raises:
        SettingsError, StageError: the profile's data cannot be made, or there is nothing to judge by.
    """
    settings = study.settings
    demo.prepare(settings)
    if settings.training.dataset_dir is None and stale_reason(settings, "01_dataset"):
        dataset_stage.build(settings)
    source = stage_input(settings, settings.training.dataset_dir, "01_dataset")
    for name in ("train.jsonl", "eval.jsonl"):
        if not (source / name).is_file():
            raise StageError(f"{study.path}: no {name} in {source}; a study needs samples and held-out ones")
    rows, held_out = read_jsonl(source / "train.jsonl"), read_jsonl(source / "eval.jsonl")
    tuning = [row for row in rows if for_tuning(row, study.file.tuning)]
    training = [row for row in rows if not for_tuning(row, study.file.tuning)]
    if not (tuning and training and held_out):
        raise StageError(
            f"{study.path}: {len(training)} samples to train on, {len(tuning)} to tune by, {len(held_out)} "
            "held out; a study needs all three: raise `tuning` or dataset.eval_share, or bring more records"
        )
    folder = study.folder / "data"
    for name, some in (("train", training), ("tuning", tuning), ("eval", held_out)):
        write_jsonl(folder / f"{name}.jsonl", some)
    files = {"train": folder / "train.jsonl", "tuning": folder / "tuning.jsonl"}
    files["held-out"] = folder / "eval.jsonl"  # beside the others: a folder that 02 to 05 can read
    base = base_folder(settings)
    digests = {name: sha256_file(path) for name, path in files.items()}
    digests["base"] = _folder_digest(study, base)
    return Data(files["train"], {part: files[part] for part in PARTS}, base, digests)


def for_tuning(row: dict[str, Any], share: float) -> bool:
    """Whether a row of train.jsonl is held out for tuning: by a hash of what it says, whatever its place."""
    text = "\n".join(message["content"] for message in row["messages"])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < share * 2**64


def _folder_digest(study: Study, folder: Path) -> str:
    """Hash of all that a training reads of a base: configuration, tokenizer and weights."""
    digest = hashlib.sha256()
    with run_hashes(study.settings) as cache:
        for path in sorted(folder.iterdir()):
            if path.suffix in {".json", ".safetensors", ".model", ".jinja"}:
                digest.update(f"{path.name} {cache.sha256(path)}\n".encode())
    return digest.hexdigest()
