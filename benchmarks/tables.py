"""Writes docs/claims.md and the READMEs' short table from benchmarks/results/*.json, none typed.

Run `python benchmarks/tables.py`; with `--check` it changes nothing and ends with 1 where a table is old. A
result's `claims` are lists of {"name", "value", "bound", "unit", "holds"}; the place of a page's table is
marked with `<!-- claims -->` and `<!-- /claims -->`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
ALL = "docs/claims.md"
HEADS = {
    ALL: ("Claim", "Measured", "Bound", "Benchmark"),
    "README.md": ("Claim", "Measured", "Bound", "Benchmark"),
    "README.ja.md": ("主張", "測定値", "上限・下限", "ベンチマーク"),
}
# What a newcomer cares about: (result file, claim) -> what each README calls it.
CHOSEN = {
    ("train_gpu", "8-bit: tokens/s over Unsloth's (warm)"): (
        "Training speed over Unsloth's 8-bit path, gates and PET included",
        "8 ビット学習の速度、Unsloth 比（ゲートと PET 込み）",
    ),
    ("train_gpu", "fp16, 2,048 tokens, process capped at 11 GiB"): (
        "Memory of a training at full size, for a 12 GB card",
        "実寸の学習に要る GPU メモリ（12 GB のカード向け）",
    ),
    ("train_gpu", "time for gates and PET"): ("What gates and PET cost", "ゲートと PET にかかる時間"),
    ("bake", "logits, gated against baked"): (
        "Largest difference of a logit, gated against baked",
        "焼き込み前後のロジットの最大差",
    ),
    ("bake", "bake against copying the same files"): (
        "Baking against copying the same files",
        "焼き込みの時間、同じファイルのコピー比",
    ),
    ("gguf_files", "bytes equal to llama.cpp's, Q4_K_M"): (
        "Q4_K_M bytes equal to llama.cpp's own",
        "Q4_K_M が llama.cpp 自身の出力と一致するバイト",
    ),
    ("redaction", "leaks"): (
        "Thinking let out, of a million hostile outputs",
        "百万件の敵対的な出力から漏れた考え",
    ),
    ("dataset", "everything on"): ("Records judged with every policy on", "全ポリシー有効でのレコード処理"),
}


def _claims(results: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted(results.glob("*.json")):
        for claim in json.loads(path.read_text(encoding="utf-8")).get("claims", []):
            yield path.stem, claim


def claims_table(page: str, results: Path = RESULTS) -> str:
    """Return a page's Markdown table: every claim of every result file, or the READMEs' chosen ones."""
    heads = HEADS[page]
    rows = {}
    for stem, claim in _claims(results):
        measured = "–"  # a stack that did not get to run
        if claim["value"] is not None:
            mark = "" if claim["holds"] else " (**missed**)"
            measured = f"{_short(claim['value'])} {claim['unit']}{mark}"
        # One benchmark may make several results: study_gates.json, study_pet.json…
        script = stem if (Path(__file__).parent / f"{stem}.py").is_file() else stem.rpartition("_")[0] or stem
        rows[stem, claim["name"]] = (measured, _short(claim["bound"]), f"`benchmarks/{script}.py`")
    if page == ALL:
        lines = [(name, *row) for (_, name), row in rows.items()]
    else:
        language = list(HEADS).index(page) - 1
        lines = [(names[language], *rows[key]) for key, names in CHOSEN.items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ("---",) * len(heads), *lines])


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def updated(text: str, page: str, results: Path = RESULTS) -> str:
    """Return a page's text with its marked block made anew."""
    block = f"<!-- claims -->\n{claims_table(page, results)}\n<!-- /claims -->"
    new, count = re.subn(r"<!-- claims -->.*?<!-- /claims -->", lambda _: block, text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"expected one <!-- claims --> block, found {count}")
    return new


def main(arguments: list[str]) -> int:
    """Rewrite (or with --check compare) the pages that hold a table."""
    old = 0
    for name in HEADS:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        new = updated(text, name)
        if new != text:
            old += 1
            print(f"{name}: {'is old' if '--check' in arguments else 'rewritten'}")
            if "--check" not in arguments:
                path.write_text(new, encoding="utf-8", newline="\n")
    return 1 if old and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
