"""A study in small for tests: a base with random weights, records of one kind, trainings of a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from so8t_helpers.run.files import write_jsonl, write_yaml
from tests.phi3_folders import small_folder

RATE = {"training.learning_rate": {"low": 1.0e-3, "high": 1.0e-2, "log": True}}
FILE: dict[str, Any] = {
    "question": "Do gates help a model that knows nothing?",
    "control": "lora",
    "trials": 2,
    "seeds": 3,
    "set": {"pet.enabled": False},
    "arms": {
        "lora": {"hypothesis": "the yardstick", "set": {"so8t.enabled": False}, "tune": RATE},
        "more lora": {
            "hypothesis": "no difference",
            "set": {"so8t.enabled": False},
            "match_parameters": "gates",
        },
        "gates": {"hypothesis": "they help", "tune": RATE},
    },
    "endpoints": {"main": "heldout.final", "others": ["heldout.loss", "heldout.decision_right"]},
}


def rows(first: int, count: int) -> list[dict[str, Any]]:
    """Samples in the seed's format, each with a number and a label of its own."""
    found = []
    for i in range(first, first + count):
        label = ("ALLOW", "DENY")[i % 2]
        answer = f"# 思考ステップ\n数は{i}。\n判定: {label}\n\n# 最終回答\n{i}です。"
        messages = [{"role": "user", "content": f"/think {i}は？"}, {"role": "assistant", "content": answer}]
        found.append({"id": str(i), "label": label, "messages": messages, "text": answer})
    return found


def small_base(folder: Path) -> Path:
    """Make a base of two layers, 64 wide."""
    return small_folder(folder, hidden_size=64, num_attention_heads=2, num_key_value_heads=2)


def small_study(folder: Path, base: Path, name: str = "small", **over: Any) -> Path:
    """Write data, profile and study file, with `over` over the file's top level; return the file's path."""
    write_jsonl(folder / "data" / "train.jsonl", rows(0, 80))
    write_jsonl(folder / "data" / "eval.jsonl", rows(1000, 16))
    profile = {
        "profile": "demo",
        "run": {"root": str(folder / "runs"), "reports_root": str(folder / "reports")},
        "dataset": {"inputs": [str(folder / "data" / "train.jsonl")]},
        "model": {"base": str(base)},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.05},
        "so8t": {"init_scale": 0.0},
        "training": {
            "dataset_dir": str(folder / "data"),
            "sequence_length": 128,
            "max_steps": 4,
            "gradient_accumulation": 1,
            "angle_snapshots": 3,
            "checkpoint_steps": 2,
            "learning_rate": 2.0e-3,
            "precision": "fp32",
            "optimizer": "adamw",
            "gradient_checkpointing": False,
            "eval_steps": 2,
        },
    }
    write_yaml(folder / "profile.yaml", profile)
    path = folder / f"{name}.yaml"
    write_yaml(path, {"profile": str(folder / "profile.yaml"), **FILE, **over})
    return path
