"""What 02_train's notebook shows: chosen settings, metrics, losses, learning rate, throughput, drift."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from so8t_helpers.settings import Settings
from so8t_helpers.show.style import COLORS, INK, log_where_wide, new_figure
from so8t_helpers.so8.history import AngleHistory, read_angles


def chosen(settings: Settings) -> pd.DataFrame:
    """Return the settings that decide the course of the training, one a row."""
    t, gates, phases = settings.training, settings.so8t, settings.pet
    rows = {
        "base": f"{settings.model.base}, {settings.model.quantization}",
        "LoRA": f"r = {settings.lora.r}, α = {settings.lora.alpha}, dropout {settings.lora.dropout}",
        "gates": f"layers {gates.layer_indices or 'all'}, start from N(0, {gates.init_scale}²)",
        "PET λ": f"{phases.lambda_exploration}, {phases.lambda_transition}, {phases.lambda_stabilization}",
        "step": f"{t.gradient_accumulation} × {t.batch_size} sequences of {t.sequence_length:,} tokens",
    }
    return pd.DataFrame(rows.items(), columns=["what", "setting"])


def outcome(facts: dict[str, Any]) -> pd.DataFrame:
    """Return what `stage.train` says of the training, one fact a row."""
    return pd.DataFrame(facts.items(), columns=["what", "value"])


def read_metrics(settings: Settings) -> pd.DataFrame:
    """Return the metrics of a finished training, one optimizer step a row."""
    return pd.read_parquet(settings.run_dir / "02_train" / "metrics.parquet")


def read_history(settings: Settings) -> AngleHistory | None:
    """Return what a finished training left of its rotations, None without gates."""
    path = settings.run_dir / "02_train" / "angles.safetensors"
    return read_angles(path) if settings.so8t.enabled else None


def losses(metrics: pd.DataFrame) -> Figure:
    """Task loss above, PET loss below, coloured by phase, with the steps at which lambda changes.

    Args:
        metrics: 02_train's metrics.parquet; PET is left out where `pet_loss` holds no number.
    """
    with_pet = bool(metrics["pet_loss"].notna().any())
    fig, axes = new_figure(height=4.6 if with_pet else 2.9, nrows=1 + with_pet, sharex=True, squeeze=False)
    task = axes[0, 0]
    _noisy_line(task, metrics["step"], metrics["task_loss"], COLORS["task_loss"])
    task.set(title="Task loss on the assistant's tokens", ylabel="nats per token")
    log_where_wide(task, [metrics["task_loss"]])
    last = float(metrics["task_loss"].tail(max(1, len(metrics) // 25)).median())
    task.annotate(
        f"{last:.3g}",
        (float(metrics["step"].iloc[-1]), last),
        (5, 0),
        textcoords="offset points",
        va="center",
        color=INK,
        annotation_clip=False,
    )
    if with_pet:
        pet = axes[1, 0]
        for phase, rows in metrics.groupby("pet_phase", sort=False):
            pet.plot(rows["step"], rows["pet_loss"], color=COLORS[str(phase)])
            first = rows.iloc[0]
            pet.annotate(
                f"{phase}\nλ = {first['pet_lambda']:g}",
                (first["step"], 1.0),
                (3, -3),
                xycoords=pet.get_xaxis_transform(),
                textcoords="offset points",
                va="top",
                fontsize=9,
                color=INK,
            )
            for ax in (task, pet):
                ax.axvline(first["step"], color=COLORS[str(phase)], linewidth=1, linestyle=":")
        pet.set(title="PET loss (before λ)", ylabel="mean square")
        pet.margins(y=0.35)
    axes[-1, 0].set_xlabel("optimizer step")
    return fig


def learning_rate_and_norm(metrics: pd.DataFrame) -> Figure:
    """Learning rate and gradient norm (before clipping) over the steps, side by side."""
    fig, (rate, norm) = new_figure(height=2.7, ncols=2)
    rate.plot(metrics["step"], metrics["lr"], color=COLORS["accent"])
    rate.set(title="Learning rate", xlabel="optimizer step", ylim=(0, None))
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    _noisy_line(norm, metrics["step"], metrics["grad_norm"], COLORS["accent_2"])
    norm.set(title="Gradient norm", xlabel="optimizer step", ylim=(0, None))
    return fig


def throughput(metrics: pd.DataFrame) -> Figure:
    """Tokens a second over the steps, with the median."""
    fig, ax = new_figure(height=2.5)
    median = float(metrics["tokens_per_s"].median())
    ax.plot(metrics["step"], metrics["tokens_per_s"], color=COLORS["accent"], linewidth=1)
    ax.axhline(median, color=INK, linestyle="--", linewidth=1)
    ax.set(xlabel="optimizer step", ylabel="tokens per second", ylim=(0, None))
    ax.set_title(f"Throughput: median {median:,.0f} tokens per second")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    return fig


def _noisy_line(ax: Axes, x: pd.Series, y: pd.Series, color: str) -> None:
    """Draw the values faintly and their running median on top."""
    window = max(3, len(y) // 25)
    ax.plot(x, y, color=color, linewidth=0.8, alpha=0.35, label="_")
    ax.plot(x, y.rolling(window, center=True, min_periods=1).median(), color=color, label="_")
