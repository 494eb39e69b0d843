"""Small inputs of the dataset stage for tests: records, files, and the profile that reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers

from so8t_helpers import settings as so8t_settings
from so8t_helpers.demo.tokenizer import ADDED_TOKENS, CHAT_TEMPLATE
from so8t_helpers.settings import Settings

ANSWERS = {
    "ALLOW": "はい、{}です。",
    "ESCALATION": "担当者に引き継ぎます。{}",
    "DENY": "その依頼には応じられません。{}",
    "REFUSE": "危険なためお答えできません。{}",
}
LABELS = tuple(ANSWERS)


def character_tokenizer(folder: Path) -> Path:
    """Write a tokenizer of Phi-3's kind (BPE with byte fallback) that has single characters alone."""
    pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *map(chr, range(33, 127))]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.ByteFallback()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    # The marks stand here alone: in tokenizer.json they would change how long the tests' records are.
    marks = {str(i): {"content": mark} for i, mark in enumerate(ADDED_TOKENS, len(pieces))}
    config = {"chat_template": CHAT_TEMPLATE, "eos_token": ADDED_TOKENS[0], "added_tokens_decoder": marks}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def record(number: int, label: str = "ALLOW", **more: object) -> dict[str, Any]:
    """Return a good record, unlike those of all other numbers."""
    words = [f"{chr(0x4E00 + (number * 37 + k * 911) % 5000)}" * 2 for k in range(12)]
    return {
        "instruction": f"{number}番の文を読み、答えてください。{''.join(words)}",
        "output": ANSWERS[label].format(words[0]),
        "label": label,
        "reasoning": f"文の最初は{words[0]}。だからこう答える。",
        "licence": "MIT",
        **more,
    }


def many(count: int) -> list[dict[str, Any]]:
    """Return good records of all labels in turn."""
    return [record(n, LABELS[n % 4]) for n in range(count)]


def write(path: Path, rows: list[Any], encoding: str = "utf-8") -> Path:
    """Write rows as JSON lines; bytes stand as they are."""
    lines = [
        row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode(encoding)
        for row in rows
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def profile(
    tmp_path: Path, base: Path, inputs: list[Path], name: str = "t", length: int = 2048, **dataset: object
) -> Settings:
    """Return settings of a run in `tmp_path` that reads `inputs` in this process."""
    return so8t_settings.load_settings(
        "demo",
        {
            "run": {"name": name, "root": str(tmp_path / "runs")},
            "model": {"base": str(base)},
            "training": {"sequence_length": length},
            "dataset": {"inputs": [str(path) for path in inputs], "workers": 1, **dataset},
        },
    )


def outputs(directory: Path) -> dict[str, bytes]:
    """Return the stage's three files."""
    return {
        name: (directory / name).read_bytes() for name in ("train.jsonl", "eval.jsonl", "quarantine.jsonl")
    }
