"""Figures of 03_bake: what baking costs, what rounding costs, and how well each rotation and weight holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from so8t_helpers.show.style import COLORS, new_figure

_MODULES = {
    "qkv_proj": COLORS["theta_1"],
    "o_proj": COLORS["theta_2"],
    "gate_up_proj": COLORS["theta_3"],
    "down_proj": COLORS["theta_4"],
}


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


def o_proj_differences(layers: pd.DataFrame, bound: float) -> Figure:
    """Largest difference of each layer's o_proj output, gated against baked on the same input."""
    fig, ax = new_figure(height=3.0)
    gated = layers["orthogonality"].notna()
    for chosen, label, marker in ((gated, "with a gate", "o"), (~gated, "without", "x")):
        part = layers[chosen]
        if len(part):
            ax.plot(part["layer"], _positive(part["o_proj_difference"]), marker, label=label)
    ax.axhline(bound, color=COLORS["edge"], linestyle="--", label="bound")
    ax.set(yscale="log", xlabel="decoder layer", ylabel="largest |difference|\nof o_proj's output")
    _by_layer(fig, ax)
    return fig


def weight_errors(weights: pd.DataFrame, bound: float) -> Figure:
    """Relative error of each changed weight against float64: before rounding (filled) and in the file."""
    fig, ax = new_figure(height=3.4)
    for module, rows in weights.groupby("module", sort=False):
        color = _MODULES.get(str(module), COLORS["muted"])
        ax.plot(rows["layer"], _positive(rows["baked_error"]), "o", color=color, label=str(module))
        ax.plot(rows["layer"], _positive(rows["stored_error"]), "_", color=color, markersize=9)
    ax.axhline(bound, color=COLORS["edge"], linestyle="--", label="bound")
    ax.set(yscale="log", xlabel="decoder layer", ylabel="‖W′ − (W + sBA)R‖ / ‖W‖")
    ax.set_title("●  float32, before rounding      —  as stored", fontsize=9.5)
    _by_layer(fig, ax)
    return fig


def rotation_errors(layers: pd.DataFrame, bound: float) -> Figure:
    """How far each layer's rotations are from orthogonal and from determinant one."""
    fig, ax = new_figure(height=3.0)
    gated = layers[layers["orthogonality"].notna()]
    ax.plot(gated["layer"], _positive(gated["orthogonality"]), "o", label="largest |RᵀR − 1|")
    ax.plot(gated["layer"], _positive(gated["determinant"]), "s", label="largest |det R − 1|")
    ax.axhline(bound, color=COLORS["edge"], linestyle="--", label="bound")
    ax.set(yscale="log", xlabel="decoder layer", ylabel="error")
    _by_layer(fig, ax)
    return fig


def _by_layer(fig: Figure, ax: Axes) -> None:
    """Layers are counted in whole numbers; the legend stands above, where no point can be."""
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    fig.legend(loc="outside upper left", ncols=5)


def _positive(values: pd.Series) -> pd.Series:
    """A logarithmic axis has no place for an exact zero: put it at the bottom."""
    return values.astype(float).clip(lower=1e-12)
