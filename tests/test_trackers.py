"""Trackers: what TensorBoard and MLflow are told is read back; one that is missing or down stops nothing."""

from __future__ import annotations

import logging
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from so8t_helpers.run.files import write_jsonl
from so8t_helpers.run.stage import stale_reason
from so8t_helpers.settings import Settings, load_settings, merge
from so8t_helpers.train import stage, trackers
from tests.phi3_folders import small_folder
from tests.test_heldout import rows

SECRET = "hunter2-hunter2"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    small_folder(
        tmp_path / "home of 太郎" / "base", hidden_size=64, num_attention_heads=2, num_key_value_heads=2
    )
    chosen = load_settings(
        "demo",
        {
            "run": {"name": "tracked", "root": str(tmp_path / "実験 フォルダ")},
            "model": {"base": str(tmp_path / "home of 太郎" / "base")},
            "lora": {"r": 4, "alpha": 8},
            "training": {
                "sequence_length": 256,
                "max_steps": 4,
                "eval_steps": 2,
                "sample_steps": 4,
                "sample_prompts": 2,
                "trackers": ["tensorboard", "mlflow"],
            },
        },
    )
    write_jsonl(chosen.run_dir / "01_dataset" / "train.jsonl", rows(20))
    write_jsonl(chosen.run_dir / "01_dataset" / "eval.jsonl", rows(6, first=30))
    return chosen


@pytest.fixture(autouse=True)
def no_tracking_server(monkeypatch: pytest.MonkeyPatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_ALLOW_FILE_STORE", *trackers._PATIENCE):
        monkeypatch.delenv(name, raising=False)
    before = mlflow.get_tracking_uri()
    yield
    mlflow.end_run()
    mlflow.set_tracking_uri(before)


def test_tensorboard_and_mlflow_hold_what_the_training_saw(settings: Settings):
    stage.train(settings)
    metrics = pd.read_parquet(settings.run_dir / "02_train" / "metrics.parquet")
    held_out = pd.read_parquet(settings.run_dir / "02_train" / "heldout.parquet")
    folder = settings.run_dir / "trackers"

    # By default it gives the last histogram alone.
    events = EventAccumulator(str(folder / "tensorboard" / "tracked"), size_guidance={"histograms": 0})
    events.Reload()
    for name, frame in (("task_loss", metrics), ("lr", metrics), ("held-out/loss", held_out)):
        found = events.Scalars(name)
        assert [event.step for event in found] == frame["step"].tolist()
        column = frame[name.rpartition("/")[2]]
        assert [event.value for event in found] == pytest.approx(
            column.tolist(), rel=1e-6
        )  # stored in float32
    assert [event.step for event in events.Histograms("principal angles/layer 1")] == [0, 2, 4]
    assert events.Histograms("principal angles/layer 1")[0].histogram_value.num == 8 * 4
    assert [event.step for event in events.Scalars("answers/format")] == [4]

    mlflow.set_tracking_uri((folder / "mlflow").as_uri())
    client = mlflow.tracking.MlflowClient()
    experiment = client.get_experiment_by_name(trackers.PROJECT)
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "tracked"
    assert run.data.params["lora.r"] == "4" and run.data.params["model.base"] == "base"
    history = client.get_metric_history(run.info.run_id, "task_loss")
    assert [(m.step, m.value) for m in history] == list(
        zip(metrics["step"], metrics["task_loss"], strict=True)
    )
    assert run.data.metrics["held-out/loss"] == held_out["loss"].iloc[-1]
    assert "太郎" not in "".join(p.read_text("utf-8") for p in (folder / "mlflow").rglob("*") if p.is_file())


def test_trackers_do_not_make_a_training_stale_or_another_one(settings: Settings):
    stage.train(settings)
    assert stale_reason(settings, "02_train") is None
    assert stale_reason(merge(settings, {"training": {"trackers": []}}), "02_train") is None


def test_one_that_is_missing_or_down_stops_nothing_and_tells_no_secret(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("SOME_API_KEY", SECRET)
    down = merge(settings, {"training": {"trackers": ["mlflow", "wandb"]}})
    with caplog.at_level(logging.WARNING, logger=trackers.log.name):
        assert stage.train(down)["steps"] == 4
    said = [record.getMessage() for record in caplog.records if record.name == trackers.log.name]
    assert len(said) == 2, said
    assert said[0].startswith("training.trackers: mlflow: ") and "the training goes on without it" in said[0]
    assert (
        said[1].startswith("training.trackers: wandb: ModuleNotFoundError") and "pip install wandb" in said[1]
    )
    assert SECRET not in caplog.text


def test_one_that_breaks_in_the_middle_is_left_alone(settings: Settings, caplog: pytest.LogCaptureFixture):
    own = trackers.Trackers(merge(settings, {"training": {"trackers": ["tensorboard"]}}), 0)
    own.log({"a": 1.0, "text": "x", "bad": float("nan")}, 1)
    own.alive["tensorboard"].writer = None  # as if its disk had gone
    own.log({"a": 2.0}, 2)
    own.angles([0], torch.zeros(1, 8, 4), 2)
    own.finish()
    assert len([r for r in caplog.records if r.name == trackers.log.name]) == 1
    events = EventAccumulator(str(settings.run_dir / "trackers" / "tensorboard" / "tracked"))
    events.Reload()
    assert [e.value for e in events.Scalars("a")] == [1.0] and events.Tags()["scalars"] == ["a"]


def test_what_an_interrupted_run_logged_beyond_its_checkpoint_is_void(settings: Settings):
    one = merge(settings, {"training": {"trackers": ["tensorboard"]}})
    for first, last in ((0, 6), (4, 8)):
        own = trackers.Trackers(one, first)
        for step in range(first + 1, last + 1):
            own.log({"a": 10.0 * first + step}, step)
        own.finish()
    events = EventAccumulator(str(settings.run_dir / "trackers" / "tensorboard" / "tracked"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("a")] == [
        *((n, float(n)) for n in range(1, 5)),
        *((n, 40.0 + n) for n in range(5, 9)),
    ]
