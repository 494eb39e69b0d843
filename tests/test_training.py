"""02_train on a small model: results, resuming, adapters that PEFT loads, and errors before any work."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from so8t_helpers.run.files import StageError, write_jsonl, write_yaml
from so8t_helpers.run.stage import open_stage
from so8t_helpers.settings import PROJECT_ROOT, Settings, SettingsError, load_settings, merge
from so8t_helpers.so8 import rotation
from so8t_helpers.train import batches, optimizer, resume
from so8t_helpers.train import stage as train_stage
from tests.phi3_folders import small_folder

STEPS = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_folder(
        tmp_path_factory.mktemp("train") / "base",
        hidden_size=64,
        num_attention_heads=2,
        num_key_value_heads=2,
    )


@pytest.fixture
def settings(base: Path, tmp_path: Path) -> Settings:
    chosen = load_settings(
        "demo",
        {
            "run": {"name": "t", "root": str(tmp_path / "runs"), "reports_root": str(tmp_path / "reports")},
            "model": {"base": str(base)},
            "lora": {"r": 4, "alpha": 8},
            "training": {
                "sequence_length": 128,
                "max_steps": STEPS,
                "gradient_accumulation": 2,
                "checkpoint_steps": 2,
                "angle_snapshots": 4,
            },
        },
    )
    rows = []
    for i in range(30):
        answer = f"# 思考ステップ\n数は{i}。\n判定: ALLOW\n\n# 最終回答\n{i}です。"
        messages = [{"role": "user", "content": f"/think {i}は？"}, {"role": "assistant", "content": answer}]
        rows.append({"id": str(i), "messages": messages})
    write_jsonl(chosen.run_dir / "01_dataset" / "train.jsonl", rows)
    return chosen


def outcome(settings: Settings) -> dict[str, torch.Tensor]:
    adapter = settings.run_dir / "02_train" / "adapter"
    return load_file(adapter / "adapter_model.safetensors") | load_file(adapter / rotation.GATES_FILE)


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def test_training_leaves_every_artefact(settings: Settings):
    facts = train_stage.train(settings)
    folder = settings.run_dir / "02_train"
    metrics = pd.read_parquet(folder / "metrics.parquet")
    assert facts["steps"] == len(metrics) == STEPS
    assert metrics["step"].tolist() == list(range(1, STEPS + 1))
    assert metrics["pet_phase"].iloc[0] == "exploration"
    assert metrics["pet_lambda"].iloc[-1] == settings.pet.lambda_stabilization
    assert metrics["task_loss"].iloc[-1] < metrics["task_loss"].iloc[0]
    assert metrics["orthogonality"].max() < 1e-10  # float32 rounding of 64 products, squared
    angles = load_file(folder / "angles.safetensors")
    assert angles["steps"].tolist() == [0, 2, 4, 6]
    assert angles["angles"].shape == (4, 2, 8, 4)
    assert (angles["angles"][-1] - angles["angles"][0]).abs().max() > 0
    assert (folder / "manifest.json").is_file()
    assert not list((folder / "checkpoints").glob("*"))


def test_peft_loads_the_adapter_on_the_plain_base(settings: Settings, base: Path):
    train_stage.train(settings)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7, 8]])
    before = plain(ids).logits
    model = PeftModel.from_pretrained(plain, str(settings.run_dir / "02_train" / "adapter"))
    stored = outcome(settings)
    for name, tensor in model.state_dict().items():
        if ".lora_" in name:
            assert torch.equal(tensor, stored[name.replace(".default", "")])
    assert (model(ids).logits - before).abs().max() > 0


def test_a_training_killed_in_the_middle_ends_bit_for_bit_as_if_it_had_not_been(
    settings: Settings, tmp_path: Path
):
    train_stage.train(settings)
    wanted = outcome(settings)
    metrics = pd.read_parquet(settings.run_dir / "02_train" / "metrics.parquet")
    killed = merge(
        settings,
        {"run": {"name": "killed"}, "training": {"dataset_dir": str(settings.run_dir / "01_dataset")}},
    )
    profile = tmp_path / "killed.yaml"
    write_yaml(profile, killed.model_dump())
    code = (
        "import sys; from so8t_helpers import settings; from so8t_helpers.train import stage;"
        "stage.train(settings.load_settings(sys.argv[1]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(profile)], cwd=PROJECT_ROOT)
    saved = killed.run_dir / "02_train" / "checkpoints" / "step-0000002"
    deadline = time.monotonic() + 120
    while not saved.is_dir() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert saved.is_dir()
    assert not (killed.run_dir / "02_train" / "manifest.json").exists()

    train_stage.train(killed)
    assert_same(outcome(killed), wanted)
    again = pd.read_parquet(killed.run_dir / "02_train" / "metrics.parquet")
    assert again["task_loss"].tolist() == metrics["task_loss"].tolist()


def test_a_broken_checkpoint_is_skipped_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for step in (2, 4, 6):
        state = resume.Checkpoint({"x": torch.full((3,), float(step))}, {"step": step})
        resume.save(tmp_path, step, "this training", state, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-0000004", "step-0000006"]
    data = bytearray((tmp_path / "step-0000006" / "state.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "step-0000006" / "state.safetensors").write_bytes(data)
    found = resume.newest(tmp_path, "this training")
    assert found is not None
    assert found.state["step"] == 4
    assert "step-0000006 skipped: state.safetensors does not have the recorded hash" in caplog.text
    assert resume.newest(tmp_path, "another training") is None


def test_training_goes_on_from_an_adapter_folder(settings: Settings):
    train_stage.train(settings)
    adapter = settings.run_dir / "02_train" / "adapter"
    further = merge(
        settings,
        {
            "run": {"name": "further"},
            "training": {
                "dataset_dir": str(settings.run_dir / "01_dataset"),
                "continue_from": str(adapter),
                "max_steps": 1,
                "learning_rate": 1e-12,
            },
        },
    )
    train_stage.train(further)
    for name, tensor in outcome(settings).items():
        torch.testing.assert_close(outcome(further)[name], tensor, rtol=0, atol=1e-9)  # one step of 1e-12


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"lora": {"target_modules": ["q_proj", "o_proj"]}}, r"\['q_proj'\] matches no linear of Phi-3"),
        ({"so8t": {"layer_indices": [0, 9]}}, r"so8t.layer_indices: \[9\]; the model has layers 0 to 1"),
        ({"training": {"precision": "fp16"}}, "fp16 needs a CUDA card"),
        ({"training": {"speed": "graph"}}, "graph is not possible here"),
        ({"training": {"sequence_length": 16}}, "training.sequence_length is 16"),
        ({"model": {"base": "no/such/folder"}}, "no folder"),
        ({"training": {"dataset_dir": "nowhere"}}, "no folder"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a card can do what these forbid")
def test_what_cannot_work_is_said_before_any_work(settings: Settings, overrides: dict, message: str):
    with pytest.raises(SettingsError, match=message):
        train_stage.train(merge(settings, overrides))


def test_a_missing_data_set_names_the_stage_that_makes_it(settings: Settings):
    (settings.run_dir / "01_dataset" / "train.jsonl").unlink()
    with pytest.raises(StageError, match=r"missing input 01_dataset/train.jsonl.*run 01_dataset first"):
        train_stage.train(settings)


def test_hidden_size_that_eight_does_not_divide_is_refused():
    with pytest.raises(SettingsError, match="hidden_size 100: SO\\(8\\) gates need a multiple of 8"):
        rotation.count_blocks(100)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_rate_warms_up_and_follows_its_schedule(schedule: str):
    chosen = load_settings("demo", {"training": {"schedule": schedule, "warmup_share": 0.1}}).training
    rates = [optimizer.learning_rate(chosen, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([chosen.learning_rate * (i + 1) / 10 for i in range(10)])
    middle = {"cosine": 0.5, "linear": 0.5, "constant": 1.0}[schedule]
    assert rates[55] == pytest.approx(chosen.learning_rate * middle)
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))


def test_every_sample_is_seen_once_an_epoch(settings: Settings):
    samples = [batches.Document(*(torch.zeros(n).numpy(),) * 2) for n in (30, 60, 90, 20, 128, 64)]
    chosen = merge(settings, {"training": {"max_steps": None, "epochs": 3}})
    plan = batches.plan(chosen, samples)
    seen = [i for step in plan.steps for group in step for sequence in group for i in sequence]
    assert sorted(seen) == sorted(list(range(6)) * 3)
    assert plan.tokens_wasted["packed"] <= plan.tokens_wasted["unpacked"]


def test_an_unfinished_stage_leaves_no_manifest(settings: Settings):
    with pytest.raises(RuntimeError), open_stage(settings, "02_train"):
        raise RuntimeError("stopped")
    assert not (settings.run_dir / "02_train" / "manifest.json").exists()
