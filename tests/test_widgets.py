"""The explorer's widgets change what they should; the browser test drives them in JupyterLab."""

from pathlib import Path

import pytest

from so8t_helpers.explore.widgets import NOTHING, Explorer, load_history, nearest, runs_with_angles
from so8t_helpers.run.files import StageError
from so8t_helpers.so8.history import most_moved
from tests.rotations import write_run


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_run(tmp_path, "demo")
    write_run(tmp_path, "other", snapshots=4, layers=2, blocks=4, seed=1)
    (tmp_path / "unfinished" / "02_train").mkdir(parents=True)
    return tmp_path


def test_runs_are_those_with_rotations(root: Path, tmp_path: Path):
    assert runs_with_angles(root) == ["demo", "other"]
    with pytest.raises(StageError, match="run 02_train first"):
        runs_with_angles(tmp_path / "nowhere")


def test_it_opens_on_the_block_that_moved_most_at_the_last_step(root: Path):
    explorer = Explorer(root, "demo")
    top = most_moved(explorer.first.history, 1).iloc[0]
    assert explorer.first.history.layers[explorer.layer.value] == top["layer"]
    assert explorer.block.value == top["block"]
    assert explorer.step.label == "50"
    assert bytes(explorer.first.image.value).startswith(b"\xff\xd8")


@pytest.mark.parametrize("control", ["layer", "block", "step"])
def test_each_slider_changes_the_figure_and_the_note(root: Path, control: str):
    explorer = Explorer(root, "demo")
    picture, note = explorer.first.image.value, explorer.first.note.value
    slider = getattr(explorer, control)
    slider.value = 1 if slider.value != 1 else 0
    assert explorer.first.image.value != picture
    assert explorer.first.note.value != note


def test_a_click_jumps_to_a_block_and_draws_once(root: Path):
    explorer = Explorer(root, "demo")
    drawn: list[object] = []
    explorer.first.image.observe(drawn.append, "value")
    layer, block = explorer.moved.options[2][1]
    explorer.moved.value = (layer, block)
    assert (explorer.layer.value, explorer.block.value) == (layer, block)
    assert len(drawn) == 1


def test_another_run_brings_its_own_sizes(root: Path):
    explorer = Explorer(root, "demo")
    explorer.run.value = "other"
    assert explorer.block.max == 3
    assert [label for label, _ in explorer.layer.options] == ["1", "3"]
    assert explorer.step.label == "30"


def test_two_runs_stand_side_by_side(root: Path):
    explorer = Explorer(root, "demo")
    assert explorer.second.layout.display == "none"
    explorer.other.value = "other"
    assert explorer.second.layout.display != "none"
    before = explorer.second.image.value
    explorer.step.value = 0
    assert explorer.second.image.value != before
    for note, name in ((explorer.first.note, "demo"), (explorer.second.note, "other")):
        assert f"<b>{name}</b>" in note.value
    for axes in zip(explorer.first.figure.figure.axes, explorer.second.figure.figure.axes, strict=True):
        if axes[0].get_ylabel().startswith(("θ", "$")):
            assert axes[0].get_ylim() == axes[1].get_ylim()
    explorer.other.value = NOTHING
    assert explorer.second.layout.display == "none"


def test_the_place_in_another_run_is_the_nearest(root: Path):
    demo, other = load_history(root, "demo"), load_history(root, "other")
    # demo: steps 0..50, layers 1 3 5, 8 blocks; other: steps 0..30, layers 1 3, 4 blocks.
    assert nearest(other, demo, 5, 2, 7) == (3, 1, 3)
    assert nearest(other, demo, 1, 0, 2) == (1, 0, 2)


def test_a_run_trained_again_is_read_again(root: Path):
    first = load_history(root, "demo")
    assert load_history(root, "demo") is first
    write_run(root, "demo", seed=5)
    assert (load_history(root, "demo").free != first.free).any()
