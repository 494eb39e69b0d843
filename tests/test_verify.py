"""The walk back from a GGUF: it reaches the input lines, and names the first link that was tampered with."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from so8t_helpers.demo.tokenizer import ADDED_TOKENS, CHAT_TEMPLATE
from so8t_helpers.run import files, origin
from so8t_helpers.run import stage as run_stage
from so8t_helpers.settings import Settings, SettingsError, validate
from so8t_helpers.verbs.verify import walk_back

LINES = ['{"instruction": "一"}', "broken", '{"instruction": "二"}', '{"instruction": "三"}']


def make_run(tmp_path: Path) -> Path:
    """A run whose manifests are made by the stages' own code, around files of a few bytes."""
    settings = validate({"run": {"name": "t", "root": str(tmp_path / "runs")}}, "test")
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    source = tmp_path / "records.jsonl"
    source.write_bytes("\r\n".join(LINES).encode() + b"\n")
    _dataset(settings, source)
    run = settings.run_dir
    with run_stage.open_stage(settings, "02_train") as stage:
        stage.read_file("01_dataset/train.jsonl", run / "01_dataset/train.jsonl")
        stage.read_file("base/config.json", base / "config.json")
        _write(stage.directory / "adapter" / "adapter_model.safetensors", "adapter")
        _write(stage.directory / "adapter" / "so8t_gates.safetensors", "gates")
    with run_stage.open_stage(settings, "03_bake") as stage:
        stage.read_file("base/config.json", base / "config.json")
        stage.read_file("01_dataset/eval.jsonl", run / "01_dataset/eval.jsonl")
        for name in ("adapter_model.safetensors", "so8t_gates.safetensors"):
            stage.read_file(f"02_train/adapter/{name}", run / "02_train/adapter" / name)
        _write(stage.directory / "model" / "model.safetensors", "baked")
        files.write_json(stage.directory / "model" / origin.FILE, origin.of_bake(settings, stage))
    with run_stage.open_stage(settings, "04_gguf") as stage:
        for name in ("model.safetensors", origin.FILE):
            stage.read_file(f"03_bake/model/{name}", run / "03_bake/model" / name)
        write_gguf(stage.directory / "t-f16.gguf", (run / "03_bake/model" / origin.FILE).read_text("utf-8"))
    return run


def _dataset(settings: Settings, source: Path) -> None:
    digests = [hashlib.sha256(line.encode()).hexdigest() for line in LINES]
    with run_stage.open_stage(settings, "01_dataset") as stage:
        stage.read_file("input/records.jsonl", source)
        for name, numbers in (("train", (1, 4)), ("eval", (3,))):
            rows = [
                {"source": {"file": "records.jsonl", "line": n, "sha256": digests[n - 1]}} for n in numbers
            ]
            files.write_jsonl(stage.directory / f"{name}.jsonl", rows)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_gguf(path: Path, provenance: str | None) -> None:
    writer = gguf.GGUFWriter(path, "phi3")
    if provenance is not None:
        writer.add_string(origin.GGUF_KEY, provenance)
    writer.add_chat_template(CHAT_TEMPLATE)
    writer.add_token_list(ADDED_TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL] * len(ADDED_TOKENS))
    writer.add_eos_token_id(0)
    writer.add_tensor("x", np.zeros(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def append(name: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        with (run / name).open("a", encoding="utf-8") as file:
            file.write(" ")

    return change


def edit_line(run: Path) -> None:
    path = run.parents[1] / "records.jsonl"
    path.write_bytes(path.read_bytes().replace("三".encode(), "四".encode()))


def edit_manifest(stage: str, label: str, digest: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        path = run / stage / "manifest.json"
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest["inputs"][label]["sha256"] = digest
        files.write_json(path, manifest)

    return change


def retrain_on_other_data(run: Path) -> None:
    """Another dataset with a manifest in order: only 02_train's record of what it read gives it away."""
    rows = run / "01_dataset" / "train.jsonl"
    rows.write_text(rows.read_text(encoding="utf-8").splitlines(keepends=True)[0])
    path = run / "01_dataset" / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["outputs"]["train.jsonl"] = files.sha256_file(rows)
    files.write_json(path, manifest)


def other_settings(run: Path) -> None:
    path = run / "02_train" / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["settings"]["lora.r"] = 8
    files.write_json(path, manifest)


def test_an_untouched_run_and_its_gguf_hold(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for target in (run, run / "04_gguf" / "t-f16.gguf"):
        result = walk_back(target)
        assert result.broken is None, result.broken
        assert result.links[-1].name == "01_dataset read input/records.jsonl: unchanged since"
        assert "records.jsonl: input lines" in {link.name for link in result.links}


@pytest.mark.parametrize(
    ("change", "first"),
    [
        (append("04_gguf/t-f16.gguf"), "t-f16.gguf: as 04_gguf left it"),
        (
            append("03_bake/model/model.safetensors"),
            "04_gguf read 03_bake/model/model.safetensors: unchanged",
        ),
        (append("02_train/adapter/so8t_gates.safetensors"), "03_bake read 02_train/adapter/so8t_gates"),
        (append("../../base/config.json"), "03_bake read base/config.json: unchanged"),
        (append("01_dataset/train.jsonl"), "02_train read 01_dataset/train.jsonl: unchanged"),
        (retrain_on_other_data, "02_train read 01_dataset/train.jsonl: unchanged"),
        (other_settings, "03_bake/model/so8t_provenance.json: hash of settings"),
        (
            edit_manifest("02_train", "01_dataset/train.jsonl", "0" * 64),
            "03_bake/model/so8t_provenance.json: hash of",
        ),
        (
            edit_manifest("03_bake", "base/config.json", "0" * 64),
            "03_bake/model/so8t_provenance.json: hash of base",
        ),
        (
            lambda run: (run / "02_train/manifest.json").unlink(),
            "03_bake/model/so8t_provenance.json: hash of dataset",
        ),
        (
            lambda run: (run / "01_dataset/manifest.json").unlink(),
            "03_bake read 01_dataset/eval.jsonl: what 01",
        ),
        (edit_line, "records.jsonl: input lines"),
        (lambda run: (run.parents[1] / "records.jsonl").unlink(), "records.jsonl: input file"),
    ],
)
def test_the_first_broken_link_is_named(tmp_path: Path, change: Callable[[Path], None], first: str) -> None:
    run = make_run(tmp_path)
    change(run)
    broken = walk_back(run / "04_gguf" / "t-f16.gguf").broken
    assert broken is not None and broken.name.startswith(first), broken
    assert walk_back(run).broken is not None


def test_a_changed_line_is_named_by_its_number(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    edit_line(run)
    broken = walk_back(run).broken
    assert broken is not None and broken.found == "line 4 is not the one that was read"


def test_a_gguf_of_another_run_in_place_is_found(tmp_path: Path) -> None:
    """Same manifest for the file, but the hashes inside it are those of another adapter."""
    run = make_run(tmp_path)
    path = run / "04_gguf" / "t-f16.gguf"
    carried = json.loads((run / "03_bake/model" / origin.FILE).read_text(encoding="utf-8"))
    carried["sha256"]["adapter"] = "0" * 64
    write_gguf(path, json.dumps(carried))
    manifest = json.loads((run / "04_gguf/manifest.json").read_text(encoding="utf-8"))
    manifest["outputs"][path.name] = files.sha256_file(path)
    files.write_json(run / "04_gguf/manifest.json", manifest)
    broken = walk_back(path).broken
    assert broken is not None and broken.name == "GGUF key so8t.provenance: hash of adapter"


def test_a_dataset_without_its_rows_is_a_broken_link(tmp_path: Path) -> None:
    settings = validate({"run": {"name": "t", "root": str(tmp_path / "runs")}}, "test")
    with run_stage.open_stage(settings, "01_dataset") as stage:
        _write(stage.directory / "out.txt", "rows of another kind")
    broken = walk_back(settings.run_dir).broken
    assert broken is not None and broken.name == "01_dataset: rows"
    assert "has no train.jsonl; run 01_dataset again" in broken.found


def test_files_without_a_run_say_so(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    stranger = tmp_path / "stranger.gguf"
    write_gguf(stranger, None)
    assert "not made by a run" in str(walk_back(stranger).broken)
    copy = tmp_path / "copy.gguf"
    shutil.copy(run / "04_gguf" / "t-f16.gguf", copy)
    assert "where 04_gguf left it" in str(walk_back(copy).broken)
    with pytest.raises(SettingsError, match="expected a run folder"):
        walk_back(tmp_path)
