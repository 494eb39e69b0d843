"""What another terminal sees of a run at work, of one that ended and of one that was killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from so8t_helpers.__main__ import main
from so8t_helpers.run.files import StageError
from so8t_helpers.run.progress import Progress
from so8t_helpers.run.records import STATUS_NAME
from so8t_helpers.settings import Settings, merge
from so8t_helpers.verbs.status import clock, status_lines


def test_a_run_at_work_shows_step_losses_and_time_left(scratch_settings: Settings):
    with Progress(scratch_settings, "02_train", 200, "step", "training") as tracker:
        tracker.status.time = 0.0  # the file is written at most once a second
        tracker.update(50, task_loss=1.25, pet_loss=0.5)
        (line,) = status_lines(Path(scratch_settings.run.root))
    assert line.startswith("demo  02_train: training 50/200 step, task_loss 1.25, pet_loss 0.5, 0:0")
    assert line.endswith(" left")


def test_ended_and_failed_runs_say_so(scratch_settings: Settings):
    other = merge(scratch_settings, {"run": {"name": "other"}})
    with Progress(scratch_settings, "03_bake", 3, "layer") as tracker:
        tracker.update(3)
    with pytest.raises(StageError), Progress(other, "03_bake", 3, "layer"):
        raise StageError("no")
    lines = dict(line.split(maxsplit=1) for line in status_lines(Path(scratch_settings.run.root)))
    assert lines["demo"].startswith("03_bake: done 0:0")
    assert lines["other"].startswith("03_bake: failed 0:0")


def test_a_killed_run_is_not_shown_as_running(scratch_settings: Settings):
    """The status file says "running" for ever; the process it names tells."""
    code = (
        "import json, os, sys\n"
        "from so8t_helpers.settings import validate\nfrom so8t_helpers.run.progress import Progress\n"
        "Progress(validate(json.load(sys.stdin), 'test'), '02_train', 9, 'step')\n"
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(scratch_settings.model_dump()), text=True, check=False
    )
    status = json.loads((scratch_settings.run_dir / STATUS_NAME).read_text(encoding="utf-8"))
    assert status["state"] == "running"
    (line,) = status_lines(Path(scratch_settings.run.root))
    assert "02_train: died" in line


def test_the_verb_prints_what_there_is(scratch_settings: Settings, capsys: pytest.CaptureFixture[str]):
    root = ["--set", f"run.root={scratch_settings.run.root}"]
    assert main(["status", *root]) == 0
    assert capsys.readouterr().out.startswith("no run has worked in ")
    with Progress(scratch_settings, "03_bake", 1, "layer"):
        pass
    assert main(["status", *root]) == 0
    assert "demo  03_bake: done" in capsys.readouterr().out


@pytest.mark.parametrize(("seconds", "text"), [(7, "0:07"), (750, "12:30"), (11109, "3:05:09")])
def test_clock(seconds: float, text: str):
    assert clock(seconds) == text
