"""The explorer: choose run, layer, block and step, and see the rotation among all others."""

from __future__ import annotations

import html
from functools import lru_cache
from pathlib import Path
from typing import Any

import ipywidgets as w
import numpy as np
import pandas as pd

from so8t_helpers.explore import DARK_STYLE
from so8t_helpers.explore.figures import ExplorerFigure, WhatIfFigure
from so8t_helpers.explore.turned_model import NAMED_POWERS, POWERS, TurnedModel
from so8t_helpers.run.files import StageError
from so8t_helpers.so8 import rotation
from so8t_helpers.so8.history import AngleHistory, most_moved, read_angles

ANGLES = Path("02_train") / "angles.safetensors"
NOTHING = "(nothing)"
MOST_MOVED = 8


def runs_with_angles(root: Path) -> list[str]:
    """Return the names of the runs under `root` that have rotations to look at.

    Raises:
        StageError: there is none.
    """
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


class Explorer(w.VBox):
    """Choose run, layer, block and step; see the rotation and where it stands among all others.

    Args:
        root: folder of the runs.
        run: the run in view at first; None takes the first by name.
    """

    def __init__(self, root: Path, run: str | None = None):
        names = runs_with_angles(root)
        self.root = root
        self._quiet = False
        self.run = w.Dropdown(options=names, value=run or names[0], description="run")
        self.beside = w.Dropdown(options=[NOTHING, *names], value=NOTHING, description="beside it")
        self.layer = w.SelectionSlider(options=[0], description="layer")
        self.block = w.IntSlider(min=0, max=0, description="block")
        self.step = w.SelectionSlider(options=[0], description="step")
        self.moved = w.ToggleButtons(options=[], description="moved most", style={"button_width": "auto"})
        # Beside each other where the window is wide enough, else one under the other.
        place = {"flex": "1 1 620px", "max_width": "1265px"}
        self.image, self.image_beside = (w.Image(format="jpeg") for _ in range(2))
        self.note, self.note_beside = w.HTML(), w.HTML()
        self.first = w.VBox([self.note, self.image], layout=w.Layout(**place))
        self.second = w.VBox([self.note_beside, self.image_beside], layout=w.Layout(**place, display="none"))
        super().__init__(
            [
                w.HBox([self.run, self.beside], layout=w.Layout(flex_flow="row wrap")),
                w.HBox([self.layer, self.block, self.step], layout=w.Layout(flex_flow="row wrap")),
                self.moved,
                w.HBox([self.first, self.second], layout=w.Layout(flex_flow="row wrap")),
                w.HTML(DARK_STYLE),
            ]
        )
        self.add_class("explorer")
        self.moved.add_class("moved")
        self.note.add_class("note")
        self.run.observe(self._open, "value")
        self.beside.observe(self._open_beside, "value")
        for slider in (self.layer, self.block, self.step):
            slider.observe(self._redraw, "value")
        self.moved.observe(self._jump, "value")
        self._open()

    def _open(self, _change: Any = None) -> None:
        """Take up the chosen run: its layers, blocks and steps, and the figure's fixed parts."""
        self.history = history = load_history(self.root, self.run.value)
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
        self._open_beside()

    def _open_beside(self, _change: Any = None) -> None:
        """Draw the fixed parts of one run or of two, which then share their axes."""
        chosen = self.beside.value != NOTHING
        self.second.layout.display = "" if chosen else "none"
        if chosen:
            self.history_beside = load_history(self.root, self.beside.value)
            self.figure_beside = ExplorerFigure(self.history_beside, [self.history])
        self.figure = ExplorerFigure(self.history, [self.history_beside] if chosen else [])
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
        snapshot, layer, block = self.step.value, self.layer.value, self.block.value
        self.figure.update(snapshot, layer, block)
        self.image.value = self.figure.jpeg()
        self.note.value = describe(self.run.value, self.history, snapshot, layer, block)
        if self.beside.value != NOTHING:
            place = nearest(self.history_beside, self.history, snapshot, layer, block)
            self.figure_beside.update(*place)
            self.image_beside.value = self.figure_beside.jpeg()
            self.note_beside.value = describe(self.beside.value, self.history_beside, *place)


def describe(name: str, history: AngleHistory, snapshot: int, layer: int, block: int) -> str:
    """Say in HTML which place of which run is in view, and how far its block has turned."""
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
    """Turn all gates of a model to t; see what that does to a block, to the weights and to the answers.

    Args:
        model: the run's model, loaded.
        measured: from `model.measure()`.
    """

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
        self.question = w.Combobox(
            options=model.questions,
            value=model.questions[0],
            description="question",
            layout={"width": "100%"},
        )
        self.ask = w.Button(description="answer at this t", button_style="primary")
        self.ask_all = w.Button(description="answer at all four", tooltip="off, half, full, doubled")
        self.answers = w.HTML()
        rows = [[self.t, self.named], [self.layer, self.block]]
        super().__init__(
            [
                *(w.HBox(row, layout=w.Layout(flex_flow="row wrap")) for row in rows),
                self.image,
                self.question,
                w.HBox([self.ask, self.ask_all]),
                self.answers,
                w.HTML(DARK_STYLE),
            ]
        )
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
            rotation.rotation(t * free).numpy(),
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
