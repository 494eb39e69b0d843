"""Figures of 04_gguf: what each file weighs and what its quantisation costs."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from so8t_helpers.plots.style import COLORS, GREY, INK, new_figure


def size_against_divergence(table: pd.DataFrame) -> Figure:
    """KL divergence from F16 over file size, one point a file, F16's own size as a line.

    Args:
        table: `GgufResult.table()` with measured quality.
    """
    fig, ax = new_figure(height=3.4)
    for kind, row in table.iterrows():
        if kind == "f16":
            ax.axvline(row["MiB"], color=COLORS["f16"], linewidth=1, linestyle=":")
            top = ax.get_xaxis_transform()
            ax.text(row["MiB"], 0.98, "f16 ", transform=top, ha="right", va="top", color=INK)
            continue
        colour = COLORS.get(str(kind), GREY)
        ax.plot(row["MiB"], row["KL from F16 (nats)"], "o", markersize=8, color=colour)
        place = (row["MiB"], row["KL from F16 (nats)"])
        ax.annotate(str(kind), place, (8, 4), textcoords="offset points", color=INK)
    ax.set(title="What a smaller file costs", xlabel="file size (MiB)", yscale="log")
    ax.set(ylabel="KL from F16 (nats a token)", xlim=(0, None))
    ax.margins(y=0.25)
    return fig


def tensor_type_shares(files: dict[str, dict[str, int]]) -> Figure:
    """How many bytes of each file are of which ggml type, as stacked bars.

    Args:
        files: file type -> {ggml type: bytes}.
    """
    fig, ax = new_figure(height=0.8 + 0.42 * len(files))
    kinds = list(dict.fromkeys(kind for shares in files.values() for kind in shares))
    names = list(files)
    left = [0.0] * len(names)
    for kind in kinds:
        widths = [files[name].get(kind, 0) / 2**20 for name in names]
        ax.barh(names, widths, left=left, height=0.65, color=_TYPE_COLOURS.get(kind, GREY), label=kind)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.set(title="Bytes by tensor type", xlabel="MiB")
    ax.legend(ncols=min(len(kinds), 7), loc="upper center", bbox_to_anchor=(0.5, -0.35))
    return fig


_TYPE_COLOURS = {
    "F32": GREY,
    "F16": COLORS["f16"],
    "BF16": COLORS["bf16"],
    "Q8_0": COLORS["q8_0"],
    "Q6_K": COLORS["q6_k"],
    "Q5_K": COLORS["q5_k_m"],
    "Q4_K": COLORS["q4_k_m"],
}
