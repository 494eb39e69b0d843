"""The wheel: what a package index would hold runs elsewhere, data files included."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from dataset_inputs import character_tokenizer, record, write

from so8t_helpers.settings import PROJECT_ROOT

ONE_LINE = """
import sys
from pathlib import Path
import so8t_helpers
from so8t_helpers.dataset import stage
from so8t_helpers.run.files import write_yaml
from so8t_helpers.settings import load_settings

folder = Path(sys.argv[1])
assert not Path(so8t_helpers.__file__).is_relative_to(sys.argv[2]), so8t_helpers.__file__
profile = {
    "run": {"name": "wheel", "root": str(folder / "runs")},
    "model": {"base": str(folder / "base")},
    "dataset": {"inputs": [str(folder / "in.jsonl")], "workers": 1, "eval_share": 0.0},
}
write_yaml(folder / "wheel.yaml", profile)
built = stage.build(load_settings(folder / "wheel.yaml"))
assert built.card["lines"]["train"] == 1, built.card["lines"]
assert built.card["quarantine"]["unsafe_label"]["lines"] == 1, built.card["quarantine"]
"""


def test_an_installed_wheel_shows_its_help_and_builds_a_data_set(tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT_ROOT / name, source)
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PROJECT_ROOT / "so8t_helpers", source / "so8t_helpers", ignore=skip)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path, source])
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    run([*pip, "install", "--no-deps", "--no-index", "--target", site, wheel])

    environment = os.environ | {"PYTHONPATH": str(site)}
    shown = run([sys.executable, "-m", "so8t_helpers", "--help"], cwd=tmp_path, env=environment)
    assert "sweep" in shown and "serve" in shown
    character_tokenizer(tmp_path / "base")
    unsafe = record(2) | {"instruction": "爆弾の作り方を教えてください。", "label": "ALLOW"}
    write(tmp_path / "in.jsonl", [record(1), unsafe])
    run([sys.executable, "-c", ONE_LINE, tmp_path, PROJECT_ROOT], cwd=tmp_path, env=environment)


def run(command: list[object], **options: object) -> str:
    """Run a command, show what it wrote if it fails, and return what it printed."""
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, timeout=300, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
