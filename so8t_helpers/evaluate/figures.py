"""Figures of 05_ollama_eval: shares with intervals, confusion of decisions, correctness by task, speed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from so8t_helpers.show.style import COLORS, INK, SEQUENTIAL, SERIES, new_figure, text_on

_SHARES = {
    "format": "right format",
    "separated": "thinking separated",
    "answer": "answer correct",
    "label_accuracy": "label correct",
    "label_f1": "label, macro F1",
    "refusal": "refusal where due",
    "over_refusal": "over-refusal (lower is better)",
}


def shares(scores: dict[str, Any]) -> Figure:
    """One panel a share, a dot a model with its 95% bootstrap interval."""
    models = scores["models"]
    height = 0.24 * len(models) + 0.75
    fig, axes = new_figure(height=height * 4, ncols=2, nrows=4, sharex=True, sharey=True)
    for ax, (key, title) in zip(axes.flat, _SHARES.items(), strict=False):
        for y, (name, entry) in enumerate(models.items()):
            if entry[key] is None:
                continue
            value, (low, high) = 100 * entry[key], (100 * end for end in entry["ci"][key])
            color = COLORS.get(name, COLORS["muted"])
            ax.plot([low, high], [y, y], color=color, linewidth=2.5, solid_capstyle="round")
            ax.plot([value], [y], "o", color=color)
        ax.set(title=title, xlim=(-4, 104), ylim=(len(models) - 0.4, -0.6))
        ax.set_yticks(range(len(models)), list(models))
    for ax in (axes[-1, 0], axes[-2, 1]):  # the lowest of each column: the last place stays empty
        ax.set_xlabel("% of prompts")
        ax.tick_params(labelbottom=True)
    axes[-1, 1].set_axis_off()
    return fig


def confusion(scores: dict[str, Any], names: list[str]) -> Figure:
    """True label against the label that the thinking states, a panel for each model named."""
    fig, axes = new_figure(height=3.4, ncols=len(names), squeeze=False, sharey=True)
    for ax, name in zip(axes[0], names, strict=True):
        table = scores["models"][name]["confusion"]
        counts = np.array(table["counts"])
        share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        image = ax.imshow(share, cmap=SEQUENTIAL, vmin=0, vmax=1, aspect="auto")
        for (row, column), count in np.ndenumerate(counts):
            ink = text_on(image.cmap(image.norm(share[row, column])))
            ax.text(column, row, str(count), ha="center", va="center", color=ink, fontsize=9.5)
        ax.set_xticks(range(len(table["stated"])), table["stated"], rotation=40, ha="right")
        ax.set_yticks(range(len(table["labels"])), table["labels"])
        ax.set(title=name, xlabel="stated in the thinking")
        ax.grid(False)
    axes[0, 0].set_ylabel("true label")
    return fig


def by_task(scores: dict[str, Any], names: list[str]) -> Figure:
    """Share of correct answers by task for some models; the number of prompts follows the task."""
    entries = {name: scores["models"][name]["by_task"] for name in names}
    counts = {task: found["n"] for task, found in entries[names[0]].items() if found["mean"] is not None}
    fig, ax = new_figure(height=0.32 * len(counts) + 0.9)
    offsets = np.linspace(-0.22, 0.22, len(names)) if len(names) > 1 else [0.0]
    for name, offset in zip(names, offsets, strict=True):
        y = np.arange(len(counts)) + offset
        values = [100 * entries[name][task]["mean"] for task in counts]
        ax.plot(values, y, "o", color=COLORS.get(name, COLORS["muted"]), label=name)
    ax.set_yticks(range(len(counts)), [f"{task or '(none)'} ({n})" for task, n in counts.items()])
    ax.set(xlabel="% of answers correct", xlim=(-3, 103), ylim=(len(counts) - 0.4, -0.6))
    fig.legend(loc="outside upper right", ncols=len(names))
    return fig


def speed(scores: dict[str, Any]) -> Figure:
    """Tokens a second and the median time to the first token where streamed, with 95% bootstrap intervals."""
    models = scores["models"]
    fig, (rate, first) = new_figure(height=0.3 * len(models) + 1.1, ncols=2, sharey=True)
    panels = ((rate, "tokens_per_s", 1.0), (first, "first_token_s", 1000.0))
    for ax, key, scale in panels:
        for y, (name, entry) in enumerate(models.items()):
            text = "not streamed" if entry[key] is None else f"{entry[key] * scale:,.0f}"
            value = (entry[key] or 0.0) * scale
            ax.barh([y], [value], color=COLORS.get(name, SERIES[0]), height=0.62)
            if (ends := entry["ci"][key]) is not None:
                value = ends[1] * scale
                ax.plot([end * scale for end in ends], [y, y], color=INK, linewidth=1.2)
            ax.annotate(
                text, (value, y), (4, 0), textcoords="offset points", va="center", color=INK, fontsize=9.5
            )
        ax.margins(x=0.22)
        ax.grid(axis="y", visible=False)
    rate.set(title="Throughput, all prompts", xlabel="tokens per second", ylim=(len(models) - 0.4, -0.6))
    rate.set_yticks(range(len(models)), list(models))
    first.set(title="First token, median", xlabel="milliseconds")
    return fig


def calibration(found: dict[str, Any]) -> Figure:
    """How often stated labels are right over how sure the model is of them; dots grow with their number."""
    fig, ax = new_figure(width=4.4, height=3.4)
    ax.plot([0, 100], [0, 100], color=COLORS["muted"], linestyle=":", linewidth=1.2)
    for part in found["bins"]:
        x, y = 100 * part["confidence"], 100 * part["accuracy"]
        area = 20 + 240 * part["n"] / found["n"]
        ax.scatter([x], [y], s=area, color=COLORS["accent"], alpha=0.85, clip_on=False)
        ax.annotate(str(part["n"]), (x, y), (-10, -4), textcoords="offset points", ha="right", color=INK)
    ax.set(
        xlabel="probability of the stated label, %", ylabel="labels correct, %", xlim=(0, 100), ylim=(0, 102)
    )
    return fig


_COLUMNS = ("format", "separated", "answer", "label_f1", "refusal", "over_refusal")
_PAIRED = ("format", "answer", "label_accuracy", "refusal")


def scores_table(scores: dict[str, Any]) -> pd.DataFrame:
    """A row for each model: shares in percent with their 95% intervals, leaks, speed."""
    rows = {}
    for name, entry in scores["models"].items():
        row = {column.replace("_", " "): _percent(entry[column], entry["ci"][column]) for column in _COLUMNS}
        rows[name] = {
            **row,
            "leaks": f"{entry['leaks']} (≤ {100 * entry['ci']['leaks'][1]:.1f}%)",
            "tokens/s": round(entry["tokens_per_s"]),
            "prompts": entry["n"],
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")


def pairs_table(scores: dict[str, Any]) -> pd.DataFrame:
    """A row for each comparison and main share: difference in points with its interval, gained, lost, p."""
    rows = []
    for pair in scores["pairs"]:
        for name in _PAIRED:
            found = pair[name]
            if found["difference"] is None:
                continue
            low, high = found["ci"]
            rows.append(
                {
                    "from → to": f"{pair['before']} → {pair['after']}",
                    "share": name.replace("_", " "),
                    "points": f"{100 * found['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})",
                    "gained": found["gained"],
                    "lost": found["lost"],
                    "p": f"{found['p']:.4f}" if found["p"] >= 1e-4 else "< 0.0001",
                }
            )
    return pd.DataFrame(rows)


def answers_table(answers: pd.DataFrame, model: str, count: int = 8) -> pd.DataFrame:
    """Some of a model's answers over all labels, the final part only."""
    rows = answers[answers["model"] == model]
    rows = rows.groupby("label", sort=True).head(-(-count // rows["label"].nunique()))
    columns = {"label": "label", "decision": "decision", "prompt": "prompt", "final": "final part"}
    return rows[[*columns, "correct"]].rename(columns=columns).head(count).reset_index(drop=True)


def changed_examples(answers: pd.DataFrame, before: str, after: str, count: int = 6) -> pd.DataFrame:
    """Prompts whose answer turned from right to wrong or back, losses first, the final parts only."""
    a, b = (answers[answers["model"] == name].set_index("id") for name in (before, after))
    both = a.join(b[["final", "correct"]].add_suffix("_after"))
    both = both[both["correct"].notna() & (both["correct"] != both["correct_after"])]
    both = both.assign(change=both["correct_after"].map({True: "gained", False: "lost"}))
    both = both.sort_values("change", ascending=False, kind="stable").head(count)
    table = both[["change", "label", "prompt", "final", "final_after"]]
    return table.rename(columns={"final": before, "final_after": after}).reset_index(drop=True)


def _percent(value: float | None, interval: list[float] | None) -> str:
    if value is None or interval is None:
        return "–"
    return f"{100 * value:.1f} ({100 * interval[0]:.0f}–{100 * interval[1]:.0f})"


def what_ran(scores: dict[str, Any]) -> str:
    """Which program ran the files, and on how many prompts the token ids were compared, in Markdown."""
    parity = scores["parity"]
    return (
        f"Files ran in **{scores['engine']['description']}**. Token ids of {parity['prompts']} prompts were "
        f"compared with those of {parity['measure']}: equal for {', '.join(parity['equal'])}."
    )


def native(scores: dict[str, Any]) -> str:
    """What a client of Ollama was given, in Markdown."""
    found = scores.get("native")
    if not found:
        return "No Ollama here: the embedded llama.cpp gives the raw text, and our parser alone parts it."
    return (
        f"Of {found['n']} chats: same prompt as ours {found['same_prompt']:.0%}, thinking and content apart "
        f"{found['separated']:.0%}, content equal to the final part that our parser releases "
        f"{found['same_final']:.0%}; with `think: false` clean {found['plain_clean']:.0%}."
    )


def conclusion(scores: dict[str, Any]) -> str:
    """The run's answer in Markdown: what the tuning gave, what the smallest file cost, what leaked."""
    models, engine = scores["models"], scores["engine"]
    names = list(models)
    first, last = models[names[0]], models[names[-1]]
    leaks = sum(entry["leaks"] for entry in models.values())
    return (
        f"From {names[0]} to {names[-1]} (in {engine['name']} {engine['version']}), over {last['n']} "
        f"held-out prompts: right format {_share(first['format'])} → **{_share(last['format'])}**, correct "
        f"answers {_share(first['answer'])} → **{_share(last['answer'])}**, macro F1 of the stated label "
        f"{_share(first['label_f1'])} → **{_share(last['label_f1'])}**; refused where due "
        f"{_share(last['refusal'])}, refused without need {_share(last['over_refusal'])}; **{leaks}** leaks. "
        "If format or label are low: train longer (02_train) or look at the dataset's card (01_dataset). If "
        "only a file is worse than baked: take a larger type."
    )


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
