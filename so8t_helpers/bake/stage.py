"""03_bake: base, adapter and gates become one plain Phi3 folder, with the proof that it is the same model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from so8t_helpers.bake import folder as model_folder
from so8t_helpers.bake.proof import prove
from so8t_helpers.bake.rows import bake_checkpoint, plan_changes
from so8t_helpers.phi3.folder import check_folder
from so8t_helpers.phi3.lora_folder import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from so8t_helpers.phi3.source import base_commit, base_folder, check_base, source_files
from so8t_helpers.phi3.stream import read_config
from so8t_helpers.phi3.tokenizer_files import load_tokenizer
from so8t_helpers.phi3.weights import TensorPlace
from so8t_helpers.run import origin
from so8t_helpers.run.files import (
    StageError,
    atomic_directory,
    check_disk,
    read_json,
    read_jsonl,
    remove,
    write_json,
)
from so8t_helpers.run.progress import Progress
from so8t_helpers.run.stage import Stage, open_stage, other_input, stage_input, stale_reason
from so8t_helpers.settings import Settings, SettingsError
from so8t_helpers.so8 import rotation

STAGE = "03_bake"
_SHORTEST_TEXT = 2  # tokens; one alone has no context


@dataclass(frozen=True)
class BakeResult:
    """The baked folder and its proof (the content of proof.json)."""

    model_dir: Path
    proof: dict[str, Any]


def check(settings: Settings) -> None:
    """Look at base, adapter and data set, as far as they are here; nothing is made, fetched or written.

    Raises:
        SettingsError, StageError: a file is missing, or does not fit the others and the settings.
    """
    stage, base = Stage(settings, STAGE), check_base(settings)
    weights = None if base is None else _read_base(base)
    adapter, dataset = other_input(settings, STAGE), other_input(settings, "02_train")
    if dataset is not None:
        read_jsonl(_held_out(stage, dataset), "text")
    elif (own := settings.run_dir / "01_dataset/eval.jsonl").is_file():
        if own.stat().st_size == 0 and stale_reason(settings, "01_dataset") is None:
            raise StageError(
                f"{own}: holds no row, and the proof of a bake reads held-out texts; bring more records, or "
                "raise dataset.eval_share"
            )
    elif settings.dataset.eval_share == 0.0:
        raise SettingsError("dataset.eval_share: 0 leaves no held-out text, which the proof of a bake reads")
    if adapter is not None:
        _register_adapter(stage, adapter)
        gates = _read_gates(settings, stage, adapter)
        if weights is not None:
            plan_changes(weights, read_adapter(adapter, weights), gates)


def bake(settings: Settings) -> BakeResult:
    """Bake this run's adapter and gates onto the 16-bit base, prove it, and leave `03_bake/model`.

    Raises:
        StageError: an input is missing or does not fit, or a bound of the proof does not hold; then no baked
            folder is left, and proof.json says what was measured.
    """
    with open_stage(settings, STAGE) as stage:
        # What an earlier bake or a killed one left: a failed stage must leave no baked folder.
        for path in (stage.directory / "model", *stage.directory.glob(".model.*.tmp")):
            remove(path)
        remove(stage.directory / "proof.json")
        weights = _read_base(base := base_folder(settings))
        adapter, texts, card = _read_inputs(settings, stage, base, weights)
        lora, gates = read_adapter(adapter, weights), _read_gates(settings, stage, adapter)
        changes = plan_changes(weights, lora, gates)
        size = sum(place.nbytes for place in weights.values())
        check_disk(stage.directory, size, "the baked model")
        with atomic_directory(stage.directory / "model") as scratch:
            model_folder.write_side_files(base, scratch)
            with Progress(settings, STAGE, size // 2**20, "MiB", "bake") as bar:
                shard_bytes = int(settings.bake.max_shard_gib * 2**30)
                stored = bake_checkpoint(weights, changes, scratch, shard_bytes, bar.update_bytes)
            config = read_config(scratch)
            with Progress(settings, STAGE, config.num_hidden_layers, "layer", "prove") as bar:
                proof = prove(config, weights, changes, gates, stored, texts, bar)
            proof = _against_bounds(proof, settings)
            write_json(stage.directory / "proof.json", proof)
            if proof["broken"]:
                raise StageError(
                    f"{STAGE}: the proof does not hold: {'; '.join(proof['broken'])}; no baked folder is "
                    f"left, see {stage.directory / 'proof.json'}. If the logits alone break their bound and "
                    "every layer holds its own, float32 weights round more at this depth: raise "
                    "bake.logit_bound"
                )
            carried = origin.of_bake(settings, stage, base_commit(base))
            write_json(scratch / origin.FILE, carried)
            rotated = f"SO(8) rotations in {len(gates.layers)} layers" if gates else "no rotations"
            made_by = f"LoRA on {len(lora)} weights, {rotated}"
            model_folder.write_card(scratch, base / "README.md", carried, made_by, card, proof)
        logits = proof["logits"]
        stage.facts |= {
            "logit difference of baking": f"{logits['baking']['largest']:.1e}",
            "logit difference of rounding": f"{logits['rounding']['largest']:.1e}",
            "next-token agreement": round(logits["both"]["next_token_agreement"], 4),
            "gated layers": len(proof["gated_layers"]),
        }
        return BakeResult(stage.directory / "model", proof)


def _read_base(base: Path) -> dict[str, TensorPlace]:
    """Return the places of the base's tensors. Raises StageError: no Phi3, quantised, or a file missing."""
    model_folder.base_files(base, [])
    model_folder.baked_config(read_json(base / "config.json"), base)
    return check_folder(base)[1]


def _register_adapter(stage: Stage, adapter: Path) -> None:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        stage.read_file(f"02_train/adapter/{name}", adapter / name, "run 02_train, or set bake.adapter_dir")


def _held_out(stage: Stage, dataset: Path) -> Path:
    return stage.read_file(
        "01_dataset/eval.jsonl", dataset / "eval.jsonl", "the proof reads them: dataset.eval_share"
    )


def _read_inputs(
    settings: Settings, stage: Stage, base: Path, weights: dict[str, TensorPlace]
) -> tuple[Path, list[list[int]], dict[str, Any] | None]:
    """Register what a bake reads but the gates; return the adapter's folder, held-out texts, dataset card."""
    for name, path in model_folder.base_files(base, {place.path for place in weights.values()}).items():
        stage.read_file(f"base/{name}", path)
    stage.inputs |= source_files(settings)
    adapter = stage_input(settings, settings.bake.adapter_dir, "02_train", "adapter")
    _register_adapter(stage, adapter)
    dataset = stage_input(settings, settings.training.dataset_dir, "01_dataset")
    eval_file = _held_out(stage, dataset)
    card, path = None, dataset / "card.json"
    if path.is_file():
        card = read_json(stage.read_file("01_dataset/card.json", path))
    return adapter, _read_texts(settings, base, eval_file), card


def _against_bounds(proof: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Return the proof with its bounds and a sentence for each that breaks; NaN breaks its bound."""
    bounds = {"logits": settings.bake.logit_bound, "layers": settings.bake.layer_bound}
    broken: list[str] = []

    def check(what: str, value: float, kind: str) -> None:
        if not value <= bounds[kind]:
            broken.append(f"{what}: {value:.3e} > bake.{kind.removesuffix('s')}_bound {bounds[kind]:.0e}")

    check("logits, gated against baked", proof["logits"]["baking"]["largest"], "logits")
    for facts in proof["layers"]:
        name = f"layer {facts['layer']}"
        check(f"{name}, o_proj's output", facts["o_proj_difference"], "logits")
        for key in ("orthogonality", "determinant"):
            if facts[key] is not None:
                check(f"{name}, {key} of R", facts[key], "layers")
    for weight in proof["weights"]:
        name = f"layer {weight['layer']}, {weight['module']}'s weight against float64"
        check(name, weight["baked_error"], "layers")
    return {"holds": not broken, "broken": broken, "bounds": bounds, **proof}


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
    rows = read_jsonl(eval_file, "text")[: settings.bake.proof_texts]
    tokenizer = load_tokenizer(base)
    ids = [tokenizer(row["text"], add_special_tokens=False)["input_ids"] for row in rows]
    texts = [text[: settings.bake.proof_tokens] for text in ids if len(text) >= _SHORTEST_TEXT]
    if not texts:
        raise StageError(f"{eval_file}: holds no text; the proof needs held-out texts, run 01_dataset again")
    return texts
