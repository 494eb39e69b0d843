"""Every expected failure is one line with file or key, said before any long work by run and doctor."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from so8t_helpers.__main__ import main
from tests.bad_inputs import BAD, FOLDERS, Bad, make_good


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_good(tmp_path_factory.mktemp("good"))


def as_options(here: Path, places: Path, chosen: dict[str, object]) -> list[str]:
    """Return the `--set` of a case: runs and reports in `places`, all inputs from `here`."""
    roots = {"run.root": places.as_posix() + "/runs", "run.reports_root": places.as_posix() + "/reports"}
    values = {**roots, "run.notebooks": "HERE/notebooks", **FOLDERS, **chosen}
    texts = {key: json.dumps(value).replace("HERE", here.as_posix()) for key, value in values.items()}
    texts = {key: text.replace("Infinity", ".inf").replace("NaN", ".nan") for key, text in texts.items()}
    return [part for key, text in texts.items() for part in ("--set", f"{key}={text}")]


def test_what_the_table_breaks_is_good(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", "demo", *as_options(good, tmp_path, {})]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.name)
def test_a_bad_input_is_one_line_before_any_long_work(
    case: Bad, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    here, places = tmp_path / "here", tmp_path / "places"
    shutil.copytree(good, here, copy_function=os.link)
    places.mkdir()
    if case.broken is not None:
        case.broken(here)
    options = as_options(here, places, case.chosen)
    assert main(["run", "demo", "--only", case.stage, *options]) == case.status
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("so8t run: ")
    assert re.search(case.says, line), line
    assert list(places.iterdir()) == [], "a refused run leaves nothing behind"
    # doctor finds the same: as a problem among others, or as a profile that cannot be read.
    assert main(["doctor", "demo", *options]) != 0
    said = capsys.readouterr()
    assert re.search(case.says, said.out + said.err), said.out + said.err
