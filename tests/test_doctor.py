"""What would stop a stage is said by `so8t doctor`, and by `so8t run` before anything is written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from so8t_helpers.__main__ import main
from so8t_helpers.run.files import StageError, write_jsonl
from so8t_helpers.run.stage import STAGES
from so8t_helpers.settings import PROJECT_ROOT, Settings, SettingsError, load_settings
from so8t_helpers.verbs.batch import preflight
from so8t_helpers.verbs.doctor import BAD, examine
from so8t_helpers.verbs.needs import check_stage, host_memory
from tests import bpe_folders
from tests.phi3_folders import small_folder

no_card = pytest.mark.skipif(torch.cuda.is_available(), reason="a card can do what these forbid")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a local base and one file of records, and what else a setting may name wrongly."""
    folder = tmp_path_factory.mktemp("doctor")
    small_folder(folder / "base")
    (folder / "records.jsonl").write_text('{"instruction": "1+1?", "output": "2"}\n', encoding="utf-8")
    (folder / "page.jsonl").write_text("<!DOCTYPE html>\n<title>Not found</title>\n", encoding="utf-8")
    for name in ("empty", "other", "bare", "quantised"):
        (folder / name).mkdir()
    (folder / "other" / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    for path in (folder / "base").iterdir():
        for name in ("bare", "quantised"):
            if (name, path.name) != ("bare", "tokenizer.model"):
                (folder / name / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "base" / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"bits": 4}
    (folder / "quantised" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    bpe_folders.small_phi4_mini(folder / "odd")
    odd = folder / "odd" / "tokenizer.json"
    odd.write_text(odd.read_text(encoding="utf-8").replace("{1,3}", "{1,4}"), encoding="utf-8")
    return folder


def overrides(here: Path, tmp_path: Path) -> dict[str, dict[str, Any]]:
    return {
        "run": {"root": str(tmp_path / "runs"), "reports_root": str(tmp_path / "reports")},
        "dataset": {"inputs": [str(here / "records.jsonl")]},
        "model": {"base": str(here / "base")},
    }


def as_options(chosen: dict[str, dict[str, Any]]) -> list[str]:
    pairs = [(f"{section}.{key}", value) for section, keys in chosen.items() for key, value in keys.items()]
    return [part for key, value in pairs for part in ("--set", f"{key}={json.dumps(value)}")]


@no_card
def test_fp16_without_a_card_is_a_problem_to_doctor_and_stops_a_run_before_it_begins(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    options = as_options(overrides(here, tmp_path))
    message = "training.precision: fp16 needs a CUDA card; use fp32 (or bf16) on the CPU"
    assert main(["doctor", "rtx3060", *options]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("PROBLEM")] == [f"PROBLEM  Training     {message}"]
    assert lines[-1] == "profile rtx3060: 1 problems"

    assert main(["run", "rtx3060", *options]) == 2
    assert capsys.readouterr().err == f"so8t run: {message}\n"
    assert list(tmp_path.iterdir()) == []

    assert main(["doctor", "rtx3060", *options, "--set", "training.precision=fp32"]) == 0


@pytest.mark.parametrize(
    ("stage", "section", "keys", "message"),
    [
        ("01", "dataset", {"inputs": ["nothing.jsonl"]}, "dataset.inputs: no file matches 'nothing.jsonl'"),
        ("01", "dataset", {"inputs": ["HERE/page.jsonl"]}, "page.jsonl: an HTML or XML page"),
        (
            "01",
            "dataset",
            {"nsfw_words": ["HERE/gone.tsv"]},
            "no file .*gone.tsv; dataset.nsfw_words names it",
        ),
        ("01", "dataset", {"nsfw_training": ["gone.jsonl"]}, "dataset.nsfw_training: no file matches"),
        ("01", "dataset", {"nsfw_model": "HERE/empty"}, "dataset.nsfw_model: no model folder"),
        ("01", "dataset", {"teacher": "HERE/empty"}, "dataset.teacher: neither a GGUF file nor"),
        ("01", "dataset", {"robots_dir": "HERE/gone"}, "dataset.robots_dir: no folder"),
        ("01", "model", {"base": "HERE/gone"}, "model.base: no folder .* is not a hub id"),
        ("01", "model", {"base": "HERE/other"}, "has no tokenizer.json"),
        ("02", "model", {"base": "HERE/other"}, "model_type is 'llama', expected 'phi3'"),
        ("02", "training", {"dataset_dir": "HERE/gone"}, "training.dataset_dir: no folder"),
        ("02", "training", {"dataset_dir": "HERE/empty"}, "missing input 01_dataset/train.jsonl"),
        ("02", "lora", {"target_modules": ["q_proj"]}, "matches no linear of Phi-3"),
        ("02", "so8t", {"layer_indices": [0, 9]}, r"\[9\]; the model has layers 0 to 1"),
        ("02", "training", {"continue_from": "HERE/empty"}, "training.continue_from: no adapter_model"),
        ("02", "training", {"keep": "best", "eval_steps": None}, "training.keep: best: needs held-out"),
        ("02", "training", {"patience": 2, "eval_steps": None}, "training.patience: needs held-out"),
        ("03", "bake", {"adapter_dir": "HERE/gone"}, "bake.adapter_dir: no folder"),
        ("03", "bake", {"adapter_dir": "HERE/empty"}, "missing input 02_train/adapter/adapter_config.json"),
        ("03", "training", {"dataset_dir": "HERE/empty"}, "missing input 01_dataset/eval.jsonl"),
        ("02", "dataset", {"eval_share": 1.0}, "dataset.eval_share: 1 holds every sample out"),
        ("03", "dataset", {"eval_share": 0.0}, "dataset.eval_share: 0 leaves no held-out text"),
        ("03", "model", {"base": "HERE/quantised"}, "this base is quantised"),
        ("04", "gguf", {"model_dir": "HERE/gone"}, "gguf.model_dir: no folder"),
        ("04", "gguf", {"model_dir": "HERE/empty"}, "missing input model/config.json"),
        ("04", "model", {"base": "HERE/bare"}, "model.base: .*bare has no tokenizer.model"),
        ("04", "model", {"base": "HERE/odd"}, "model.base: .*odd.tokenizer.json: .*is not known"),
        ("05", "eval", {"gguf_dir": "HERE/gone"}, "eval.gguf_dir: no folder"),
        ("05", "eval", {"gguf_dir": "HERE/empty"}, "holds no GGUF at all"),
        (
            "05",
            "eval",
            {"models": ["base", "q6_k"]},
            r"missing input 04_gguf/phi3-so8t-q6_k.gguf: gguf\.types has f16",
        ),
        (
            "05",
            "eval",
            {"engine": "ollama", "ollama_url": "http://127.0.0.1:9"},
            "eval.engine is ollama, but",
        ),
        ("05", "eval", {"harness_tasks": ["a"], "harness_dir": "HERE/gone"}, "eval.harness_"),
    ],
)
def test_what_would_stop_a_stage_is_known_before(
    here: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    section: str,
    keys: dict[str, Any],
    message: str,
):
    monkeypatch.setenv("PATH", "")  # no ollama in it
    monkeypatch.delenv("SO8T_OLLAMA", raising=False)
    chosen = overrides(here, tmp_path)
    named = json.loads(json.dumps(keys).replace("HERE", here.as_posix()))
    chosen[section] = chosen.get(section, {}) | named
    settings = load_settings("demo", chosen)
    name = next(name for name in STAGES if name.startswith(stage))
    with pytest.raises((SettingsError, StageError), match=message):
        check_stage(settings, name)
    assert list(tmp_path.iterdir()) == []


@no_card
@pytest.mark.parametrize(
    ("keys", "message"),
    [({"precision": "fp16"}, "fp16 needs a CUDA card"), ({"speed": "graph"}, "graph is not possible here")],
)
def test_what_the_machine_cannot_do_is_known_before(here: Path, tmp_path: Path, keys: dict, message: str):
    settings = load_settings("demo", {**overrides(here, tmp_path), "training": keys})
    with pytest.raises(SettingsError, match=message):
        preflight(settings, STAGES)


def test_fewer_cards_than_workers_are_known_before(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from so8t_helpers.train import workers

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    settings = load_settings("demo", {"run": {"processes": 2}})
    with pytest.raises(StageError, match=r"run.processes: 2 workers want a card each, this machine has 1"):
        workers.check_cards(settings)
    monkeypatch.setenv("WORLD_SIZE", "2")  # a worker itself starts none
    workers.check_cards(settings)


def problems(settings: Settings) -> list[str]:
    return [finding.subject for finding in examine(settings) if finding.state == BAD]


def test_what_a_run_will_make_or_fetch_first_is_no_problem(here: Path, tmp_path: Path):
    chosen = overrides(here, tmp_path)
    assert problems(load_settings("demo", chosen)) == []
    assert problems(load_settings("demo", {"run": chosen["run"]})) == [], "the demo's base is not there yet"
    hub = load_settings("demo", {"run": chosen["run"], "model": {"base": "owner/never-fetched"}})
    for stage in STAGES:
        check_stage(hub, stage)
    run = Path(chosen["run"]["root"]) / "demo"
    own = {
        "training": {"dataset_dir": str(run / "01_dataset")},
        "bake": {"adapter_dir": str(run / "02_train" / "adapter")},
        "gguf": {"model_dir": str(run / "03_bake" / "model")},
        "eval": {"gguf_dir": str(run / "04_gguf")},
    }
    preflight(load_settings("demo", {**chosen, **own}), STAGES)
    with pytest.raises(StageError, match="04_gguf reads 03_bake, which has not been completed"):
        preflight(load_settings("demo", {**chosen, **own}), STAGES[3:])
    assert list(tmp_path.iterdir()) == []


_TRAIN = """
import re, sys
from pathlib import Path
from so8t_helpers.settings import load_settings
from so8t_helpers.train.stage import train
from so8t_helpers.verbs.needs import host_memory

root, base, data, precision = sys.argv[1:]
chosen = {"dataset_dir": data, "precision": precision, "sequence_length": 512, "max_steps": 2}
model = {"base": base, "quantization": "none"}
settings = load_settings("demo", {"run": {"root": root}, "model": model, "training": chosen})
foreseen = host_memory(settings)
train(settings)
# Not getrusage: its ru_maxrss outlives exec, and so has the size of the process that started this one.
most = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
print("measured", foreseen / (int(most[1]) * 1024))
"""


@no_card
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize(
    ("layers", "config", "precision"),
    [
        (4, {}, "fp32"),  # libraries, above all
        (12, {"hidden_size": 512, "intermediate_size": 1536, "vocab_size": 32064}, "fp32"),  # activations
        (
            4,
            {"hidden_size": 512, "vocab_size": 100_352, "tie_word_embeddings": True},
            "bf16",
        ),  # tables, logits
    ],
    ids=["demo", "deep", "wide"],
)
def test_memory_of_a_training_without_a_card_is_foreseen(
    tmp_path: Path, layers: int, config: dict[str, Any], precision: str
):
    rope = {} if not config else {"rope_scaling": None}
    base = small_folder(tmp_path / "base", layers, **config, **rope)
    data = tmp_path / "data"
    data.mkdir()
    for name, count in (("train", 40), ("eval", 4)):
        rows = [
            {
                "id": str(i),
                "messages": [
                    {"role": "user", "content": f"{i}は？"},
                    {"role": "assistant", "content": "はい。" * (20 + i)},
                ],
            }
            for i in range(count)
        ]
        write_jsonl(data / f"{name}.jsonl", rows)
    command = [sys.executable, "-c", _TRAIN, str(tmp_path / "runs"), str(base), str(data), precision]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    # Never lower than used: a machine that fits by this number fits. Half as much again would refuse in vain.
    assert 1.0 <= float(done.stdout.split("measured ")[1]) <= 1.5


def test_memory_that_is_foreseen_grows_with_what_takes_it(here: Path, tmp_path: Path):
    def foreseen(base: str = str(here / "base"), **training: Any) -> float:
        training = {"sequence_length": 512, "precision": "fp32", "memory_gib": 64, **training}
        return host_memory(load_settings("demo", {"model": {"base": base}, "training": training})) / 2**30

    small = foreseen()
    assert 1.0 < small < 1.3, "libraries alone are 1.0 GiB"
    assert foreseen(precision="bf16") < small < foreseen(sequence_length=4096)
    # 3.6 G weights in int8 are 3.4 GiB, both tables 0.7, LoRA 0.9, a layer's activations 0.3.
    assert 6 < foreseen("owner/never-fetched", memory_gib=0.5, gradient_checkpointing=True) < 8
    if not torch.cuda.is_available():
        settings = load_settings("demo", overrides(here, tmp_path))
        (found,) = [finding for finding in examine(settings) if finding.subject == "memory"]
        assert found.text.startswith("training takes about 1.1 GiB of ")
