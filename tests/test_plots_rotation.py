"""What the rotation figures show is what the numbers say."""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from matplotlib.colors import to_hex
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from safetensors.numpy import save_file
from scipy.stats import special_ortho_group

from so8t_helpers.explore import block
from so8t_helpers.explore import figures as explore_figures
from so8t_helpers.run.files import StageError
from so8t_helpers.show import style
from so8t_helpers.so8 import figures as plots
from so8t_helpers.so8 import history as so8_history
from so8t_helpers.so8 import rotation
from tests.rotations import write_run


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> so8_history.AngleHistory:
    return so8_history.read_angles(write_run(tmp_path_factory.mktemp("runs")))


def test_drift_and_distance_start_at_zero_and_find_the_layer_that_moved(history: so8_history.AngleHistory):
    assert history.drift.shape == (6, 3)
    assert history.drift[0].max() == 0
    assert history.distance[0].max() == 0
    assert history.drift[-1, 0] == 0  # the first layer was made to stand still
    assert history.drift[-1].argmax() == 2
    # Snapshot 3, layer 1, block 4, by hand.
    start, end = (
        scipy.linalg.expm(rotation.skew(torch.from_numpy(history.free[s, 1, 4])).double().numpy())
        for s in (0, 3)
    )
    expected = np.linalg.norm(scipy.linalg.logm(start.T @ end))
    assert history.distance[3, 1, 4] == pytest.approx(expected, abs=1e-5)  # the blocks are float32
    degrees = np.rad2deg(history.angles)
    assert history.drift[3, 1] == pytest.approx(np.abs(degrees[3, 1] - degrees[0, 1]).mean(), rel=1e-5)


def test_blocks_that_moved_most(history: so8_history.AngleHistory):
    table = so8_history.most_moved(history, 5)
    assert table["layer"].iloc[0] == 5  # its number in the model, not its row
    assert table["distance (rad)"].is_monotonic_decreasing
    assert table["distance (rad)"].iloc[0] == history.distance[-1].max()


def test_the_heat_map_holds_the_drift(history: so8_history.AngleHistory):
    figure = plots.drift_heatmap(history)
    (image,) = figure.axes[0].get_images()
    np.testing.assert_array_equal(image.get_array(), history.drift.T)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["1", "3", "5"]


def test_random_rotations_lie_on_the_haar_curve():
    matrices = special_ortho_group.rvs(8, size=3000, random_state=1)
    logarithms = np.stack([scipy.linalg.logm(m).real for m in matrices[:300]])
    rows, columns = np.triu_indices(8, 1)
    free = logarithms[:, rows, columns].astype(np.float32)[None, None].repeat(2, axis=0)
    angles = rotation.principal_angles(torch.from_numpy(free)).numpy()
    random = so8_history.AngleHistory(np.array([0, 1]), np.array([0]), free, angles)
    ax = plots.angle_distribution(random).axes[0]
    (curve,) = [line for line in ax.get_lines() if len(line.get_xdata()) > 2]
    (now,) = [patch for patch in ax.patches if patch.get_label() == "at this step"]
    density, edges, _ = now.get_data()
    wide = density.reshape(9, 10).mean(axis=1)  # bins of 20 degrees: about 130 angles each
    expected = np.interp((edges[:-1] + edges[1:]) / 2, curve.get_xdata(), curve.get_ydata())
    np.testing.assert_allclose(wide, expected.reshape(9, 10).mean(axis=1), rtol=0.35)  # 4 standard errors


def test_every_figure_becomes_a_small_svg(history: so8_history.AngleHistory):
    figures = [
        plots.drift_heatmap(history),
        plots.drift_distribution(history),
        plots.angle_distribution(history),
        plots.geodesic_by_layer(history),
        block.block(history, -1, 2, 0),
    ]
    svgs = [style.to_svg(figure, "rotations") for figure in figures]
    assert len(set(svgs)) == len(svgs)
    assert max(map(len, svgs)) < 250_000


def test_one_block_shows_its_matrix_and_its_angles(history: so8_history.AngleHistory):
    figure = block.block(history, 4, 2, 7)
    matrix, circle, way = figure.axes
    shown = matrix.get_images()[0].get_array()
    np.testing.assert_allclose(shown, history.matrix(4, 2, 7))
    (values,) = [c for c in matrix.collections if len(c.get_paths()) == 64]
    np.testing.assert_array_equal(values.get_offsets()[11], (3, 1))  # column, row
    assert style.ON_DARK in {to_hex(color) for color in values.get_facecolor()[::9]}  # the dark diagonal
    assert {t.get_text() for t in circle.texts} >= set(block.ANGLE_NAMES)
    (angles,) = [c for c in circle.collections if len(c.get_paths()) == 4]
    assert angles.get_offsets()[0][0] < angles.get_offsets()[1][0]
    np.testing.assert_allclose(way.get_lines()[0].get_ydata(), history.degrees[:, 2, 7, 0])


def test_the_unit_circle_shows_and_writes_the_angles(history: so8_history.AngleHistory):
    _, ax = style.new_figure()
    circle = block.UnitCircle(ax)
    circle.update(history.angles[4, 2, 7], history.angles[0, 2, 7])
    assert circle.readings == [f"{degrees:.2f}°" for degrees in history.degrees[4, 2, 7]]
    x, y = circle.now[0].get_data()
    np.testing.assert_allclose(np.arctan2(y, x), history.angles[4, 2, 7, 0] * np.array([1, -1]), rtol=1e-5)
    # One outline a number, as wide as the text that matplotlib would draw.
    for text, outline in zip(circle.readings, circle.values.get_paths(), strict=True):
        drawn = TextPath((0, 0), text, size=9, prop=FontProperties(family="DejaVu Sans"))
        assert outline.get_extents().width == pytest.approx(drawn.get_extents().width, rel=0.03)


def test_matrix_cells_read_alike_at_any_sign():
    assert [block.cell_text(v) for v in (1.0, 0.5, -0.25, -0.001, -1.0)] == [
        "1.00",
        ".50",
        "−.25",
        ".00",
        "−1.00",
    ]


def test_a_fast_redraw_is_the_same_picture_as_a_first_drawing(history: so8_history.AngleHistory):
    moved = explore_figures.ExplorerFigure(history)
    moved.update(0, 0, 0)
    before = moved.jpeg()
    moved.update(4, 2, 7)
    fresh = explore_figures.ExplorerFigure(history)
    fresh.update(4, 2, 7)
    assert moved.jpeg() == fresh.jpeg() != before


def test_summary_names_run_and_layer(history: so8_history.AngleHistory):
    text = so8_history.summary(history, "probe")
    assert "`probe`" in text
    assert "most in layer 5" in text


def test_missing_and_foreign_files(tmp_path: Path):
    with pytest.raises(StageError, match="02_train writes it"):
        so8_history.read_angles(tmp_path / "angles.safetensors")
    save_file({"steps": np.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(StageError, match="no tensor"):
        so8_history.read_angles(tmp_path / "other.safetensors")
