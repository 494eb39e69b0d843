"""Kills, limits, full disks and edited artefacts: what stays, what goes, and what is said."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from so8t_helpers.__main__ import main
from so8t_helpers.run.files import MachineError, StageError, hashes_path, read_json, write_json, write_yaml
from so8t_helpers.run.stage import (
    STAGES,
    executed_path,
    manifest_path,
    open_stage,
    read_manifest,
    stale_reason,
)
from so8t_helpers.settings import PROJECT_ROOT, Settings, merge
from so8t_helpers.verbs import batch
from so8t_helpers.verbs.verify import walk_back
from tests.small_notebooks import code, small_settings, write_notebook

FIRST, SECOND = STAGES[:2]
# A stage that starts a program of its own and then works for ten minutes.
HANGS = (
    "import subprocess, sys, tempfile, time\n"
    "command = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
    "child = subprocess.Popen(command, start_new_session=True)\n"
    "print('started')\n"
    "(settings.run_dir / 'child.txt').write_text(f'{child.pid} {tempfile.gettempdir()}')\n"
    "time.sleep(600)"
)
posix = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings of small notebooks, with a folder for temporary files that nobody else uses."""
    (tmp_path / "temp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temp"))
    for stage in (FIRST, SECOND):
        write_notebook(tmp_path / "notebooks", stage)
    return small_settings(tmp_path)


def left_behind(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "temp").iterdir() if not path.name.startswith("torchinductor")]


def wait_for(what: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "did not happen in time"
        time.sleep(0.05)


def child_of(settings: Settings) -> tuple[int, Path]:
    path = settings.run_dir / "child.txt"
    wait_for(lambda: path.is_file() and " " in path.read_text())
    pid, temp = path.read_text().split()
    return int(pid), Path(temp)


def at_work(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def start(settings: Settings) -> subprocess.Popen[str]:
    """Start `so8t run` of the first stage as a person does."""
    profile = settings.run_dir.parent.parent / "mine.yaml"
    write_yaml(profile, settings.model_dump())
    command = [sys.executable, "-m", "so8t_helpers", "run", str(profile), "--only", FIRST]
    # Tests in a shell's background ignore SIGINT, and their children would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            command, cwd=PROJECT_ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
        )
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_stage_that_hangs_is_ended_with_all_it_started_and_its_notebook_kept(
    settings: Settings, tmp_path: Path
):
    write_notebook(tmp_path / "notebooks", FIRST, code(HANGS))
    limited = merge(settings, {"run": {"stage_timeout": 4.0}})
    (outcome,) = batch.run_stages(limited, (FIRST,))
    assert (outcome.state, outcome.detail) == (
        "failed",
        "ended by run.stage_timeout; raise it, or set it to null",
    )
    pid, temp = child_of(settings)
    assert not at_work(pid)
    assert not temp.exists()
    assert "started" in executed_path(settings, FIRST).read_text(encoding="utf-8")
    assert left_behind(tmp_path) == []
    assert os.environ["TMPDIR"] == str(tmp_path / "temp"), "the environment is as it was"


@posix
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_children_keeps_the_checkpoint_and_says_how_to_go_on(
    settings: Settings, tmp_path: Path, number: int, status: int
):
    write_notebook(tmp_path / "notebooks", FIRST, code(HANGS))
    process = start(settings)
    pid, temp = child_of(settings)
    checkpoint = settings.run_dir / FIRST / "checkpoints" / "step-0000020"
    checkpoint.mkdir(parents=True)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert "the same command goes on from the checkpoint of step 20" in out
    assert "Traceback" not in err
    assert checkpoint.is_dir()
    assert not at_work(pid)
    assert not temp.exists()
    assert left_behind(tmp_path) == []
    assert executed_path(settings, FIRST).is_file()


@posix
def test_what_a_killed_run_left_is_ended_and_removed_by_the_next(settings: Settings, tmp_path: Path):
    write_notebook(tmp_path / "notebooks", FIRST, code(HANGS))
    process = start(settings)
    pid, temp = child_of(settings)
    process.kill()
    process.wait(60)
    assert temp.is_dir()
    assert at_work(pid)
    write_notebook(tmp_path / "notebooks", FIRST)
    (outcome,) = batch.run_stages(settings, (FIRST,))
    assert outcome.state == "done", outcome
    wait_for(lambda: not at_work(pid), 5)
    assert left_behind(tmp_path) == []


@posix
def test_a_second_run_of_a_name_is_refused_at_once(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write_notebook(tmp_path / "notebooks", FIRST, code(HANGS))
    process = start(settings)
    child_of(settings)
    begun = time.monotonic()
    assert main(["run", str(tmp_path / "mine.yaml"), "--only", FIRST]) == 3
    assert time.monotonic() - begun < 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("so8t run: run demo: another process carries it out")
    process.terminate()
    process.communicate(timeout=60)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_full_disk_is_one_line_from_any_stage(settings: Settings, tmp_path: Path):
    said = r"^02_train in .*: no room on the disk .*; make room there"
    with pytest.raises(MachineError, match=said), open_stage(settings, SECOND):
        Path("/dev/full").write_text("x", encoding="utf-8")
    assert read_manifest(settings, SECOND) is None
    # In a cell that no stage guards it is the system's own line.
    write_notebook(tmp_path / "notebooks", FIRST, code("open('/dev/full', 'wb').write(b'x' * 10**6)"))
    (outcome,) = batch.run_stages(settings, (FIRST,))
    assert "No space left on device" in outcome.detail


def test_an_edit_that_puts_size_and_time_back_is_seen(settings: Settings):
    batch.run_stages(settings, (FIRST,))
    out = settings.run_dir / FIRST / "out.txt"
    before = out.stat()
    out.write_text("b", encoding="utf-8")
    os.utime(out, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert out.stat().st_size == before.st_size
    assert stale_reason(settings, FIRST) == "output out.txt changed"


def test_verify_hashes_anew_what_the_memory_of_hashes_gets_wrong(settings: Settings, tmp_path: Path):
    batch.run_stages(settings, (FIRST,))
    out, profile = settings.run_dir / FIRST / "out.txt", tmp_path / "mine.yaml"
    write_yaml(profile, settings.model_dump())
    out.write_text("b", encoding="utf-8")
    hashes, stat = read_json(hashes_path(settings)), out.stat()
    stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns]
    write_json(hashes_path(settings), hashes | {str(out): [*stamp, hashes[str(out)][-1]]})
    assert main(["run", str(profile), "--only", FIRST]) == 0
    assert out.read_text() == "b", "nothing tells the memory of the change"
    assert main(["run", str(profile), "--only", FIRST, "--verify"]) == 0
    assert out.read_text() == "a"


@pytest.mark.parametrize("content", ["[]", '{"a": 3}', '{"a": [1]}', "{"])
def test_a_broken_memory_of_hashes_is_none(settings: Settings, content: str):
    batch.run_stages(settings, (FIRST,))
    hashes_path(settings).write_text(content, encoding="utf-8")
    assert stale_reason(settings, FIRST) is None


def test_a_stage_reads_what_the_stage_before_it_wrote_and_nothing_else(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """A flipped bit in a GGUF at stage 05, an edited train.jsonl at 02."""
    batch.run_stages(settings, (FIRST,))
    out = settings.run_dir / FIRST / "out.txt"
    out.write_text("b", encoding="utf-8")
    profile = tmp_path / "mine.yaml"
    write_yaml(profile, settings.model_dump())
    assert main(["run", str(profile), "--only", SECOND]) == 2
    assert "02_train reads 01_dataset, whose output out.txt changed" in capsys.readouterr().err
    # Named by a setting, in the folder of another run.
    with open_stage(merge(settings, {"run": {"name": "other"}}), SECOND) as stage:
        with pytest.raises(StageError, match=r"02_train: .*out\.txt is not as 01_dataset left it"):
            stage.read_file(f"{FIRST}/out.txt", out)
        out.write_text("a", encoding="utf-8")
        stage.read_file(f"{FIRST}/out.txt", out)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"stage": "01_dataset"}'])
def test_a_broken_manifest_is_seen_by_run_doctor_and_verify(
    settings: Settings, capsys: pytest.CaptureFixture[str], content: str, tmp_path: Path
):
    batch.run_stages(settings, (FIRST,))
    manifest_path(settings, FIRST).write_text(content, encoding="utf-8")
    broken = walk_back(settings.run_dir).broken
    assert broken is not None
    assert "manifest" in broken.name
    profile = tmp_path / "mine.yaml"
    write_yaml(profile, settings.model_dump())
    main(["doctor", str(profile)])
    assert "manifest.json cannot be read; a run carries the stage out again" in capsys.readouterr().out
    (outcome,) = batch.run_stages(settings, (FIRST,))
    assert outcome.state == "done"
    assert json.loads(manifest_path(settings, FIRST).read_text(encoding="utf-8"))["stage"] == FIRST


def test_doctor_and_verify_look_at_the_same_files(settings: Settings, capsys: pytest.CaptureFixture[str]):
    batch.run_stages(settings, (FIRST, SECOND))
    profile = settings.run_dir.parent.parent / "mine.yaml"
    write_yaml(profile, settings.model_dump())
    for stage in (FIRST, SECOND):
        out = settings.run_dir / stage / "out.txt"
        out.write_text("b", encoding="utf-8")
        assert walk_back(settings.run_dir).broken is not None
        main(["doctor", str(profile)])
        assert "output out.txt changed; a run carries the stage out again" in capsys.readouterr().out
        out.write_text("a", encoding="utf-8")
    assert stale_reason(settings, SECOND) is None
