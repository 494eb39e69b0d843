"""Windows' rules hold in the tests; what waits for a file that is held open waits no longer than it must."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from so8t_helpers.run import files
from so8t_helpers.run.files import StageError, atomic_directory, remove, replace, write_text
from so8t_helpers.run.records import Status, read_status, write_status
from so8t_helpers.settings import Settings, merge
from so8t_helpers.train import workers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file({"x": torch.ones(8)}, folder / "a.safetensors")
    return folder / "a.safetensors"


def refused(action: str, file: Path) -> None:
    """Each way to make a file go is refused, and it stays."""
    other = file.parents[1] / "other"
    other.write_bytes(b"")
    ways = {
        "remove": file.unlink,
        "rename": lambda: file.rename(file.with_name("b")),
        "replace": lambda: other.replace(file),
        "rename its folder": lambda: file.parent.rename(file.parents[1] / "moved"),
        "remove its folder": lambda: files.shutil.rmtree(file.parent),
    }
    for way, act in ways.items():
        with pytest.raises(PermissionError, match=action):
            act()
        assert file.is_file(), way


def test_a_file_that_is_open_or_mapped_stays(file: Path):
    with file.open("rb"):
        refused("has it open", file)
    tensors = load_file(file)
    refused("has it mapped", file)
    with pytest.raises(PermissionError, match="has it mapped"):
        file.write_bytes(b"")
    del tensors
    remove(file.parent)
    assert not file.parent.exists()


def test_a_file_that_a_child_holds_open_stays(file: Path):
    code = "import sys; f = open(sys.argv[1], 'rb'); print('open', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"open\n"
        refused(f"process {child.pid} has it open", file)
        child.communicate()
    remove(file)
    assert not file.exists()


def test_a_child_keeps_to_the_rules_too(file: Path):
    code = "import os, sys; f = open(sys.argv[1], 'rb'); os.remove(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=False
    )
    assert "PermissionError: [Errno 13] Windows would refuse this" in done.stderr
    assert file.is_file()


@pytest.mark.parametrize("name", ["a:b", "a?", "con", "nul.txt", "COM1.json", "dot.", "blank ", "a" * 240])
def test_names_that_windows_does_not_take(tmp_path: Path, name: str):
    for make in (lambda path: path.write_bytes(b""), lambda path: path.mkdir()):
        with pytest.raises(OSError, match="Windows would refuse this"):
            make(tmp_path / name)
    (tmp_path / "実験 フォルダ").mkdir()
    (tmp_path / "console.json").write_bytes(b"")


def test_text_of_ours_has_an_encoding(tmp_path: Path):
    """A module of ours that leaves it out fails where Python looks for it, as `run.py test` has it do."""
    code = "import pathlib, sys; exec(compile('p.write_text(str(1))', 'x', 'exec'), {'p': "
    code += "pathlib.Path(sys.argv[1]), '__name__': 'so8t_helpers.x'})"
    command = [sys.executable, "-X", "warn_default_encoding", "-c", code, str(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "EncodingWarning: 'encoding' argument not specified" in done.stderr
    assert done.returncode == 1


def test_what_a_reader_holds_open_is_replaced_when_the_reader_is_done(file: Path, tmp_path: Path):
    reader = file.open("rb")
    threading.Timer(0.3, reader.close).start()
    started = time.monotonic()
    write_text(file, "new")
    assert 0.2 < time.monotonic() - started < files.PATIENCE_SECONDS
    assert file.read_text(encoding="utf-8") == "new"
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_what_stays_open_is_an_error_that_says_what_to_do(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "PATIENCE_SECONDS", 0.1)
    told = rf"{file}: another program has it open .*; end that and give the same command again"
    with file.open("rb"):
        with pytest.raises(StageError, match=told):
            remove(file.parent)
        with pytest.raises(StageError, match=told), atomic_directory(file.parent) as scratch:
            (scratch / "new").touch()
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert [path.name for path in file.parents[1].iterdir()] == ["folder"]


def test_a_refusal_that_is_none_of_windows_is_raised_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", refuse)
    started = time.monotonic()
    with pytest.raises(PermissionError):
        replace(tmp_path / "a", tmp_path / "b")
    assert time.monotonic() - started < 1


def test_no_status_write_ends_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "PATIENCE_SECONDS", 0.1)
    first = Status("02_train", "", "running", 1, 2, "step", None, {}, os.getpid(), time.time())
    write_status(tmp_path, first)
    path = tmp_path / ".status.json"
    with path.open(encoding="utf-8") as reader:
        write_status(tmp_path, Status(**json.loads(reader.read()) | {"done": 2}))
        assert read_status(tmp_path) == first
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    write_status(path, first)  # no folder at all


def test_several_workers_are_refused_on_windows(scratch_settings: Settings, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "platform", "win32")
    workers.check_cards(scratch_settings)
    with pytest.raises(StageError, match=r"run\.processes: 2 workers cannot find each other on Windows"):
        workers.check_cards(merge(scratch_settings, {"run": {"processes": 2}}))
