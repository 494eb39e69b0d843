"""SmolLM2-135M, a real pretrained model, through all five stages by `so8t run smollm2`: a few steps."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from so8t_helpers.phi3.source import base_folder
from so8t_helpers.run.files import read_jsonl
from so8t_helpers.run.stage import STAGES, stale_reason
from so8t_helpers.settings import PROJECT_ROOT, Settings, load_settings
from so8t_helpers.thinking.format import parse
from so8t_helpers.verbs.batch import run_stages

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("SO8T_SMOLLM2" not in os.environ, reason="no SmolLM2 (.ci/smollm2.sh fetches it)"),
]
PROMPTS = 6


def problems(path: Path, count: int) -> Path:
    """Write worked problems as GSM8K has them, each unlike the others."""
    draw = Random(7)
    things = (
        "apples",
        "books",
        "coins",
        "eggs",
        "flowers",
        "lamps",
        "letters",
        "marbles",
        "pencils",
        "shells",
    )
    people = ("Aiko", "Ben", "Chika", "Dan", "Emi", "Fumio", "Grace", "Haruto", "Ines", "Jun")
    places = ("at school", "by the sea", "in a shop", "on a farm", "at the station", "in the garden")
    lines = []
    for number in range(count):
        a, b, c = draw.randint(11, 99), draw.randint(2, 9), draw.randint(10, 60)
        who, what, where = people[number % 10], things[number // 6 % 10], places[number % 6]
        question = f"{who} packs {a} {what} into each of {b} boxes {where} and loses {c}. How many are left?"
        packed = f"{b} boxes hold {a}*{b} = <<{a}*{b}={a * b}>>{a * b} {what}."
        steps = f"{packed}\nOf them {a * b}-{c} = {a * b - c} are left."
        lines.append(json.dumps({"question": question, "answer": f"{steps}\n#### {a * b - c}"}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A finished run, made by the verb."""
    root = tmp_path_factory.mktemp("smollm2")
    chosen: dict[str, dict[str, object]] = {
        "run": {"root": str(root / "runs"), "reports_root": str(root / "reports")},
        "model": {"base": f"llama:{os.environ['SO8T_SMOLLM2']}"},
        "dataset": {
            "inputs": [str(problems(root / "problems.jsonl", 60))],
            "near_duplicate_threshold": 1.0,
            "eval_share": 0.2,
        },
        "training": {"max_steps": 3, "sequence_length": 256, "gradient_accumulation": 1, "eval_samples": 2},
        "bake": {"proof_texts": 2, "proof_tokens": 48},
        "gguf": {"quality_tokens": 256, "o_proj_study": False},
        "eval": {"prompts": PROMPTS, "max_new_tokens": 24, "num_ctx": 512},
    }
    chosen["training"] |= {"sample_steps": None}
    values = {f"{section}.{key}": value for section, keys in chosen.items() for key, value in keys.items()}
    options = [part for key, value in values.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    command = [sys.executable, "-m", "so8t_helpers", "run", "smollm2", *options]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return load_settings("smollm2", chosen)


def test_an_import_that_was_tidied_away_costs_no_training(run: Settings):
    shutil.rmtree(base_folder(run))
    outcomes = run_stages(run, STAGES[:2])
    assert [outcome.state for outcome in outcomes] == ["fresh", "fresh"]
    assert stale_reason(run, "02_train") is None


def found(run: Settings, name: str) -> dict:
    return json.loads((run.run_dir / name).read_text(encoding="utf-8"))


def test_all_stages_are_fresh_and_have_their_pages(run: Settings):
    assert [stale_reason(run, stage) for stage in STAGES] == [None] * len(STAGES)
    pages = {page.stem for page in run.reports_dir.glob("*.html")}
    assert pages == {*STAGES, "index"}


def test_the_proof_holds_on_real_activations(run: Settings):
    assert found(run, "03_bake/proof.json")["holds"]


def test_every_engine_reads_the_same_tokens(run: Settings):
    parity = found(run, "05_ollama_eval/scores.json")["parity"]
    assert set(parity["equal"].values()) == {PROMPTS}
    assert found(run, "04_gguf/quality.json")["token_parity"]["equal"]


def test_the_f16_file_writes_what_transformers_writes(run: Settings):
    """In 24 tokens a near tie may fall the other way: keys and values are float16 in llama.cpp."""
    rows = read_jsonl(run.run_dir / "05_ollama_eval" / "answers.jsonl")
    written = {
        name: {r["id"]: r["text_hmac"] for r in rows if r["model"] == name} for name in ("baked", "f16")
    }
    same = sum(written["baked"][key] == written["f16"][key] for key in written["baked"])
    assert len(written["baked"]) == PROMPTS and same >= PROMPTS - 1


def test_samples_are_english_in_the_models_own_dialect(run: Settings):
    row = read_jsonl(run.run_dir / "01_dataset" / "train.jsonl")[0]
    assert row["text"].startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    said = parse(row["messages"][-1]["content"])
    assert (said.style, said.decision, said.well_formed) == ("english", "ALLOW", True)
    assert "<<" not in said.thinking and row["check"] == {"kind": "number", "value": said.final}
    assert "language:\n- en\n" in (run.run_dir / "03_bake" / "model" / "README.md").read_text(
        encoding="utf-8"
    )
