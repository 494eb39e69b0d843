"""What 04_gguf leaves: the files and their figures, as a notebook shows them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from gguf import GGUFReader

_SHORT_VALUE = 60  # characters

DIVERGENCES = {
    "kl_mean": "the file",
    "kl_mean_without_imatrix": "the file without importance matrix",
    "kl_o_proj": "o_proj alone, as baked",
    "kl_o_proj_unrotated": "o_proj alone, quantised before the rotation",
}


@dataclass(frozen=True)
class GgufResult:
    """The files of a run and their figures (the content of quality.json)."""

    files: dict[str, Path]
    quality: dict[str, Any]

    def table(self) -> pd.DataFrame:
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
            for kind, entry in self.quality["files"].items()
        ]
        return pd.DataFrame(rows).set_index("file")

    def divergences(self) -> pd.DataFrame:
        """One row a quantised file: KL from F16 of the file, of o_proj alone, and of other ways to make it.

        Columns that no file has are left out; NaN where one does not apply.
        """
        files = {
            k: e for k, e in self.quality["files"].items() if "kl_mean" in e and k not in {"f16", "bf16"}
        }
        columns = {
            kind: {name: entry.get(key) for key, name in DIVERGENCES.items()} for kind, entry in files.items()
        }
        return pd.DataFrame(columns, dtype=float).T.dropna(axis="columns", how="all")

    def o_proj(self) -> pd.DataFrame:
        """One row a layer and file: relative error of o_proj's output, `rotated` as baked and `unrotated`."""
        return pd.DataFrame(self.quality.get("o_proj", []), columns=["layer", "file", "rotated", "unrotated"])

    def metadata(self) -> pd.Series:
        """The keys of the smallest file with short values, in the order in which they are written."""
        path = min(self.files.values(), key=lambda p: p.stat().st_size)
        fields = GGUFReader(path).fields
        # The reader's own keys begin with "GGUF."; the vocabulary and the chat template fill pages.
        values = {k: f.contents() for k, f in fields.items() if not k.startswith("GGUF.")}
        return pd.Series({k: v for k, v in values.items() if len(str(v)) < _SHORT_VALUE}, name="value")
