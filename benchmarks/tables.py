"""Rewrites the tables of both READMEs from benchmarks/results/*.json, so that no figure is typed by hand.

Run `python benchmarks/tables.py`; with `--check` it changes nothing and ends with 1 where a table is old. A
result's `claims` are lists of {"name", "value", "bound", "unit", "holds"}; a README marks the place with
`<!-- claims -->` and `<!-- /claims -->`.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
HEADS = {
    "README.md": ("Claim", "Measured", "Bound", "Benchmark"),
    "README.ja.md": ("主張", "測定値", "上限・下限", "ベンチマーク"),
}


def claims_table(heads: tuple[str, ...], results: Path = RESULTS) -> str:
    """Return one Markdown table with a row for every claim of every result file."""
    rows = [heads, ("---",) * len(heads)]
    for path in sorted(results.glob("*.json")):
        for claim in json.loads(path.read_text(encoding="utf-8")).get("claims", []):
            measured = "–"  # a stack that did not get to run
            if claim["value"] is not None:
                mark = "" if claim["holds"] else " (**missed**)"
                measured = f"{_short(claim['value'])} {claim['unit']}{mark}"
            rows.append((claim["name"], measured, _short(claim["bound"]), f"`benchmarks/{path.stem}.py`"))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def updated(text: str, heads: tuple[str, ...], results: Path = RESULTS) -> str:
    """Return a README's text with its marked block made anew."""
    block = f"<!-- claims -->\n{claims_table(heads, results)}\n<!-- /claims -->"
    new, count = re.subn(r"<!-- claims -->.*?<!-- /claims -->", lambda _: block, text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"expected one <!-- claims --> block, found {count}")
    return new


def main(arguments: list[str]) -> int:
    """Rewrite (or with --check compare) both READMEs."""
    old = 0
    for name, heads in HEADS.items():
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        new = updated(text, heads)
        if new != text:
            old += 1
            print(f"{name}: {'is old' if '--check' in arguments else 'rewritten'}")
            if "--check" not in arguments:
                path.write_text(new, encoding="utf-8", newline="\n")
    return 1 if old and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
