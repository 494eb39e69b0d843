"""What if the gates turned less or more: a slider, the curves, and the model's answers, written live."""

from __future__ import annotations

import html
from typing import Any

import ipywidgets as w
import pandas as pd

from so8t_helpers import rotation
from so8t_helpers.plots.what_if import WhatIfFigure
from so8t_helpers.what_if import NAMED_POWERS, POWERS, TurnedModel
from so8t_helpers.widgets import DARK_STYLE


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
