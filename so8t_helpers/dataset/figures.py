"""Figures and tables of 01_dataset, drawn from its card and its files."""

from __future__ import annotations

import html
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from so8t_helpers.settings import DatasetSettings
from so8t_helpers.show.style import COLORS, new_figure
from so8t_helpers.thinking.format import LABELS

Card = dict[str, Any]


def flow(card: Card) -> Figure:
    """Where the input lines went: one bar, parted into train, eval and quarantine."""
    figure, axes = new_figure(height=1.5)
    left = 0
    for name, color in (("train", "accent"), ("eval", "accent_2"), ("quarantine", "muted")):
        number = card["lines"][name]
        axes.barh([0], [number], left=left, color=COLORS[color], label=f"{name}: {number:,}")
        left += number
    axes.set(xlabel="input lines", yticks=[], xlim=(0, max(left, 1)))
    axes.grid(False)
    axes.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def labels(card: Card) -> Figure:
    """Samples by label in train and in eval, each as a share of its split."""
    figure, axes = new_figure(height=3.0)
    for offset, split in ((-0.2, "train"), (0.2, "eval")):
        counts = [card[split]["labels"].get(label, 0) for label in LABELS]
        shares = np.array(counts) / max(sum(counts), 1) * 100
        bars = axes.bar(
            np.arange(len(LABELS)) + offset,
            shares,
            width=0.38,
            color=[COLORS[label] for label in LABELS],
            alpha=1.0 if split == "train" else 0.55,
        )
        axes.bar_label(bars, [f"{split}\n{n:,}" for n in counts], fontsize=8)
    axes.set(ylabel="share of the split (%)", xticks=range(len(LABELS)), xticklabels=LABELS)
    axes.margins(y=0.2)
    return figure


def domains(card: Card, most: int = 15) -> Figure:
    """Samples by domain, the most frequent ones first."""
    counts = Counter(card["train"]["domains"]) + Counter(card["eval"]["domains"])
    top = counts.most_common(most)[::-1]
    figure, axes = new_figure(height=0.8 + 0.24 * max(len(top), 1))
    names = [name or "(none)" for name, _ in top]
    bars = axes.barh(names, [number for _, number in top], color=COLORS["accent"])
    axes.bar_label(bars, [f"{number:,}" for _, number in top], padding=4, fontsize=9)
    axes.set(xlabel="samples (train and eval)")
    axes.grid(axis="y", visible=False)
    return figure


def lengths(card: Card) -> Figure:
    """Token lengths by label against the limit, which is the right edge."""
    figure, axes = new_figure(height=3.2)
    edges = np.array(card["lengths"]["edges"])
    bottom = np.zeros(len(edges) - 1)
    for label in LABELS:
        counts = np.array(card["lengths"]["counts"][label])
        axes.bar(edges[:-1], counts, np.diff(edges), bottom, align="edge", color=COLORS[label], label=label)
        bottom += counts
    axes.axvline(edges[-1], color=COLORS["bad"], linestyle="--", label=f"limit: {edges[-1]:.0f}")
    measured = card["lengths"]["measured"]
    axes.set(xlabel="tokens of the whole sample", ylabel=f"samples ({measured:,} counted)")
    axes.set_xlim(0, edges[-1] * 1.03)
    axes.margins(y=0.08)
    axes.legend()
    return figure


def rules(chosen: DatasetSettings) -> pd.DataFrame:
    """The settings that decide about a line, in words; the whole list stands at a report's end."""
    near = chosen.near_duplicate_threshold
    unlicensed = chosen.default_licence or "to quarantine"
    alike = f", or one that is alike by {near:g} or more" if near else ""
    rows = {
        "records": ", ".join(one if isinstance(one, str) else one.path for one in chosen.inputs),
        "think format": f"{chosen.think_format}, asked for by {chosen.think_command or 'nothing'}",
        "without thinking": f"{chosen.plain_share:.0%} of the samples",
        "missing thinking": f"written by {chosen.teacher}" if chosen.teacher else "from the record's labels",
        "held out": f"{chosen.eval_share:.0%} of the questions",
        "several turns": f"all kept, {chosen.dialogue_answers} answer trained",
        "too long": chosen.overlong,
        "personal data": f"{chosen.personal_data}; names of people: {chosen.personal_names}",
        "licences": f"{', '.join(chosen.licences)}; none given: {unlicensed}",
        "duplicates": f"the same question, context and label{alike}" if chosen.deduplicate else "kept",
    }
    return pd.DataFrame(rows.items(), columns=["rule", "this run"])


def reasons(card: Card) -> pd.DataFrame:
    """Why lines are in quarantine: reason, what it means, how many."""
    rows = [(name, entry["meaning"], entry["lines"]) for name, entry in card["quarantine"].items()]
    return pd.DataFrame(rows, columns=["reason", "meaning", "lines"])


def counted(card: Card) -> pd.DataFrame:
    """What was counted: personal data by kind, unsafe records by category, thinking by source."""
    counted = card["counted"].items()
    rows = [(group, kind, number) for group, counts in counted for kind, number in counts.items()]
    return pd.DataFrame(rows, columns=["what", "kind", "count"])


def two_labels(card: Card) -> pd.DataFrame:
    """Questions that are kept with more than one label: where each one's lines are."""
    shown = card["two labels"]["shown"]
    rows = [(str(i), row["label"], row["where"]) for i, same in enumerate(shown, 1) for row in same]
    return pd.DataFrame(rows or [("none", "", "")], columns=["question", "label", "line"])


def split(card: Card) -> pd.DataFrame:
    """What stays on one side of the split, and whether anything alike got to both."""
    found = card["split"]
    doubled, left_out = found["held out with one alike in train"], found["comparisons left out"]
    rows = {
        "groups given by the records": f"{found['groups']:,}, of {found['lines in groups']:,} lines",
        "kept together, being alike, the same or of one group": f"{found['lines in clusters']:,} lines; "
        f"most in one cluster: {found['largest cluster']:,}",
        f"held out, with one alike by {found['alike from']:g} or more in train": "not looked for"
        if doubled is None
        else f"{doubled:,} of {found['held out']:,}",
        "comparisons left out, too many lines being alike": f"{sum((left_out or {}).values()):,}",
    }
    return pd.DataFrame(rows.items(), columns=["what", "this run"])


def unsafe(card: Card) -> pd.DataFrame:
    """What was flagged as unsafe, by label, against all that was judged."""
    found = card["unsafe"]
    rows = {name: found["flagged"][name] for name in found["flagged"]} | {"(all judged)": found["judged"]}
    return pd.DataFrame(rows).T.rename_axis("flagged as").reset_index()


def measured(card: Card) -> pd.DataFrame:
    """What the word list finds on real sets."""
    return pd.DataFrame(card["unsafe"]["measured"], columns=["set", "texts", "flagged", "share"])


def warnings(card: Card) -> str:
    """What to look at before training: thinking that is a template, answers that comply, no held-out row."""
    thinkings, refusals = card["thinkings"], card["refusals"]
    lines = [
        f"{thinkings['distinct']:,} of {thinkings['samples']:,} thinkings are distinct "
        f"({thinkings['share']:.1%}); "
        f"{refusals['comply']:,} of {refusals['judged']:,} answers to DENY and REFUSE seem to comply."
    ]
    parts = (thinkings, refusals, card["split"])
    lines += [f"**Warning:** {part['warning']}." for part in parts if part["warning"]]
    return "\n\n".join(lines)


def classifier(card: Card) -> pd.DataFrame:
    """How good the classifier of unsafe text is on records that it has not seen."""
    found = card["classifier"] or {"none": "dataset.nsfw_training names no labelled records"}
    return pd.DataFrame(found.items(), columns=["figure", "value"]).astype(str)


def inputs(card: Card) -> pd.DataFrame:
    """The input files: name, size, format, compression, encoding, hash."""
    files = pd.DataFrame(card["inputs"]).drop(columns="entry", errors="ignore")
    return files.assign(sha256=files["sha256"].str[:16] + "…")


def quarantined(directory: Path, most: int = 3) -> pd.DataFrame:
    """The first few quarantined lines of each reason: where they are and why, never what they say."""
    seen: Counter[str] = Counter()
    rows = []
    with (directory / "quarantine.jsonl").open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            seen[row["reason"]] += 1
            if seen[row["reason"]] <= most:
                rows.append(row)
    table = pd.DataFrame(rows, columns=["file", "line", "reason", "detail"])
    return table.sort_values(["reason", "line"], ignore_index=True)


def draw_samples(directory: Path, count: int = 10, seed: int = 0) -> list[dict[str, Any]]:
    """Return training samples drawn at random, without reading all; held-out ones where all are held out."""
    paths = [directory / f"{split}.jsonl" for split in ("train", "eval")]
    path = next(path for path in paths if path.stat().st_size)
    found: dict[str, dict[str, Any]] = {}
    with path.open("rb") as file:
        for offset in np.random.default_rng(seed).integers(0, path.stat().st_size, 20 * count):
            file.seek(int(offset))
            file.readline()
            line = file.readline()
            if not line:  # the offset was in the last line: take the first
                file.seek(0)
                line = file.readline()
            row = json.loads(line)
            found.setdefault(row["id"], row)
            if len(found) == count:
                break
    return list(found.values())


def sample_html(samples: list[dict[str, Any]]) -> str:
    """Show samples as a reader would see them: the question, the private thinking folded, the answer."""
    return "\n".join(map(_one_sample, samples))


def _one_sample(row: dict[str, Any]) -> str:
    label, cell = row["label"], 'style="white-space: pre-wrap; margin: 0.2em 0"'
    head = f"{row['format']} · {row['task'] or 'no task'} · {row['source']['file']}:{row['source']['line']}"
    thinking = html.escape(row["thinking"])
    private = f"<details><summary>thinking (private)</summary><p {cell}>{thinking}</p></details>"
    return (
        f'<div style="border-left: 4px solid {COLORS[label]}; padding: 0.3em 0.9em; margin: 0.8em 0">'
        f"<small><b>{label}</b> · {html.escape(head)}</small>"
        f"<p {cell}><b>Q</b> {html.escape(row['question'])}</p>{private if thinking else ''}"
        f"<p {cell}><b>A</b> {html.escape(row['final'])}</p></div>"
    )
