"""Tables as HTML: numbers under each other, units whole, readable on a phone and by keyboard."""

from __future__ import annotations

import html
import re
from numbers import Real
from typing import Any

import numpy as np
import pandas as pd

from so8t_helpers.show.wording import words


def table_html(df: pd.DataFrame, caption: str) -> str:
    """Return a DataFrame as an HTML table whose headings say what they head."""
    with_index = not isinstance(df.index, pd.RangeIndex)
    heads = [str(df.index.name or "")] * with_index + [str(name) for name in df.columns]
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' if name else "<td></td>" for name in heads)
    sides = ["right" if _all_numbers(df.iloc[:, i]) else "left" for i in range(df.shape[1])]
    rows = []
    for index, row in zip(df.index, df.itertuples(index=False), strict=True):
        first = f'<th scope="row">{_cell(index)}</th>' if with_index else ""
        cells = "".join(_td(value, side) for value, side in zip(row, sides, strict=True))
        rows.append(f"<tr>{first}{cells}</tr>")
    # The frame scrolls on a narrow screen, so the keyboard must reach it.
    return (
        f'<div class="table-wrap" role="region" tabindex="0" aria-label="{html.escape(caption)}">'
        f'<table class="so8t"><caption>{html.escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _all_numbers(column: pd.Series) -> bool:
    """Whether a column's numbers can stand under each other; what is missing does not count."""
    values = [value for value in column if words(value) != "–"]
    return bool(values) and all(isinstance(v, Real) and not isinstance(v, bool) for v in values)


def _td(value: Any, side: str) -> str:
    extra = ""
    if isinstance(value, str) and len(value) < 28 and re.match(r"[+−-]?\d", value):
        extra = "; white-space:nowrap"  # a figure with its interval, "98.0 (95–100)", is read as one
    elif isinstance(value, str) and len(value) > 24:
        extra = "; min-width:11rem"  # on a phone, Japanese would else run down one character a line
    return f'<td style="text-align:{side}{extra}">{_cell(value)}</td>'


def _cell(value: Any) -> str:
    return html.escape(words(value.item() if isinstance(value, np.bool_) else value))
