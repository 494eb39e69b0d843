"""How fast the explorer follows a slider: from a slider's new value to the new picture, in this process.

Claims: a redraw of the explorer takes under 100 ms with the demo's gates and under 300 ms with those of the
real model (32 layers of 384 blocks), and so does one of the what-if view. `python benchmarks/explorer.py`
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file

from so8t_helpers import rotation
from so8t_helpers.plots.what_if import WhatIfFigure
from so8t_helpers.run_folder import versions, write_json
from so8t_helpers.what_if import POWERS
from so8t_helpers.widgets.explorer import ANGLES, Explorer, load_history

RESULTS = Path(__file__).parent / "results" / "explorer.json"
# name: layers, hidden size, bound of a redraw in ms
SIZES = {"demo": (4, 256, 100.0), "real": (32, 3072, 300.0)}
SNAPSHOTS, DRAGS = 50, 60


def write_run(root: Path, name: str, layers: int, hidden: int) -> None:
    """Write angles of a training that moves every block evenly from its start."""
    generator = torch.Generator().manual_seed(0)
    start, motion = (rotation.initial_free(layers, hidden, scale, generator) for scale in (0.05, 0.02))
    free = torch.stack([start + motion * (s / (SNAPSHOTS - 1)) for s in range(SNAPSHOTS)])
    path = root / name / ANGLES
    path.parent.mkdir(parents=True)
    angles = rotation.principal_angles(free)
    steps, rows = torch.arange(SNAPSHOTS) * 20, torch.arange(layers)
    save_file({"steps": steps, "layers": rows, "free": free, "angles": angles}, path)


def milliseconds(drag: Callable[[int], None]) -> np.ndarray:
    """Time `DRAGS` calls after three that warm up."""
    times = []
    for i in range(DRAGS + 3):
        begun = time.perf_counter()
        drag(i)
        times.append((time.perf_counter() - begun) * 1000)
    return np.array(times[3:])


def drag_explorer(explorer: Explorer, i: int) -> None:
    """Move one of the three sliders by one place."""
    slider = (explorer.step, explorer.layer, explorer.block)[i % 3]
    if slider is explorer.block:
        slider.value = (slider.value + 1) % (slider.max + 1)
    else:
        slider.index = (slider.index + 1) % len(slider.options)


def measure_size(root: Path, name: str) -> dict[str, float]:
    """Measure opening a run and redrawing it after a drag, in seconds and milliseconds."""
    layers, hidden, _ = SIZES[name]
    write_run(root, name, layers, hidden)
    begun = time.perf_counter()
    explorer = Explorer(root, name)
    opened = time.perf_counter() - begun
    redraw = milliseconds(lambda i: drag_explorer(explorer, i))
    free = load_history(root, name).free[-1]
    what_if = milliseconds(what_if_drag(torch.from_numpy(free), hidden))
    return {
        "open_seconds": opened,
        "redraw_ms_median": float(np.median(redraw)),
        "redraw_ms_p95": float(np.percentile(redraw, 95)),
        "what_if_ms_median": float(np.median(what_if)),
        "what_if_ms_p95": float(np.percentile(what_if, 95)),
    }


def what_if_drag(free: torch.Tensor, hidden: int) -> Callable[[int], None]:
    """Return a function that turns one block's gate a step further and draws it, as the slider does."""
    layers = len(free)
    table = [(t, n, t, t, t, 1 + t) for t in POWERS for n in range(layers)]
    columns = ["t", "layer", "change", "largest_change", "quantisation_error", "perplexity"]
    figure = WhatIfFigure(pd.DataFrame(table, columns=columns))
    weight = torch.randn(hidden, rotation.BLOCK)

    def drag(i: int) -> None:
        t, layer = POWERS[i % len(POWERS)], i % layers
        numbers = free[layer, i % free.shape[1]]
        change = weight @ (rotation.rotation((t - 1) * numbers) - rotation.rotation(-numbers))
        now, trained = (rotation.principal_angles(s * numbers).numpy() for s in (t, 1.0))
        figure.update(t, layer, rotation.rotation(t * numbers).numpy(), now, trained, change.numpy())
        figure.jpeg()

    return drag


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = {name: measure_size(Path(folder), name) for name in SIZES}
    claims = [
        {
            "name": f"{what} redraws after a drag, {name} size, 95th percentile",
            "value": figures[name][key],
            "bound": bound,
            "unit": "ms",
            "holds": figures[name][key] < bound,
        }
        for name, (_, _, bound) in SIZES.items()
        for what, key in (("Explorer", "redraw_ms_p95"), ("What-if", "what_if_ms_p95"))
    ]
    result = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": versions(),
        "figures": figures,
        "claims": claims,
    }
    write_json(RESULTS, result)
    print(json.dumps(result["figures"], indent=2))


if __name__ == "__main__":
    main()
