"""Figures of 04_gguf: what each file weighs and what its quantisation costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from gguf import GGUFReader
from matplotlib.figure import Figure

from so8t_helpers.show.style import BLUE, COLORS, GREY, INK, SERIES, new_figure


def size_against_divergence(table: pd.DataFrame) -> Figure:
    """KL divergence from F16 over file size, one point a file of `file_table`, F16's own size as a line."""
    fig, ax = new_figure(height=3.4)
    for kind, row in table.iterrows():
        if kind == "f16":
            ax.axvline(row["MiB"], color=COLORS["f16"], linewidth=1, linestyle=":")
            top = ax.get_xaxis_transform()
            ax.text(row["MiB"], 0.98, "f16 ", transform=top, ha="right", va="top", color=INK)
            continue
        place = (row["MiB"], row["KL from F16 (nats)"])
        ax.plot(*place, "o", markersize=8, color=COLORS[str(kind)])
        ax.annotate(str(kind), place, (8, 4), textcoords="offset points", color=INK)
    ax.set(title="What a smaller file costs", xlabel="file size (MiB)", yscale="log")
    ax.set(ylabel="KL from F16 (nats a token)", xlim=(0, None))
    ax.margins(y=0.25)
    return fig


def tensor_type_shares(files: dict[str, dict[str, int]]) -> Figure:
    """How many bytes of each file are of which ggml type, as stacked bars: file -> {ggml type: bytes}."""
    fig, ax = new_figure(height=1.1 + 0.42 * len(files))
    kinds = list(dict.fromkeys(kind for shares in files.values() for kind in shares))
    left = np.zeros(len(files))
    for kind in kinds:
        widths = np.array([shares.get(kind, 0) / 2**20 for shares in files.values()])
        ax.barh([*files], widths, left=left, height=0.65, color=_TYPE_COLOURS.get(kind, GREY), label=kind)
        left += widths
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.set(title="Bytes by tensor type", xlabel="MiB")
    fig.legend(ncols=min(len(kinds), 7), loc="outside lower center")
    return fig


def divergences(table: pd.DataFrame) -> Figure:
    """KL divergences of `divergence_table` on a logarithmic axis: a row a file, a mark a way to make it."""
    fig, ax = new_figure(height=1.3 + 0.42 * len(table))
    for column, marker, colour in zip(table, "os^v", SERIES, strict=False):
        filled = colour if marker != "v" else "none"
        ax.plot(table[column], table.index, marker, markersize=7, color=colour, markerfacecolor=filled)
    ax.set(title="Where the divergence comes from", xlabel="KL from F16 (nats a token)", xscale="log")
    ax.invert_yaxis()
    ax.margins(x=0.1, y=0.25)
    fig.legend(handles=ax.lines, labels=list(table), ncols=2, loc="outside lower center")
    return fig


def o_proj_errors(errors: pd.DataFrame) -> Figure:
    """Errors of `o_proj_table` as baked, and their ratios to those without rotation, by layer."""
    fig, (error, ratio) = new_figure(height=3.2, ncols=2)
    for file, rows in errors.groupby("file", sort=False):
        colour = COLORS.get(str(file), GREY)
        error.plot(rows["layer"], rows["rotated"], "o-", color=colour, label=file)
        ratio.plot(rows["layer"], rows["rotated"] / rows["unrotated"].astype(float), "o-", color=colour)
    error.set(title="Error of o_proj's output", ylabel="‖error‖ / ‖output‖", yscale="log")
    ratio.axhline(1.0, color=INK, linewidth=1, linestyle=":")
    ratio.set(title="With rotation / without", ylabel="ratio; below 1 it helps")
    for ax in (error, ratio):
        ax.set_xlabel("decoder layer")
        ax.xaxis.get_major_locator().set_params(integer=True)
    fig.legend(handles=error.lines, ncols=5, loc="outside lower center")
    return fig


_TYPE_COLOURS = {
    "F32": GREY,
    "F16": COLORS["f16"],
    "BF16": BLUE,
    "Q8_0": COLORS["q8_0"],
    "Q6_K": COLORS["q6_k"],
    "Q5_K": COLORS["q5_k_m"],
    "Q4_K": COLORS["q4_k_m"],
}

_SHORT_VALUE = 60  # characters

_DIVERGENCES = {
    "kl_mean": "the file",
    "kl_mean_without_imatrix": "the file without importance matrix",
    "kl_o_proj": "o_proj alone, as baked",
    "kl_o_proj_unrotated": "o_proj alone, quantised before the rotation",
}


def file_table(quality: dict[str, Any]) -> pd.DataFrame:
    """One row a file: size, bits a weight, perplexity, KL divergence and agreement with F16."""
    rows = [
        {
            "file": kind,
            "MiB": entry["bytes"] / 2**20,
            "bits a weight": entry["bits_per_weight"],
            "perplexity": entry.get("perplexity"),
            "KL from F16 (nats)": entry.get("kl_mean"),
            "top token as F16": entry.get("top1_agreement"),
            "tensor types": ", ".join(f"{n} {t}" for t, n in entry["tensor_types"].items()),
        }
        for kind, entry in quality["files"].items()
    ]
    return pd.DataFrame(rows).set_index("file")


def divergence_table(quality: dict[str, Any]) -> pd.DataFrame:
    """One row a quantised file, one column a way to make it that any file has: KL from F16, NaN for none."""
    files = {k: e for k, e in quality["files"].items() if "kl_mean" in e and k not in {"f16", "bf16"}}
    columns = {
        kind: {name: entry.get(key) for key, name in _DIVERGENCES.items()} for kind, entry in files.items()
    }
    return pd.DataFrame(columns, dtype=float).T.dropna(axis="columns", how="all")


def o_proj_table(quality: dict[str, Any]) -> pd.DataFrame:
    """One row a layer and file: relative error of o_proj's output, `rotated` as baked and `unrotated`."""
    return pd.DataFrame(quality.get("o_proj", []), columns=["layer", "file", "rotated", "unrotated"])


def rotation_summary(errors: pd.DataFrame) -> pd.DataFrame:
    """One row a file: least, median and largest ratio of `o_proj_table`'s errors over the gated layers."""
    both = errors.dropna()
    ratio = both["rotated"].astype(float) / both["unrotated"].astype(float)
    return ratio.groupby(both["file"], sort=False).describe()[["min", "50%", "max"]]


def metadata_table(files: dict[str, Path]) -> pd.DataFrame:
    """The keys of the smallest file with short values, in the order in which they are written."""
    path = min(files.values(), key=lambda p: p.stat().st_size)
    # The reader's own keys begin with "GGUF."; the vocabulary and the chat template fill pages.
    fields = {k: f.contents() for k, f in GGUFReader(path).fields.items() if not k.startswith("GGUF.")}
    short = {key: value for key, value in fields.items() if len(str(value)) < _SHORT_VALUE}
    return pd.Series(short, name="value").to_frame()
