"""What a profile will need: bytes on which disk, memory on the card; estimated from the base's size."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

from so8t_helpers.dataset.inputs.files import entries
from so8t_helpers.gguf.types import bytes_per_weight
from so8t_helpers.phi3.source import hub_cache, imported_bytes, local_base
from so8t_helpers.run.files import check_disk
from so8t_helpers.run.machine import check_place
from so8t_helpers.run.origin import llama_source
from so8t_helpers.run.patterns import matching
from so8t_helpers.run.stage import STAGES, manifest_path, stage_input
from so8t_helpers.settings import Settings, resolve

_ROOMS = dict(zip(STAGES, ("dataset", "train", "bake", "gguf", "evaluate"), strict=True))
GIB = 2**30
# Phi-3.5-mini, which a hub id stands for before it has been downloaded: 3.82 G weights of 16 bits.
PHI35_BYTES = 7_642_159_104
_PHI35 = {
    "model_type": "phi3",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 131072,
    "vocab_size": 32064,
}
DEMO_BYTES = 16_000_000
# Peak on the card with everything recomputed (benchmarks/results/train_gpu.json): 4.80 GiB at 2,048 tokens
# and 9.00 GiB at 49,152 in 8-bit; 4-bit weights take half.
TOKEN_BYTES = (9.00 - 4.80) * GIB / (49152 - 2048)
WEIGHT_BYTES = {"int8": 1.0, "nf4": 0.55, "none": 2.0}


@dataclass(frozen=True)
class Needs:
    """Estimated bytes."""

    run: int  # what the stages will add to the run folder
    download: int  # what the hub's cache will grow by
    training: int  # memory that 02_train takes on a card
    base_known: bool  # False where the base's size had to be assumed


def estimate(settings: Settings, stages: tuple[str, ...] = STAGES) -> Needs:
    """Estimate what the stages will need; what exists already is not counted again."""
    size, present = base_bytes(settings)
    weights = size / 2
    # LoRA on the four fused linears of Phi-3.5 with r=64 is 101 M weights to 3.82 G; linear in r.
    lora = 4 * weights * 0.0263 * settings.lora.r / 64
    files = sum(bytes_per_weight(kind) for kind in settings.gguf.types) * weights
    parts = {
        "01_dataset": 3 * _input_bytes(settings),
        "02_train": lora * (1 + 2 * settings.training.keep_checkpoints),  # the adapter, and states
        "03_bake": float(size),
        "04_gguf": files,
        "05_ollama_eval": files,  # Ollama keeps its own copy of each file it serves
    }
    tokens = settings.training.sequence_length * settings.training.batch_size
    share = weights / (PHI35_BYTES / 2)
    # LoRA, its gradient, and two bytes of optimizer state for four of a weight.
    training = WEIGHT_BYTES[settings.model.quantization] * weights + 2.5 * lora + tokens * TOKEN_BYTES * share
    return Needs(
        run=int(sum(parts[stage] for stage in stages if not manifest_path(settings, stage).is_file())),
        download=0 if present else size,
        training=int(training),
        base_known=present,
    )


def host_memory(settings: Settings) -> int:
    """Estimate the RAM that 02_train takes where there is no card.

    A base that is not here yet is taken as Phi-3.5-mini. Torch and the training's room are imported here.

    Raises:
        SettingsError: the base's config.json is none of a Phi3.
    """
    from so8t_helpers.phi3.shape import read_shape, shape_of  # noqa: PLC0415
    from so8t_helpers.train import machine  # noqa: PLC0415

    config = next(_base_place(settings).glob("**/config.json"), None)
    if config is not None:
        shape = read_shape(config.parent)
    elif settings.model.base == "demo":
        from so8t_helpers.demo.base_model import CONFIG  # noqa: PLC0415

        shape = shape_of(CONFIG, Path("demo"))
    else:
        shape = shape_of(_PHI35, Path("Phi-3.5-mini"))
    rows = stage_input(settings, settings.training.dataset_dir, "01_dataset") / "train.jsonl"
    size = rows.stat().st_size if rows.is_file() else 3 * _input_bytes(settings)
    return machine.host_memory(shape, settings) + int(2 * size)  # the rows as Python's objects, and tokens


def check_stage(settings: Settings, stage: str) -> None:
    """Raise SettingsError or StageError for what would stop a stage, as far as it can be known now.

    The stage's room is imported here: most bring torch along.
    """
    importlib.import_module(f"so8t_helpers.{_ROOMS[stage]}.stage").check(settings)


def check_places(settings: Settings) -> None:
    """Raise MachineError before the start where a folder that a run writes in cannot be written."""
    places = {"run.root": settings.run_dir, "run.reports_root": settings.reports_dir}
    places |= {f"cache.{key}": resolve(value) for key, value in settings.cache if value is not None}
    for key, folder in places.items():
        check_place(folder, key)


def check_room(settings: Settings, stages: tuple[str, ...]) -> None:
    """Raise StageError before the start when a disk lacks room for what the stages will write."""
    needs = estimate(settings, stages)
    if needs.run:
        check_disk(settings.run_dir, needs.run, f"run {settings.run.name}")
    if needs.download:
        check_disk(hub_cache(settings), needs.download, f"downloading {settings.model.base}")


def base_bytes(settings: Settings) -> tuple[int, bool]:
    """Return the size of the base's 16-bit weights, and whether they are on this machine already."""
    if settings.model.base == "demo":
        return DEMO_BYTES, True
    if local_base(settings) is None and (source := llama_source(settings.model.base)):
        return imported_bytes(source) if source.exists() else 0, True  # what is not there stops the run
    size = sum(path.stat().st_size for path in _base_place(settings).glob("**/*.safetensors"))
    return (size, True) if size else (PHI35_BYTES, False)


def _base_place(settings: Settings) -> Path:
    """Return the base's folder, or where the hub's snapshots of it lie; it need not be there."""
    cached = hub_cache(settings) / f"models--{settings.model.base.replace('/', '--')}" / "snapshots"
    return local_base(settings) or cached


def _input_bytes(settings: Settings) -> float:
    """Return the size of the input files, the demo's as they will be."""
    files = [file for entry in entries(settings) for file in matching(entry.path)]
    demo = 2_000_000 * settings.dataset.inputs.count("demo")
    return float(demo + sum(file.stat().st_size for file in files))
