"""What others do to a run: a port that is taken, no network, a neighbour that was killed half way."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from so8t_helpers.__main__ import main
from so8t_helpers.run.files import write_yaml
from so8t_helpers.run.stage import STAGES
from so8t_helpers.verbs import batch
from tests.small_notebooks import code, small_settings, write_notebook


def test_a_port_that_another_program_has_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "x-q8_0.gguf").touch()  # the port comes before the model
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        chosen = {"eval.gguf_dir": tmp_path, "serve.model": "q8_0", "serve.port": port, "run.root": tmp_path}
        options = [part for key, value in chosen.items() for part in ("--set", f"{key}={value}")]
        assert main(["serve", "demo", *options]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"so8t serve: serve.port {port}: cannot listen on 127.0.0.1")


def test_a_hub_id_without_a_network_is_one_line(tmp_path: Path):
    asks = (
        "import sys; from pathlib import Path; from so8t_helpers.phi3.source import base_folder\n"
        "from so8t_helpers.settings import SettingsError, load_settings\n"
        "try: base_folder(load_settings('demo', {'model': {'base': 'owner/name'}}))\n"
        "except SettingsError as error: sys.exit(str(error))"
    )
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", asks],
        env=os.environ | nowhere,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    last = done.stderr.splitlines()[-1]
    assert last.startswith("model.base: 'owner/name' is neither a folder nor could it be fetched"), (
        done.stderr
    )
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_run_that_dies_while_it_makes_the_shared_base_leaves_it_to_the_other(tmp_path: Path):
    """Two names share what is made once: the other waits, and makes it whole when the first was killed."""
    makes = (
        "import sys, time; from pathlib import Path; from so8t_helpers.run.files import make_once\n"
        "def make(folder):\n"
        "    (folder / 'half').touch(); print('begun', flush=True); time.sleep(float(sys.argv[2]))\n"
        "    (folder / 'whole').touch()\n"
        "make_once(Path(sys.argv[1]), make)"
    )
    command = [sys.executable, "-c", makes, str(tmp_path / "base")]
    first = subprocess.Popen([*command, "600"], stdout=subprocess.PIPE)
    assert first.stdout is not None
    assert first.stdout.readline() == b"begun\n"
    second = subprocess.Popen([*command, "0"], stdout=subprocess.PIPE)
    assert second.stdout is not None
    time.sleep(1)
    assert second.poll() is None, "it waits for the first"
    first.kill()
    assert second.wait(60) == 0
    assert sorted(path.name for path in (tmp_path / "base").iterdir()) == ["half", "whole"]
    assert list(tmp_path.glob(".*.tmp")) == [], "what the first had not finished is gone"
    for process in (first, second):
        process.communicate()


def test_what_a_killed_stage_had_not_finished_goes_with_the_next_run(tmp_path: Path):
    """Each kill would else leave gigabytes: an unfinished GGUF file, the states of an optimizer."""
    settings, stage = small_settings(tmp_path), STAGES[0]
    write_notebook(tmp_path / "notebooks", stage)
    state = settings.run_dir / stage / "checkpoints" / ".step-0000002.abcdefgh.tmp" / "state.json"
    state.parent.mkdir(parents=True)
    state.touch()
    (settings.run_dir / stage / ".x-f16.gguf.abcdefgh.tmp").touch()
    (outcome,) = batch.run_stages(settings, (stage,))
    assert outcome.state == "done"
    assert list(settings.run_dir.rglob("*.tmp")) == []


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a disk of its own")
def test_a_disk_that_fills_up_under_a_notebook_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(disk)], check=True)
    try:
        settings, stage = small_settings(disk), STAGES[0]
        filled = f"file = open({str(disk / 'filler')!r}, 'wb', 0)\nwhile file.write(bytes(4096)): pass"
        write_notebook(
            disk / "notebooks", stage, code(filled, "raises-exception"), code("print('x' * 10**5)")
        )
        profile = tmp_path / "mine.yaml"
        write_yaml(profile, settings.model_dump())
        assert main(["run", str(profile), "--only", stage]) == 3
        *_, line = capsys.readouterr().err.splitlines()  # before it is what runs
        assert line.startswith(f"so8t run: run demo in {settings.run_dir}: no room on the disk")
        (disk / "filler").unlink()
        write_notebook(disk / "notebooks", stage)
        assert main(["run", str(profile), "--only", stage]) == 0
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_data_set_that_stops_a_later_stage_is_said_before_the_training(tmp_path: Path):
    settings = small_settings(tmp_path)
    for stage in STAGES:
        write_notebook(tmp_path / "notebooks", stage)
    empty = code(f"(settings.run_dir / '{STAGES[0]}' / 'eval.jsonl').touch()")
    write_notebook(tmp_path / "notebooks", STAGES[0], empty)
    outcomes = batch.run_stages(settings)
    assert [(outcome.stage[:2], outcome.state) for outcome in outcomes] == [("01", "done"), ("03", "failed")]
    assert "eval.jsonl: holds no row" in outcomes[1].detail
    assert "raise dataset.eval_share" in outcomes[1].detail
