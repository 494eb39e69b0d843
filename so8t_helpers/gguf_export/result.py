"""What 04_gguf leaves: the files and their figures, as a notebook shows them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from gguf import GGUFReader

_SHORT_VALUE = 60  # characters


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

    def metadata(self) -> pd.Series:
        """The keys of the smallest file with short values, in the order in which they are written."""
        path = min(self.files.values(), key=lambda p: p.stat().st_size)
        fields = GGUFReader(path).fields
        # The reader's own keys begin with "GGUF."; the vocabulary and the chat template fill pages.
        values = {k: f.contents() for k, f in fields.items() if not k.startswith("GGUF.")}
        return pd.Series({k: v for k, v in values.items() if len(str(v)) < _SHORT_VALUE}, name="value")
