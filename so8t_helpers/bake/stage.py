"""03_bake: base, adapter and gates become one plain Phi3 folder, with the proof that it is the same model."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from so8t_helpers.bake import folder as model_folder
from so8t_helpers.bake.proof import prove
from so8t_helpers.bake.rows import bake_checkpoint, plan_changes
from so8t_helpers.phi3.lora_folder import CONFIG_FILE, WEIGHTS_FILE, StoredLora, read_adapter
from so8t_helpers.phi3.source import base_folder
from so8t_helpers.phi3.stream import read_config
from so8t_helpers.phi3.weights import TensorPlace, read_checkpoint
from so8t_helpers.run import origin
from so8t_helpers.run.files import StageError, atomic_directory, check_disk, read_jsonl, write_json
from so8t_helpers.run.progress import progress
from so8t_helpers.run.stage import Stage, open_stage, stage_input
from so8t_helpers.settings import Settings
from so8t_helpers.so8 import rotation

STAGE = "03_bake"
_SHORTEST_TEXT = 2  # tokens; one alone has no context


@dataclass(frozen=True)
class Ingredients:
    """What a bake reads, all checked before any long work.

    Attributes:
        base: the base's folder. weights: its tensors. pairs: LoRA by tensor name. gates: None without.
        texts: token ids of the held-out texts. dataset_card: what 01_dataset says of its data.
    """

    base: Path
    weights: dict[str, TensorPlace]
    pairs: dict[str, StoredLora]
    gates: rotation.Gates | None
    texts: list[list[int]]
    dataset_card: dict[str, Any] | None


@dataclass(frozen=True)
class BakeResult:
    """The baked folder and its proof (the content of proof.json)."""

    model_dir: Path
    proof: dict[str, Any]


def bake(settings: Settings) -> BakeResult:
    """Bake this run's adapter and gates onto the 16-bit base, prove it, and leave `03_bake/model`.

    Raises:
        StageError: an input is missing or does not fit, or a bound of the proof does not hold; then no baked
            folder is left, and proof.json says what was measured.
    """
    with open_stage(settings, STAGE) as stage:
        _clear(stage.directory)
        ingredients = read_ingredients(settings, stage)
        size = sum(place.nbytes for place in ingredients.weights.values())
        check_disk(stage.directory, size, "the baked model")
        with atomic_directory(stage.directory / "model") as scratch:
            proof = _bake_into(scratch, settings, stage, ingredients, size)
            write_json(stage.directory / "proof.json", proof)
            if proof["broken"]:
                raise StageError(
                    f"{STAGE}: the proof does not hold: {'; '.join(proof['broken'])}; no baked folder is "
                    f"left, see {stage.directory / 'proof.json'}. If the logits alone break their bound and "
                    "every layer holds its own, float32 weights round more at this depth: raise "
                    "bake.logit_bound"
                )
        stage.facts |= _facts(proof)
        return BakeResult(stage.directory / "model", proof)


def read_ingredients(settings: Settings, stage: Stage) -> Ingredients:
    """Find, check and register everything that a bake reads.

    Raises:
        StageError: something is missing or belongs to another base model.
    """
    base = base_folder(settings)
    read_config(base)  # refuses other architectures
    weights = read_checkpoint(base)
    for name, path in model_folder.base_files(base, {place.path for place in weights.values()}).items():
        stage.read_file(f"base/{name}", path)
    adapter = stage_input(settings, settings.bake.adapter_dir, "02_train", "adapter")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        stage.read_file(f"02_train/adapter/{name}", adapter / name, "run 02_train, or set bake.adapter_dir")
    dataset = stage_input(settings, settings.training.dataset_dir, "01_dataset")
    eval_file = stage.read_file(
        "01_dataset/eval.jsonl", dataset / "eval.jsonl", "the proof reads held-out texts"
    )
    card = dataset / "card.json"
    if card.is_file():
        stage.read_file("01_dataset/card.json", card)
    return Ingredients(
        base,
        weights,
        read_adapter(adapter, weights),
        _read_gates(settings, stage, adapter),
        _read_texts(settings, base, eval_file),
        json.loads(card.read_text(encoding="utf-8")) if card.is_file() else None,
    )


def broken_bounds(proof: dict[str, Any], settings: Settings) -> list[str]:
    """Say which bounds a proof breaks, one sentence each; a figure that is not a number breaks its bound."""
    logit_bound, layer_bound = settings.bake.logit_bound, settings.bake.layer_bound
    figures = [
        ("bake.logit_bound", "logits, gated against baked", proof["logits"]["baking"]["largest"], logit_bound)
    ]
    for layer in proof["layers"]:
        name = f"layer {layer['layer']}"
        figures.append(
            ("bake.logit_bound", f"{name}, o_proj's output", layer["o_proj_difference"], logit_bound)
        )
        for key in ("orthogonality", "determinant"):
            if layer[key] is not None:
                figures.append(("bake.layer_bound", f"{name}, {key} of R", layer[key], layer_bound))
    for weight in proof["weights"]:
        name = f"layer {weight['layer']}, {weight['module']}'s weight against float64"
        figures.append(("bake.layer_bound", name, weight["baked_error"], layer_bound))
    return [
        f"{what}: {value:.3e} > {key} {bound:.0e}"
        for key, what, value, bound in figures
        if not value <= bound
    ]


def _bake_into(
    scratch: Path, settings: Settings, stage: Stage, ingredients: Ingredients, size: int
) -> dict[str, Any]:
    weights, gates = ingredients.weights, ingredients.gates
    changes = plan_changes(weights, ingredients.pairs, gates)
    model_folder.write_side_files(ingredients.base, scratch)
    shard_bytes = int(settings.bake.max_shard_gib * 2**30)
    with progress(settings, STAGE, size // 2**20, "MiB", "bake") as bar:
        stored = bake_checkpoint(weights, changes, scratch, shard_bytes, bar.update_bytes)
    config = read_config(scratch)
    with progress(settings, STAGE, config.num_hidden_layers, "layer", "prove") as bar:
        proof = prove(config, weights, changes, gates, stored, ingredients.texts, bar)
    bounds = {"logits": settings.bake.logit_bound, "layers": settings.bake.layer_bound}
    broken = broken_bounds(proof, settings)
    proof = {"holds": not broken, "broken": broken, "bounds": bounds, **proof}
    carried = origin.of_bake(settings, stage)
    write_json(scratch / origin.FILE, carried)
    what = f"LoRA on {len(ingredients.pairs)} weights"
    what += f", SO(8) rotations in {len(gates.layers)} layers" if gates else ", no rotations"
    model_folder.write_card(
        scratch, ingredients.base / "README.md", carried, what, ingredients.dataset_card, proof
    )
    return proof


def _read_gates(settings: Settings, stage: Stage, adapter: Path) -> rotation.Gates | None:
    path = adapter / rotation.GATES_FILE
    if path.is_file() != settings.so8t.enabled:
        found = "is there" if path.is_file() else "is missing"
        raise StageError(
            f"{path}: {found}, but so8t.enabled is {settings.so8t.enabled}; baking LoRA without the gates it "
            "was trained with gives another model. Set so8t.enabled as in the training, or train again"
        )
    if not settings.so8t.enabled:
        return None
    return rotation.load_gates(stage.read_file(f"02_train/adapter/{rotation.GATES_FILE}", path))


def _read_texts(settings: Settings, base: Path, eval_file: Path) -> list[list[int]]:
    rows = read_jsonl(eval_file)[: settings.bake.proof_texts]
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = [
        tokenizer(row["text"], add_special_tokens=False)["input_ids"][: settings.bake.proof_tokens]
        for row in rows
    ]
    texts = [ids for ids in texts if len(ids) >= _SHORTEST_TEXT]
    if not texts:
        raise StageError(f"{eval_file}: holds no text; the proof needs held-out texts, run 01_dataset again")
    return texts


def _clear(directory: Path) -> None:
    """Remove what an earlier bake or a killed one left: a failed stage must leave no baked folder."""
    for path in (directory / "model", *directory.glob(".model.*.tmp")):
        shutil.rmtree(path, ignore_errors=True)
    (directory / "proof.json").unlink(missing_ok=True)


def _facts(proof: dict[str, Any]) -> dict[str, Any]:
    logits = proof["logits"]
    return {
        "logit difference of baking": f"{logits['baking']['largest']:.1e}",
        "logit difference of rounding": f"{logits['rounding']['largest']:.1e}",
        "next-token agreement": round(logits["both"]["next_token_agreement"], 4),
        "gated layers": len(proof["gated_layers"]),
    }
