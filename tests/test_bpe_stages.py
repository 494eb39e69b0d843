"""A model of Phi-4-mini's shape, made small, through all five stages."""

from __future__ import annotations

import json
import os
from pathlib import Path

import bpe_folders
import dataset_inputs
import pytest
from test_bpe_gguf import convert
from test_gguf_parity import assert_same

from so8t_helpers.bake.stage import bake
from so8t_helpers.dataset.stage import build
from so8t_helpers.evaluate.stage import evaluate
from so8t_helpers.gguf.stage import export
from so8t_helpers.phi3.tokenizer_files import stripping_tokens
from so8t_helpers.run.stage import STAGES
from so8t_helpers.settings import load_settings
from so8t_helpers.train.stage import train
from so8t_helpers.verbs.needs import check_stage


@pytest.mark.slow
def test_phi4_minis_shape_goes_through_all_five_stages(tmp_path: Path) -> None:
    base = bpe_folders.small_phi4_mini(tmp_path / "small-phi4-mini")
    dataset_inputs.write(tmp_path / "in.jsonl", dataset_inputs.many(40))
    settings = load_settings(
        "demo",
        {
            "run": {"name": "bpe", "root": str(tmp_path / "runs"), "reports_root": str(tmp_path / "reports")},
            "model": {"base": str(base)},
            "dataset": {"inputs": [str(tmp_path / "in.jsonl")], "workers": 1, "eval_share": 0.2},
            "training": {"max_steps": 3, "sequence_length": 2048},
            "gguf": {"types": ["f16", "q8_0", "q4_k_m"], "name": "phi3-bpe"},
            "eval": {
                "engine": "llama_cpp",
                "models": ["base", "baked", "f16", "q4_k_m"],
                "prompts": 4,
                "max_new_tokens": 16,
            },
        },
    )
    for stage in STAGES:
        check_stage(settings, stage)
    build(settings)
    train(settings)
    baked = bake(settings)
    assert baked.proof["holds"]
    assert stripping_tokens(base) and not stripping_tokens(baked.model_dir)
    result = export(settings)
    assert result.quality["token_parity"]["equal"]
    if "SO8T_LLAMA_CPP" in os.environ:
        for kind in ("f16", "q8_0"):
            convert(baked.model_dir, kind, tmp_path / f"{kind}.gguf", "gpt-4o")
            assert_same(result.files[kind], tmp_path / f"{kind}.gguf", 0.0)
    evaluate(settings)
    answers = settings.run_dir / "05_ollama_eval" / "answers.jsonl"
    models = [json.loads(line)["model"] for line in answers.read_text(encoding="utf-8").splitlines()]
    assert {model: models.count(model) for model in models} == dict.fromkeys(settings.eval.models, 4)
