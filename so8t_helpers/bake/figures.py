"""Figures of 03_bake: what baking costs, what rounding costs, and how well each rotation and weight holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from so8t_helpers.phi3.shape import LINEARS
from so8t_helpers.show.style import COLORS, new_figure


def logit_differences(proof: dict[str, Any]) -> Figure:
    """Distribution of |difference of logits|: baking against rounding to 16 bits, with the bound."""
    fig, ax = new_figure()
    edges = 10.0 ** np.array(proof["histogram_edges_log10"])
    names = {"baking": ("baking (float32)", "baked"), "rounding": ("rounding to 16 bits", "accent_2")}
    for key, (label, color) in names.items():
        facts = proof["logits"][key]
        share = np.array(facts["histogram"]) / max(1, sum(facts["histogram"]))
        ax.stairs(share, edges, fill=True, alpha=0.5, color=COLORS[color])
        ax.stairs(share, edges, color=COLORS[color], label=f"{label}: at most {facts['largest']:.1e}")
    ax.axvline(proof["bounds"]["logits"], color=COLORS["edge"], linestyle="--", label="bound of baking")
    ax.set(xscale="log", xlabel="|difference of a logit|", ylabel="share of all logits")
    fig.legend(loc="outside upper left", ncols=2)
    return fig


def o_proj_differences(proof: dict[str, Any]) -> Figure:
    """Largest difference of each layer's o_proj output, gated against baked on the same input."""
    fig, ax = new_figure(height=3.0)
    layers = pd.DataFrame(proof["layers"])
    gated = layers["orthogonality"].notna()
    for chosen, label, marker in ((gated, "with a gate", "o"), (~gated, "without", "x")):
        part = layers[chosen]
        if len(part):
            ax.plot(part["layer"], _positive(part["o_proj_difference"]), marker, label=label)
    _by_layer(fig, ax, proof["bounds"]["logits"], "largest |difference|\nof o_proj's output")
    return fig


def weight_errors(proof: dict[str, Any]) -> Figure:
    """Relative error of each changed weight against float64: before rounding (filled) and in the file."""
    fig, ax = new_figure(height=3.4)
    for module, rows in pd.DataFrame(proof["weights"]).groupby("module", sort=False):
        color = COLORS[f"theta_{1 + LINEARS.index(str(module))}"]
        ax.plot(rows["layer"], _positive(rows["baked_error"]), "o", color=color, label=str(module))
        ax.plot(rows["layer"], _positive(rows["stored_error"]), "_", color=color, markersize=9)
    ax.set_title("●  float32, before rounding      —  as stored", fontsize=9.5)
    _by_layer(fig, ax, proof["bounds"]["layers"], "‖W′ − (W + sBA)R‖ / ‖W‖")
    return fig


def rotation_errors(proof: dict[str, Any]) -> Figure:
    """How far each layer's rotations are from orthogonal and from determinant one."""
    fig, ax = new_figure(height=3.0)
    gated = pd.DataFrame(proof["layers"]).dropna(subset="orthogonality")
    ax.plot(gated["layer"], _positive(gated["orthogonality"]), "o", label="largest |RᵀR − 1|")
    ax.plot(gated["layer"], _positive(gated["determinant"]), "s", label="largest |det R − 1|")
    _by_layer(fig, ax, proof["bounds"]["layers"], "error")
    return fig


def folder_table(folder: Path) -> pd.DataFrame:
    """One row a file of the baked folder: its name and bytes."""
    files = sorted(folder.iterdir())
    return pd.DataFrame({"file": [p.name for p in files], "bytes": [p.stat().st_size for p in files]})


def logit_table(proof: dict[str, Any]) -> pd.DataFrame:
    """One row a step between two of the three models: how far the logits moved."""
    names = {"baking": "gated → baked", "rounding": "baked → stored", "both": "gated → stored"}
    facts = pd.DataFrame(proof["logits"]).T[["largest", "mean", "next_token_agreement"]].rename(index=names)
    facts.columns = pd.Index(["largest |Δ logit|", "mean |Δ logit|", "same next token"])
    return facts.astype(float)


def hash_table(carried: dict[str, Any]) -> pd.DataFrame:
    """One row a file that the baked model was made from: its SHA-256, as the folder carries it."""
    return pd.DataFrame(carried["sha256"].items(), columns=["what", "sha256"])


def _by_layer(fig: Figure, ax: Axes, bound: float, ylabel: str) -> None:
    """Layers are counted in whole numbers; the legend stands above, where no point can be."""
    ax.axhline(bound, color=COLORS["edge"], linestyle="--", label="bound")
    ax.set(yscale="log", xlabel="decoder layer", ylabel=ylabel)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    fig.legend(loc="outside upper left", ncols=5)


def _positive(values: pd.Series) -> pd.Series:
    """A logarithmic axis has no place for an exact zero: put it at the bottom."""
    return values.astype(float).clip(lower=1e-12)
