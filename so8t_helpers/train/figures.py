"""What 02_train's notebook shows: chosen settings, metrics, losses, learning rate, throughput, drift."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from so8t_helpers.run.files import read_jsonl
from so8t_helpers.run.origin import public_name
from so8t_helpers.settings import Settings
from so8t_helpers.show.style import COLORS, INK, SERIES, log_where_wide, new_figure
from so8t_helpers.so8.history import AngleHistory, read_angles
from so8t_helpers.train.heldout import PARTS


def chosen(settings: Settings) -> pd.DataFrame:
    """Return the settings that decide the course of the training, one a row."""
    t, gates, phases, lora = settings.training, settings.so8t, settings.pet, settings.lora
    start = f"start from N(0, {gates.init_scale}²)" if gates.init_scale else "start at the identity"
    lambdas = (phases.lambda_exploration, phases.lambda_transition, phases.lambda_stabilization)
    rate = t.learning_rate
    stable = ", rank-stabilised" if lora.rslora else ""
    b_rate = f" (B {lora.b_rate:g})" if lora.b_rate else ""
    rows = {
        "base": f"{public_name(settings.model.base)}, {settings.model.quantization}",
        "LoRA": f"r = {lora.r}, α = {lora.alpha}{stable}, dropout {lora.dropout}",
        "gates": f"layers {gates.layer_indices or 'all'}, {start}" if gates.enabled else "none",
        "PET λ": ", ".join(map(str, lambdas)) + " of the relative penalty" * phases.relative,
        "learning rate": f"LoRA {rate:g}{b_rate}, gates {gates.learning_rate or rate:g}",
        "step": f"{t.gradient_accumulation} × {t.batch_size} sequences of {t.sequence_length:,} tokens",
        "kept": f"the {t.keep} adapter" + (f", patience {t.patience}" if t.patience else ""),
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


def read_held_out(settings: Settings) -> pd.DataFrame:
    """Return the held-out losses of a finished training, one look a row; empty where none was taken."""
    path = settings.run_dir / "02_train" / "heldout.parquet"
    return pd.read_parquet(path) if path.is_file() else pd.DataFrame()


def read_samples(settings: Settings) -> pd.DataFrame:
    """Return what the model wrote during a finished training, one answer a row; empty where it wrote none."""
    path = settings.run_dir / "02_train" / "samples.jsonl"
    return pd.DataFrame(read_jsonl(path)) if path.is_file() else pd.DataFrame()


def losses(metrics: pd.DataFrame, held_out: pd.DataFrame | None = None) -> Figure:
    """Task loss above, PET loss below, coloured by phase, with the steps at which lambda changes.

    The held-out loss stands over the task loss, its best marked.

    Args:
        metrics: 02_train's metrics.parquet; PET is left out where `pet_loss` holds no number.
    """
    with_pet = bool(metrics["pet_loss"].notna().any())
    fig, axes = new_figure(height=4.6 if with_pet else 2.9, nrows=1 + with_pet, sharex=True, squeeze=False)
    task = axes[0, 0]
    _noisy_line(task, metrics["step"], metrics["task_loss"], COLORS["task_loss"])
    task.set(title="Task loss on the assistant's tokens", ylabel="nats per token")
    shown = [metrics["task_loss"]]
    if held_out is not None and len(held_out):
        shown.append(held_out["loss"])
        best = held_out.sort_values("loss").iloc[0]
        label = f"held-out, best {best['loss']:.3g} at step {best['step']:.0f}"
        task.plot(held_out["step"], held_out["loss"], "o-", color=COLORS["bad"], markersize=4, label=label)
        task.plot(best["step"], best["loss"], "o", color=COLORS["bad"], markersize=9, fillstyle="none")
        task.legend()
    log_where_wide(task, shown)
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


def held_out_parts(held_out: pd.DataFrame) -> Figure:
    """Held-out loss of thinking, decision and final part on the left, right decisions on the right."""
    fig, (parts, decisions) = new_figure(height=2.9, ncols=2)
    for name, color in zip(PARTS, SERIES, strict=False):
        if held_out[name].notna().any():
            parts.plot(held_out["step"], held_out[name], "o-", markersize=3, color=color, label=name)
    parts.set(title="Held-out loss by part", xlabel="optimizer step", ylabel="nats per token")
    log_where_wide(parts, [held_out[name].dropna() for name in PARTS])
    parts.legend()
    _shares(decisions, held_out["step"], {"of the four labels": held_out["decision_right"]})
    decisions.set_title("Decisions that would be right")
    return fig


def answer_shares(samples: pd.DataFrame) -> Figure:
    """Shares of the answers in format, and with the right decision, over the steps."""
    by_step = samples.assign(right=samples["decision"] == samples["label"]).groupby("step")
    fig, ax = new_figure(height=2.5)
    shares = by_step[["well_formed", "right"]].mean()
    lines = {"in format": shares["well_formed"], "right decision": shares["right"]}
    _shares(ax, shares.index.to_series(), lines)
    ax.set_title(f"What the model writes: {by_step.size().iloc[-1]} held-out prompts")
    return fig


def answers(samples: pd.DataFrame) -> pd.DataFrame:
    """Return the last answers, the final part alone."""
    step = samples["step"].max()
    table = samples.loc[samples["step"] == step, ["question", "label", "decision", "final"]].fillna("–")
    return table.rename(columns={"decision": "stated", "final": f"final part at step {step}"})


def verdict(facts: dict[str, Any]) -> str:
    """Say in a sentence whether the training overfits, by the loss on held-out samples."""
    if "overfits" not in facts:
        return "Without held-out samples nobody can say whether it overfits."
    last, best, step = facts["last held-out loss"], facts["best held-out loss"], facts["best step"]
    if not facts["overfits"]:
        return f"On held-out samples the loss ended at {last:.3f} (best {best:.3f}): no overfitting."
    kept = facts["kept held-out loss"] == best
    remedy = "the adapter of that step was kept" if kept else "set `training.keep: best`, or train less"
    return (
        f"**It overfits:** on held-out samples the loss was lowest at step {step:,} ({best:.3f}) and then "
        f"changed by {facts['held-out loss after its best']} nats a token; {remedy}."
    )


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


def _shares(ax: Axes, steps: pd.Series, lines: dict[str, pd.Series]) -> None:
    """Draw shares from 0 to 1 over the steps."""
    for (name, values), color in zip(lines.items(), SERIES, strict=False):
        ax.plot(steps, values, "o-", markersize=3, color=color, label=name)
    ax.set(xlabel="optimizer step", ylabel="share", ylim=(-0.03, 1.03), xlim=(0, None))
    ax.legend()
