"""Tables for the notebook, read back from the stage's files."""

from __future__ import annotations

from typing import Any

import pandas as pd

from so8t_helpers.run_folder import read_jsonl
from so8t_helpers.settings import Settings

_COLUMNS = ("format", "separated", "answer", "label_f1", "refusal", "over_refusal")
_PAIRED = ("format", "answer", "label_accuracy", "refusal")


def load_answers(settings: Settings) -> pd.DataFrame:
    """Read answers.jsonl of this run: a row for each model and prompt."""
    return pd.DataFrame(read_jsonl(settings.run_dir / "05_ollama_eval" / "answers.jsonl"))


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
