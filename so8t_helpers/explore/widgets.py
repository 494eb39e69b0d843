"""The widgets: see one rotation among all others of its run; see what other powers of the gates would do."""

from __future__ import annotations

import html
from functools import lru_cache
from pathlib import Path
from typing import Any

import ipywidgets as w
import numpy as np
import pandas as pd

from so8t_helpers.explore.figures import ExplorerFigure, WhatIfFigure
from so8t_helpers.explore.turned_model import NAMED_POWERS, POWERS, TurnedModel
from so8t_helpers.run.files import StageError
from so8t_helpers.so8 import rotation
from so8t_helpers.so8.history import AngleHistory, most_moved, read_angles

ANGLES = Path("02_train") / "angles.safetensors"
NOTHING = "(nothing)"
MOST_MOVED = 8
# Pictures are drawn on white, in one look: a dark JupyterLab inverts their lightness and keeps their hues,
# which costs no redraw. The attribute is JupyterLab's own; elsewhere the rule matches nothing.
DARK_STYLE = """<style>
body[data-jp-theme-light="false"] :is(.explorer, .what-if) img { filter: invert(0.9) hue-rotate(180deg); }
</style>"""


def runs_with_angles(root: Path) -> list[str]:
    """Return the names of the runs under `root` that have rotations. Raises StageError: there is none."""
    names = sorted(p.parents[1].name for p in root.glob(f"*/{ANGLES.as_posix()}"))
    if not names:
        raise StageError(f"{root}: no run with {ANGLES.as_posix()}; run 02_train first: so8t run demo")
    return names


@lru_cache(maxsize=4)
def _history(path: Path, _changed: int) -> AngleHistory:
    return read_angles(path)


def load_history(root: Path, run: str) -> AngleHistory:
    """Return a run's rotations, from memory where the file has not changed."""
    path = root / run / ANGLES
    return _history(path, path.stat().st_mtime_ns) if path.is_file() else read_angles(path)


def _row(*children: w.Widget) -> w.HBox:
    return w.HBox(children, layout=w.Layout(flex_flow="row wrap"))


class _View(w.VBox):
    """One run: its picture under a note that says what is in view."""

    history: AngleHistory
    figure: ExplorerFigure

    def __init__(self, display: str | None = None):
        self.note, self.image = w.HTML(), w.Image(format="jpeg")
        # Two stand side by side where the window is wide enough, else one under the other.
        layout = w.Layout(flex="1 1 620px", max_width="1265px", display=display)
        super().__init__([self.note, self.image], layout=layout)

    def take_up(self, root: Path, run: str) -> None:
        self.name, self.history = run, load_history(root, run)

    def draw(self, snapshot: int, layer: int, block: int) -> None:
        self.figure.update(snapshot, layer, block)
        self.image.value = self.figure.jpeg()
        self.note.value = describe(self.name, self.history, snapshot, layer, block)


class Explorer(w.VBox):
    """Choose run, layer, block and step; see the rotation and where it stands among all others.

    `root` is the folder of the runs, `run` the one in view at first; None takes the first by name.
    """

    def __init__(self, root: Path, run: str | None = None):
        names = runs_with_angles(root)
        self.root = root
        self._quiet = False
        self.run = w.Dropdown(options=names, value=run or names[0], description="run")
        self.other = w.Dropdown(options=[NOTHING, *names], value=NOTHING, description="beside it")
        self.layer = w.SelectionSlider(options=[0], description="layer")
        self.block = w.IntSlider(min=0, max=0, description="block")
        self.step = w.SelectionSlider(options=[0], description="step")
        self.moved = w.ToggleButtons(options=[], description="moved most", style={"button_width": "auto"})
        self.first, self.second = _View(), _View(display="none")
        sliders = [self.layer, self.block, self.step]
        views = _row(self.first, self.second)
        super().__init__([_row(self.run, self.other), _row(*sliders), self.moved, views, w.HTML(DARK_STYLE)])
        self.add_class("explorer")
        self.moved.add_class("moved")
        self.first.note.add_class("note")
        self.run.observe(self._open, "value")
        self.other.observe(self._open_other, "value")
        for slider in sliders:
            slider.observe(self._redraw, "value")
        self.moved.observe(self._jump, "value")
        self._open()

    def _open(self, _change: Any = None) -> None:
        """Take up the chosen run: its layers, blocks and steps, and the figure's fixed parts."""
        self.first.take_up(self.root, self.run.value)
        history = self.first.history
        self._quiet = True
        self.layer.options = [(str(n), i) for i, n in enumerate(history.layers)]
        self.block.max = history.free.shape[2] - 1
        self.step.options = [(f"{n:,}", i) for i, n in enumerate(history.steps)]
        self.step.index = len(history.steps) - 1
        top = most_moved(history, MOST_MOVED)
        rows = [int(np.flatnonzero(history.layers == layer)[0]) for layer in top["layer"]]
        places = list(zip(rows, top["block"].tolist(), strict=True))
        self.moved.options = [(f"{history.layers[row]}·{block}", (row, block)) for row, block in places]
        self.layer.value, self.block.value = places[0]
        self._quiet = False
        self._open_other()

    def _open_other(self, _change: Any = None) -> None:
        """Draw the fixed parts of one run or of two, which then share their axes."""
        views = [self.first]
        if self.other.value != NOTHING:
            self.second.take_up(self.root, self.other.value)
            views.append(self.second)
        self.second.layout.display = "none" if len(views) == 1 else ""
        for view in views:
            view.figure = ExplorerFigure(view.history, [each.history for each in views])
        self._redraw()

    def _jump(self, _change: Any = None) -> None:
        if self._quiet or self.moved.value is None:
            return
        self._quiet = True
        self.layer.value, self.block.value = self.moved.value
        self._quiet = False
        self._redraw()

    def _redraw(self, _change: Any = None) -> None:
        if self._quiet:
            return
        place = self.step.value, self.layer.value, self.block.value
        self.first.draw(*place)
        if self.other.value != NOTHING:
            self.second.draw(*nearest(self.second.history, self.first.history, *place))


def describe(name: str, history: AngleHistory, snapshot: int, layer: int, block: int) -> str:
    """Say in HTML which place of which run is in view, and how far its block has rotated."""
    largest = history.degrees[snapshot, layer, block, 0]
    moved = history.distance[snapshot, layer, block]
    return (
        f"<b>{html.escape(name)}</b> · Layer {history.layers[layer]}, block {block}, "
        f"step {history.steps[snapshot]:,}: largest angle {largest:.2f}° of 180°, "
        f"{moved:.4f} rad from the start."
    )


def nearest(
    other: AngleHistory, history: AngleHistory, snapshot: int, layer: int, block: int
) -> tuple[int, int, int]:
    """Return the place in another run that is nearest to a place in this one: (snapshot, layer, block)."""
    return (
        int(np.abs(other.steps - history.steps[snapshot]).argmin()),
        int(np.abs(other.layers - history.layers[layer]).argmin()),
        min(block, other.free.shape[2] - 1),
    )


class WhatIf(w.VBox):
    """Rotate all gates of a model to t; see what that does to a block, to the weights and to the answers."""

    def __init__(self, model: TurnedModel, measured: pd.DataFrame):
        self.model = model
        self.figure = WhatIfFigure(measured)
        named = [(f"{name} ({t:g})", t) for name, t in NAMED_POWERS.items()]
        self.t = w.SelectionSlider(options=[(f"{t:g}", t) for t in POWERS], value=1.0, description="t")
        self.named = w.ToggleButtons(options=named, value=1.0, description="gates")
        self.layer = w.SelectionSlider(
            options=[(str(n), row) for row, n in enumerate(model.gates.layers)], description="layer"
        )
        self.block = w.IntSlider(min=0, max=model.gates.free.shape[1] - 1, description="block")
        self.image = w.Image(format="jpeg", layout=w.Layout(max_width="100%"))
        self.question = w.Combobox(options=model.questions, value=model.questions[0], description="question")
        self.question.layout.width = "100%"
        self.ask = w.Button(description="answer at this t", button_style="primary")
        self.ask_all = w.Button(description="answer at all four", tooltip="off, half, full, doubled")
        self.answers = w.HTML()
        views = [self.image, self.question, w.HBox([self.ask, self.ask_all]), self.answers]
        rows = [_row(self.t, self.named), _row(self.layer, self.block)]
        super().__init__([*rows, *views, w.HTML(DARK_STYLE)])
        self.add_class("what-if")
        self.named.observe(self._jump, "value")
        for slider in (self.t, self.layer, self.block):
            slider.observe(self._redraw, "value")
        self.ask.on_click(lambda _: self._answer([self.t.value]))
        self.ask_all.on_click(lambda _: self._answer(list(NAMED_POWERS.values())))
        self._redraw()

    def _jump(self, _change: Any) -> None:
        if self.named.value is not None:
            self.t.value = self.named.value

    def _redraw(self, _change: Any = None) -> None:
        t, row, block = self.t.value, self.layer.value, self.block.value
        self.named.value = t if t in NAMED_POWERS.values() else None
        free = self.model.gates.free[row, block]
        self.figure.update(
            t,
            self.model.gates.layers[row],
            rotation.power(free, t).numpy(),
            rotation.principal_angles(t * free).numpy(),
            rotation.principal_angles(free).numpy(),
            self.model.block_change(row, block, t).numpy(),
        )
        self.image.value = self.figure.jpeg()

    def _answer(self, powers: list[float]) -> None:
        """Write the answers as they grow, one card a power."""
        self.ask.disabled = self.ask_all.disabled = True
        texts = dict.fromkeys(powers, "")
        try:
            for t in powers:
                for text in self.model.answer(self.question.value, t):
                    texts[t] = text
                    self.answers.value = _cards(texts)
        finally:
            self.ask.disabled = self.ask_all.disabled = False


def _cards(texts: dict[float, str]) -> str:
    cards = "".join(
        f"<div><strong>t = {t:g}</strong><pre style='white-space: pre-wrap'>{html.escape(text)}</pre></div>"
        for t, text in texts.items()
    )
    columns = "repeat(auto-fit, minmax(14rem, 1fr))"
    return f"<div style='display: grid; gap: 1rem; grid-template-columns: {columns}'>{cards}</div>"
