"""Several workers: the same losses and the same adapters as one, started as the notebook starts them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from so8t_helpers.run.files import StageError, write_jsonl
from so8t_helpers.run.stage import stale_reason
from so8t_helpers.settings import PROJECT_ROOT, Settings, load_settings, merge
from so8t_helpers.so8.rotation import GATES_FILE
from so8t_helpers.train import stage as train_stage
from so8t_helpers.train import workers
from tests.phi3_folders import small_folder

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="written for workers on the CPU")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    base = small_folder(tmp_path / "base", hidden_size=64, num_attention_heads=2, num_key_value_heads=2)
    data = tmp_path / "data"
    rows = []
    for i in range(40):
        answer = f"# 思考ステップ\n数は{i}。\n判定: ALLOW\n\n# 最終回答\n{i}です。"
        messages = [{"role": "user", "content": f"/think {i}は？"}, {"role": "assistant", "content": answer}]
        rows.append({"id": str(i), "messages": messages})
    write_jsonl(data / "train.jsonl", rows[:32])
    write_jsonl(data / "eval.jsonl", rows[32:])
    return load_settings(
        "demo",
        {
            "run": {"name": "one", "root": str(tmp_path / "runs"), "reports_root": str(tmp_path / "reports")},
            "model": {"base": str(base)},
            "lora": {"r": 4, "alpha": 8},
            "training": {
                "dataset_dir": str(data),
                "sequence_length": 128,
                "max_steps": 4,
                "gradient_accumulation": 3,  # two workers: one has two micro-steps, the other one
                "checkpoint_steps": 1,
                "eval_steps": 2,
                "eval_samples": None,
            },
        },
    )


def outcome(settings: Settings) -> tuple[pd.DataFrame, dict[str, torch.Tensor]]:
    folder = settings.run_dir / "02_train"
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    return pd.read_parquet(folder / "metrics.parquet"), tensors | load_file(folder / "adapter" / GATES_FILE)


def test_two_workers_end_where_one_does(settings: Settings):
    facts = train_stage.train(settings)
    two = merge(settings, {"run": {"name": "two", "processes": 2}})
    facts_of_two = train_stage.train(two)
    assert stale_reason(two, "02_train") is None
    assert facts_of_two.keys() == facts.keys()
    assert not (two.run_dir / ".workers.log").exists()

    (metrics, tensors), (metrics_of_two, tensors_of_two) = outcome(settings), outcome(two)
    # The same micro-steps and dropout masks; only the order of three float32 sums differs, some 1e-7 each.
    for column in ("task_loss", "pet_loss", "grad_norm"):
        assert metrics_of_two[column].tolist() == pytest.approx(metrics[column].tolist(), rel=1e-5)
    assert metrics_of_two["tokens"].tolist() == metrics["tokens"].tolist()
    looks = [pd.read_parquet(s.run_dir / "02_train" / "heldout.parquet") for s in (settings, two)]
    assert looks[0]["step"].tolist() == looks[1]["step"].tolist() == [0, 2, 4]
    assert looks[1]["loss"].tolist() == pytest.approx(looks[0]["loss"].tolist(), rel=1e-4)
    assert looks[1]["loss"][0] == pytest.approx(looks[0]["loss"][0], rel=1e-9)  # nothing trained yet
    for name, tensor in tensors.items():
        # AdamW's first steps move by the rate whatever the gradient's size; where a gradient is almost zero
        # that rounding decides its sign, so a number may be two rates a step apart, but hardly any is.
        apart = (tensors_of_two[name] - tensor).abs()
        assert apart.max() <= 8.1 * settings.training.learning_rate, name
        assert (apart > 1e-5).float().mean() < 0.01, name


def test_a_worker_that_fails_says_why_and_leaves_no_manifest(settings: Settings):
    broken = merge(settings, {"run": {"processes": 2}, "lora": {"target_modules": ["q_proj"]}})
    with pytest.raises(StageError, match=r"a worker failed(.|\n)*q_proj.*matches no linear of Phi-3"):
        train_stage.train(broken)
    assert not (broken.run_dir / "02_train" / "manifest.json").exists()


def test_workers_that_hold_different_numbers_say_so():
    workers.Workers().agree("anything", 3)  # alone, there is nobody to disagree with
    code = "from so8t_helpers.train import workers as d; w = d.join(); w.agree('the step', w.rank)"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
    command += [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "workers disagree on the step: [0, 1]" in done.stderr
