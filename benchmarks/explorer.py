"""How fast the explorer follows a slider: in this process, and from a key in JupyterLab to the new picture.

Claims: a redraw of the explorer takes under 100 ms with the demo's gates and under 300 ms with those of the
real model (32 layers of 384 blocks); so does one with two runs beside each other, one of the what-if view,
and one seen in Chromium, with all of Jupyter's and the browser's own time. `python benchmarks/explorer.py`
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import torch
from claims import claim, write_claims
from lab_browser import PATIENCE, chromium, open_notebook, run_all, running_lab
from playwright.sync_api import Page
from safetensors.torch import save_file

from so8t_helpers.explore.figures import WhatIfFigure
from so8t_helpers.explore.turned_model import POWERS
from so8t_helpers.explore.widgets import ANGLES, Explorer, load_history
from so8t_helpers.so8 import rotation

# name: layers, hidden size, bound of a redraw in ms
SIZES = {"demo": (4, 256, 100.0), "real": (32, 3072, 300.0)}
SNAPSHOTS, DRAGS = 50, 60
CELL = """from pathlib import Path
from so8t_helpers.explore.widgets import Explorer
explorer = Explorer(Path({root!r}), {name!r})
explorer.layer.index = explorer.block.value = 1  # no slider but the step's stands at its end
explorer"""
# From a key on a slider's handle to the picture that the browser has loaded, in ms.
WATCH = """() => {
  const image = document.querySelector('img.widget-image');
  document.addEventListener('keydown', () => { window.pressed = performance.now(); }, true);
  image.addEventListener('load', () => { window.seen = performance.now() - window.pressed; });
}"""


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
    explorer.other.value = name
    two_runs = milliseconds(lambda i: drag_explorer(explorer, i))
    free = load_history(root, name).free[-1]
    what_if = milliseconds(what_if_drag(torch.from_numpy(free), hidden))
    measured = {"redraw": redraw, "two_runs": two_runs, "what_if": what_if, "lab": in_lab(root, name)}
    figures = {"open_seconds": round(opened, 2)}
    for what, times in measured.items():
        figures[f"{what}_ms_median"] = round(float(np.median(times)), 1)
        figures[f"{what}_ms_p95"] = round(float(np.percentile(times, 95)), 1)
    return figures


def in_lab(root: Path, name: str) -> np.ndarray:
    """Press a key on each of the three sliders in turn, in a real JupyterLab; milliseconds to the picture."""
    home = root / f"lab-{name}"
    home.mkdir()
    cells = [nbformat.v4.new_code_cell(CELL.format(root=str(root), name=name))]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), home / "x.ipynb")
    with running_lab(home, root / f"lab-settings-{name}") as address, chromium() as browser:
        page = open_notebook(browser, address, "x.ipynb")
        run_all(page)
        page.locator("img.widget-image").first.wait_for(timeout=PATIENCE)
        page.wait_for_function("document.querySelector('img.widget-image').naturalWidth > 1000")
        page.evaluate(WATCH)
        return milliseconds_in_browser(page)


def milliseconds_in_browser(page: Page) -> np.ndarray:
    """Time `DRAGS` keys after three that warm up."""
    handles = page.locator(".explorer .noUi-handle")
    times = []
    for i in range(DRAGS + 3):
        page.evaluate("window.seen = null")
        # The step stands at its last place: first down, then up again.
        handles.nth(i % 3).press("ArrowLeft" if i // 3 % 2 == 0 else "ArrowRight")
        page.wait_for_function("window.seen !== null")
        times.append(page.evaluate("window.seen"))
    return np.array(times[3:])


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


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = {name: measure_size(Path(folder), name) for name in SIZES}
    shown = {
        "redraw": "explorer redraws",
        "two_runs": "two runs redraw",
        "what_if": "what-if redraws",
        "lab": "JupyterLab shows it",
    }
    claims = [
        claim(f"{text}, {name} size (95% of drags)", figures[name][f"{what}_ms_p95"], bound, "ms")
        for name, (_, _, bound) in SIZES.items()
        for what, text in shown.items()
    ]
    print(json.dumps(figures, indent=2))
    return 0 if write_claims("explorer", {"threads": torch.get_num_threads()} | figures, claims) else 1


if __name__ == "__main__":
    sys.exit(main())
