"""Phi3 folders with random weights for tests and benchmarks: small ones, and ones of Phi-3.5's shapes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, Phi3ForCausalLM

from so8t_helpers.demo.base_model import CONFIG
from so8t_helpers.demo.tokenizer import write_tokenizer
from so8t_helpers.phi3.shape import HEAD

TEXTS = (
    "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。",
    "東京都の人口は約1,400万人です。大阪府の人口は約880万人です。",
    "次の文から日付を抜き出してください。会議は2024年5月17日に開かれます。",
    "The quick brown fox jumps over the lazy dog. 12345 + 67890 = 80235.",
    "ひらがな、カタカナ、漢字、記号！？「」『』（）を混ぜた文章です。",
)
REAL = Path(__file__).resolve().parents[2] / "shared" / "phi35"  # the published tokenizer and configuration


def small_folder(folder: Path, layers: int = 2, dtype: torch.dtype = torch.float16, **config: object) -> Path:
    """Make a folder like the demo's base, with random weights and a tokenizer trained on a few lines."""
    write_side_files(folder, num_hidden_layers=layers, **config)
    write_weights(folder, dtype)
    return folder


def write_side_files(folder: Path, **config: object) -> None:
    """Write config.json, the demo's with `config` over it, and a tokenizer trained on a few lines."""
    folder.mkdir(parents=True)
    kanji = "".join(chr(0x4E00 + 11 * i) for i in range(1000))  # pieces enough for the demo's vocabulary
    write_tokenizer(folder, [f"{text} {number}" for number in range(40) for text in TEXTS] + [kanji])
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}), encoding="utf-8")


def real_folder(folder: Path, layers: int) -> Path:
    """Make a folder with Phi-3.5's real tokenizer and shapes, fewer layers, random float16 weights."""
    shutil.copytree(REAL, folder)
    data = json.loads((REAL / "config.json").read_text(encoding="utf-8"))
    data["num_hidden_layers"] = layers
    (folder / "config.json").chmod(0o644)
    (folder / "config.json").write_text(json.dumps(data), encoding="utf-8")
    write_weights(folder, torch.float16)
    return folder


def write_weights(folder: Path, dtype: torch.dtype) -> None:
    """Write random weights of the configuration's shapes; fixed seed, spread as trained weights are."""
    with torch.device("meta"):
        model = Phi3ForCausalLM(AutoConfig.from_pretrained(folder))
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for name, parameter in model.state_dict().items():
        if name == HEAD and model.config.tie_word_embeddings:
            continue  # as published: the embedding stands for it
        spread = torch.randn(parameter.shape, generator=generator)
        weights[name] = (1.0 + 0.05 * spread if name.endswith("norm.weight") else 0.05 * spread).to(dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
