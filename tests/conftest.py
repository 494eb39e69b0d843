"""What tests share: settings of a scratch run, and one finished demo run for the whole session."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from so8t_helpers.run.stage import STAGES, stale_reason
from so8t_helpers.settings import PROJECT_ROOT, Settings, load_settings
from tests.windows_rules import sitecustomize as windows_rules

DEMO_MINUTES = 20  # ten on two idle cores; a machine that builds something beside it takes longer

if sys.platform == "linux":  # what Windows would refuse fails here, in every process that the tests start
    places = [tempfile.gettempdir(), *(str(PROJECT_ROOT / name) for name in ("runs", "reports"))]
    places += [kept] if (kept := os.environ.get("SO8T_DEMO_RUN_ROOT")) else []
    os.environ[windows_rules.SESSION] = os.pathsep.join([str(os.getpid()), *places])
    rules_folder = str(Path(windows_rules.__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [rules_folder, os.environ.get("PYTHONPATH")]))
    windows_rules.enforce()


@pytest.fixture
def scratch_settings(tmp_path: Path) -> Settings:
    """The demo's settings with runs and reports in a folder of this test's own."""
    folders = {"root": str(tmp_path / "runs"), "reports_root": str(tmp_path / "reports")}
    return load_settings("demo", {"run": folders})


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of a finished demo run, made once a session by the verb a person would use.

    SO8T_DEMO_RUN_ROOT names a folder to keep it in; a later session then finds its stages fresh.
    """
    kept = os.environ.get("SO8T_DEMO_RUN_ROOT")
    root = Path(kept).resolve() if kept else tmp_path_factory.mktemp("demo")
    folders = {"root": str(root / "runs"), "reports_root": str(root / "reports")}
    settings = load_settings("demo", {"run": folders})
    command = [sys.executable, "-m", "so8t_helpers", "run", "demo"]
    command += [part for key, value in folders.items() for part in ("--set", f"run.{key}={value}")]
    done = subprocess.run(
        command, cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=60 * DEMO_MINUTES, check=False
    )
    if done.returncode != 0:
        pytest.fail(
            f"so8t run demo ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        )
    assert [stale_reason(settings, stage) for stage in STAGES] == [None] * len(STAGES)
    return settings
