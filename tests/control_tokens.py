"""A model that writes control tokens where nobody wants them, and what an engine must make of it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import phi3_folders
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from so8t_helpers.engines.base import Engine, collect
from so8t_helpers.gguf.stage import export
from so8t_helpers.phi3.shape import EMBEDDING, HEAD
from so8t_helpers.settings import load_settings
from tests.dialects import PHI35

# By control token: what the model is asked, what it writes before that token and what after it.
CHAINS = {token: [chr(0x4E00 + 11 * (3 * i + k)) for k in range(3)] for i, token in enumerate(PHI35.controls)}


def chains(root: Path) -> tuple[Path, Path]:
    """Make a Phi3 folder that looks at the last token alone and goes along the chains, and its F16 file."""
    folder = root / "chains"
    phi3_folders.small_folder(folder, layers=1, tie_word_embeddings=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")) or name == HEAD:
            weight.zero_()
    for token, (asked, before, after) in CHAINS.items():
        ids = tokenizer.convert_tokens_to_ids([asked, before, token, after, PHI35.end])
        assert len(set(ids)) >= 4 and tokenizer.unk_token_id not in ids[:2]
        for one, following in pairwise(ids):
            # What ends an answer follows many: it must be likeliest after each of them.
            weights[HEAD][following] += weights[EMBEDDING][one] / weights[EMBEDDING][one].float().norm()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (root / "eval.jsonl").write_text('{"text": "東京都の人口は約1,400万人です。"}\n', encoding="utf-8")
    section = {"model_dir": str(folder), "types": ["f16"]}
    chosen = {"run": {"root": str(root)}, "training": {"dataset_dir": str(root)}, "gguf": section}
    return folder, export(load_settings("demo", chosen)).files["f16"]


def check(engine: Engine) -> None:
    """Assert that stops fire at control tokens, and that the scanner sees those that are no stops."""
    for token, (asked, before, after) in CHAINS.items():
        done = collect(engine.complete(asked, max_tokens=8))
        assert done.stopped, token
        written = done.text.replace(" ", "")
        assert written == (before if token in engine.dialect.stops else f"{before}{token}{after}"), token
