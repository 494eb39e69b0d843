"""The READMEs: tables as measured, commands as they are, links that lead somewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import tables
from so8t_helpers.__main__ import _parser
from so8t_helpers.settings import PROJECT_ROOT, Settings

READMES = ("README.md", "README.ja.md")


@pytest.mark.parametrize("name", tables.HEADS)
def test_the_tables_are_as_measured(name: str):
    text = (PROJECT_ROOT / name).read_text(encoding="utf-8")
    assert tables.updated(text, name) == text, "run python benchmarks/tables.py"


def test_a_claim_becomes_a_row_and_a_missed_one_says_so(tmp_path: Path):
    claims = [
        {"name": "speed", "value": 1.23456, "bound": 2, "unit": "times", "holds": True},
        {"name": "memory", "value": 3.0, "bound": 1.5, "unit": "GiB", "holds": False},
    ]
    (tmp_path / "x.json").write_text(json.dumps({"claims": claims}), encoding="utf-8")
    text = tables.updated("a\n<!-- claims -->\nold\n<!-- /claims -->\nb", tables.ALL, tmp_path)
    assert "| speed | 1.235 times | 2 | `benchmarks/x.py` |" in text
    assert "| memory | 3 GiB (**missed**) | 1.5 | `benchmarks/x.py` |" in text
    assert "old" not in text
    with pytest.raises(ValueError, match="expected one"):
        tables.updated("no block", tables.ALL, tmp_path)


@pytest.mark.parametrize("name", READMES)
def test_every_verb_setting_and_file_that_a_readme_names_exists(name: str):
    text = (PROJECT_ROOT / name).read_text(encoding="utf-8")
    verbs = set(re.findall(r"run\.py so8t (\w+)", text))
    actions = next(action for action in _parser()._actions if action.dest == "verb")
    assert verbs <= set(actions.choices)
    for section, key in re.findall(r"--(?:set|grid) (?!section)(\w+)\.(\w+)=", text):
        assert key in Settings().model_dump()[section]
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (PROJECT_ROOT / link).exists(), link
    for path in re.findall(r"(?:notebooks|params)/\w+\.(?:ipynb|yaml)", text):
        assert (PROJECT_ROOT / path).is_file(), path


@pytest.mark.parametrize("name", READMES)
def test_the_tree_is_the_house(name: str):
    text = (PROJECT_ROOT / name).read_text(encoding="utf-8")
    tree = next(
        block for block in re.findall(r"```\n(.*?)```", text, re.DOTALL) if "so8t_helpers/\n" in block
    )
    rooms, top = set(), set()
    for line in tree.splitlines():
        (rooms if line.startswith("  ") else top).add(line.split()[0])
    package = PROJECT_ROOT / "so8t_helpers"
    assert rooms == {f"{p.name}/" for p in package.iterdir() if p.is_dir() and (p / "__init__.py").is_file()}
    made = {"runs/<name>/", "reports/<name>/"}
    for entry in top - made:
        assert (PROJECT_ROOT / entry).exists(), entry
    notebooks = {p.stem for p in (PROJECT_ROOT / "notebooks").glob("*.ipynb")}
    assert notebooks <= set(re.findall(r"\w+", tree))
