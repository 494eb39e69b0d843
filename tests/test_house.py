"""The house is as its plan says: few modules at the root, every room there, no file too long to read."""

from __future__ import annotations

from so8t_helpers.settings import PROJECT_ROOT

HOUSE = PROJECT_ROOT / "so8t_helpers"
STAGES = {"dataset", "train", "bake", "gguf", "evaluate"}
HIGHER, LOWER = {"verbs", "service", "explore", "study"}, {"engines", "report", "demo", "run", "show"}
ROOMS = HIGHER | STAGES | LOWER | {"thinking", "phi3", "so8"}
MOST_LINES = 320


def test_five_modules_stand_at_the_root_and_every_room_is_there():
    assert {path.stem for path in HOUSE.glob("*.py")} == {
        "__init__",
        "__main__",
        "sections",
        "settings",
        "notebook",
    }
    assert {path.parent.name for path in HOUSE.glob("*/__init__.py")} == ROOMS


def test_each_stage_is_one_call_and_its_figures():
    for stage in STAGES:
        assert (HOUSE / stage / "stage.py").is_file()
        assert (HOUSE / stage / "figures.py").is_file()


def test_no_file_is_too_long_to_read():
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in HOUSE.glob("**/*.py")}
    assert len(lengths) > 100
    too_long = {str(path.relative_to(HOUSE)): n for path, n in lengths.items() if n > MOST_LINES}
    assert too_long == {}
