"""The training figures show the columns of metrics.parquet."""

import numpy as np
import pandas as pd
import pytest

from so8t_helpers.show import style
from so8t_helpers.train import figures as train_figures


@pytest.fixture
def metrics() -> pd.DataFrame:
    steps = np.arange(1, 51)
    return pd.DataFrame(
        {
            "step": steps,
            "task_loss": 3 / steps,
            "pet_loss": 1 / steps,
            "pet_lambda": np.repeat([0.01, 0.05, 0.1], [10, 20, 20]),
            "pet_phase": np.repeat(["exploration", "transition", "stabilization"], [10, 20, 20]),
            "lr": np.linspace(1e-3, 0, 50),
            "grad_norm": np.ones(50),
            "tokens_per_s": np.linspace(900, 1100, 50),
        }
    )


def test_pet_is_coloured_by_phase_and_says_its_lambda(metrics: pd.DataFrame):
    task, pet = train_figures.losses(metrics).axes
    drawn = {line.get_color(): line for line in pet.get_lines() if len(line.get_xdata()) > 2}
    assert set(drawn) == {style.COLORS[p] for p in ("exploration", "transition", "stabilization")}
    np.testing.assert_array_equal(drawn[style.COLORS["transition"]].get_xdata(), np.arange(11, 31))
    assert [t.get_text() for t in pet.texts] == [
        "exploration\nλ = 0.01",
        "transition\nλ = 0.05",
        "stabilization\nλ = 0.1",
    ]
    np.testing.assert_array_equal(task.get_lines()[0].get_ydata(), metrics["task_loss"])


def test_without_pet_there_is_one_panel(metrics: pd.DataFrame):
    assert len(train_figures.losses(metrics.assign(pet_loss=np.nan)).axes) == 1


def test_throughput_states_the_median(metrics: pd.DataFrame):
    assert "1,000 tokens per second" in train_figures.throughput(metrics).axes[0].get_title(loc="left")


def test_rate_and_norm_show_their_columns(metrics: pd.DataFrame):
    rate, norm = train_figures.learning_rate_and_norm(metrics).axes
    np.testing.assert_array_equal(rate.get_lines()[0].get_ydata(), metrics["lr"])
    np.testing.assert_array_equal(norm.get_lines()[0].get_ydata(), metrics["grad_norm"])


def test_a_run_of_one_step_can_be_drawn(metrics: pd.DataFrame):
    for figure in (train_figures.losses, train_figures.learning_rate_and_norm, train_figures.throughput):
        assert style.to_svg(figure(metrics.head(1)), "one step")
