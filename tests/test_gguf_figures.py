"""Figures of 04_gguf: what they draw from a result's figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from so8t_helpers.gguf import figures as plots
from so8t_helpers.gguf.stage import GgufResult
from so8t_helpers.show import style


def entry(size: int, kl: float, **more: float) -> dict[str, object]:
    types = {"tensor_types": {"Q4_K": 7}, "tensor_bytes": {"Q4_K": size, "F32": 100}}
    return {"bytes": size, "bits_per_weight": 4.5, "perplexity": 8.0, "kl_mean": kl, **more, **types}


@pytest.fixture
def result() -> GgufResult:
    files = {
        "f16": entry(4 * 2**20, 0.0, top1_agreement=1.0),
        "q8_0": entry(2 * 2**20, 1e-4, kl_o_proj=1e-5, kl_o_proj_unrotated=2e-5),
        "q4_k_m": entry(2**20, 1e-2, kl_o_proj=1e-3, kl_o_proj_unrotated=9e-4, kl_mean_without_imatrix=2e-2),
    }
    errors = [
        {"layer": layer, "file": file, "rotated": 0.1, "unrotated": None if layer else 0.2}
        for layer in range(3)
        for file in ("q8_0", "q4_k_m")
    ]
    return GgufResult({kind: Path(f"{kind}.gguf") for kind in files}, {"files": files, "o_proj": errors})


def test_table_and_divergences(result: GgufResult) -> None:
    assert plots.file_table(result.quality).loc["q8_0", "MiB"] == 2
    divergences = plots.divergence_table(result.quality)
    assert list(divergences.index) == ["q8_0", "q4_k_m"]
    assert divergences.loc["q4_k_m", "the file without importance matrix"] == 2e-2
    assert divergences.loc["q8_0"].isna().sum() == 1


def test_figures_show_every_file(result: GgufResult) -> None:
    shares = {kind: file["tensor_bytes"] for kind, file in result.quality["files"].items()}
    scatter = plots.size_against_divergence(plots.file_table(result.quality))
    assert [text.get_text().strip() for text in scatter.axes[0].texts] == ["f16", "q8_0", "q4_k_m"]
    bars = plots.tensor_type_shares(shares)
    assert sum(bar.get_width() for bar in bars.axes[0].patches) == pytest.approx(7 + 300 / 2**20)
    marks = plots.divergences(plots.divergence_table(result.quality)).axes[0]
    assert len(marks.lines) == 4
    errors = plots.o_proj_errors(plots.o_proj_table(result.quality))
    error, ratio = errors.axes
    assert [len(line.get_xdata()) for line in error.lines] == [3, 3]
    assert ratio.lines[0].get_ydata()[0] == 0.5  # layer 0 has a gate, 1 and 2 have none
    assert ratio.lines[0].get_ydata()[1] != ratio.lines[0].get_ydata()[1]
    for figure in (scatter, bars, errors):
        assert style.to_svg(figure, "files").startswith("<svg")
