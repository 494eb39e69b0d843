"""Folders with a byte-level BPE tokenizer and random weights: Phi-4-mini's shape in small, and SmolLM2's.

The tokenizers are trained on this project's own pages; what decides ids otherwise (pre-tokenizer, places and
flags of the special tokens, the tokenizer's class) is as published with the real models.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, TokenType
from phi3_folders import TEXTS, write_weights
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tests.dialects import PUBLISHED

ROOT = Path(__file__).resolve().parents[1]

# o200k's pattern (tiktoken's tiktoken_ext/openai_public.py), in the tokenizer.json of GPT-4o and Phi-4-mini.
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Phi-4-mini's, in the order of its ids: 199999, then a gap without tokens, then from 200018 on.
PHI4_FIRST = "<|endoftext|>"
PHI4_GAP = 18
PHI4_SPECIAL = (
    "<|endofprompt|>",
    "<|assistant|>",
    "<|end|>",
    "<|user|>",
    "<|system|>",
    "<|tool|>",
    "<|/tool|>",
    "<|tool_call|>",
    "<|/tool_call|>",
    "<|tool_response|>",
    "<|tag|>",
)
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
PHI4_VOCABULARY = 1536  # rows of the small model, of which the tokenizer fills all but 35, as the real one
# The published config.json in small; half as many rotated pairs, and so factors, as in the real model.
PHI4_CONFIG: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "vocab_size": PHI4_VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "partial_rotary_factor": 0.75,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0] * 24,
        "long_factor": [1.0 + 0.5 * i * i / 5 for i in range(24)],
    },
    "sliding_window": 262144,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "initializer_range": 0.02,
    "use_cache": True,
    "torch_dtype": "bfloat16",
}
SMOLLM2_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>")
# What bos, eos, pad and unk are in SmolLM2's tokenizer.
SMOLLM2_ROLES = dict(zip(ROLES, ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>"), strict=True))
# SmolLM2-135M's (d = 576 in 9 heads of 64, 3 of them for keys and values), with two layers and a small MLP.
SMOLLM2_CONFIG: dict[str, Any] = {
    **{key: value for key, value in PHI4_CONFIG.items() if key not in {"rope_scaling", "sliding_window"}},
    "vocab_size": 1024,
    "hidden_size": 576,
    "intermediate_size": 768,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "original_max_position_embeddings": 8192,
    "partial_rotary_factor": 1.0,
    "rope_theta": 100000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def small_phi4_mini(
    folder: Path, rstrip: bool = True, dtype: torch.dtype = torch.bfloat16, **config: Any
) -> Path:
    """Make a folder of Phi-4-mini's shape in small: tied, GQA, partial rotary, longrope, a padded vocabulary.

    Args:
        rstrip: whether the chat's marks take the white space to their right, as the published ones do.
        config: what config.json says otherwise.
    """
    folder.mkdir(parents=True)
    pieces = PHI4_VOCABULARY - 35 - PHI4_GAP - 1 - len(PHI4_SPECIAL)
    split = pre_tokenizers.Split(Regex(O200K), behavior="removed", invert=True)
    tokenizer = _trained(pre_tokenizers.Sequence([split, _bytes()]), pieces)
    marks = {PHI4_FIRST: pieces, **{t: pieces + PHI4_GAP + 1 + i for i, t in enumerate(PHI4_SPECIAL)}}
    stripping = set(marks) - {"<|endoftext|>", "<|endofprompt|>"} if rstrip else set()
    end = marks[PHI4_FIRST]
    _write_tokenizer(
        folder,
        tokenizer,
        marks,
        stripping,
        dict.fromkeys(ROLES, PHI4_FIRST),
        PUBLISHED["Phi-4-mini"].template,
    )
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    _write_json(folder / "config.json", {**PHI4_CONFIG, **ids, **config})
    _write_json(
        folder / "generation_config.json",
        {"_from_model_config": True, **ids, "eos_token_id": [marks["<|end|>"], end]},
    )
    write_weights(folder, dtype)
    return folder


def small_smollm2(folder: Path, dtype: torch.dtype = torch.bfloat16, **config: Any) -> Path:
    """Make a folder of SmolLM2's shape as a Phi3: rows of 576, no longrope, no row to spare."""
    folder.mkdir(parents=True)
    digits = pre_tokenizers.Digits(individual_digits=True)
    pieces = SMOLLM2_CONFIG["vocab_size"]
    before = pre_tokenizers.Sequence([digits, _bytes(use_regex=True)])
    tokenizer = _trained(before, pieces, first=SMOLLM2_SPECIAL)
    marks = {token: i for i, token in enumerate(SMOLLM2_SPECIAL)}
    _write_tokenizer(folder, tokenizer, marks, set(), SMOLLM2_ROLES, PUBLISHED["SmolLM2"].template)
    _write_json(folder / "config.json", {**SMOLLM2_CONFIG, **config})
    write_weights(folder, dtype)
    return folder


def real_smollm2_tokenizer(folder: Path) -> Path:
    """Write the real SmolLM2's tokenizer, read from the GGUF file that SO8T_SMOLLM2 names, and a config.json.

    The file keeps tokens, types and merges; the pre-tokenizer is the one that its `tokenizer.ggml.pre` means.
    """
    folder.mkdir(parents=True)
    fields = GGUFReader(os.environ["SO8T_SMOLLM2"]).fields
    tokens, types = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type"))
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, _bytes(use_regex=True)])
    tokenizer.decoder = decoders.ByteLevel()
    marks = {t: i for i, (t, kind) in enumerate(zip(tokens, types, strict=True)) if kind == TokenType.CONTROL}
    template = fields["tokenizer.chat_template"].contents()
    _write_tokenizer(folder, json.loads(tokenizer.to_str()), marks, set(), SMOLLM2_ROLES, template)
    _write_json(folder / "config.json", {**SMOLLM2_CONFIG, "vocab_size": len(tokens)})
    return folder


def corpus() -> Iterable[str]:
    """Text in Japanese and English to train a tokenizer on."""
    pages = (ROOT / "README.md", ROOT / "README.ja.md", ROOT / "docs" / "LOG.md")
    return (*TEXTS, *(page.read_text(encoding="utf-8") for page in pages))


def _bytes(use_regex: bool = False) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=use_regex)


def _trained(before: pre_tokenizers.PreTokenizer, pieces: int, first: Iterable[str] = ()) -> dict[str, Any]:
    """Train byte-level BPE of exactly `pieces` entries; return tokenizer.json's content."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = before
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=pieces, special_tokens=list(first), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    assert tokenizer.get_vocab_size() == pieces, "the pages are too short for so many pieces"
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    return content


def _write_tokenizer(
    folder: Path,
    tokenizer: dict[str, Any],
    marks: dict[str, int],
    stripping: set[str],
    roles: dict[str, str],
    template: str,
) -> None:
    """Write the files of a published GPT-2-like tokenizer: marks by id, those that strip to their right."""
    flags = {"single_word": False, "lstrip": False, "normalized": False, "special": True}
    added = [
        {"id": index, "content": token, **flags, "rstrip": token in stripping}
        for token, index in marks.items()
    ]
    tokenizer["added_tokens"] = added
    tokenizer["model"]["vocab"] |= marks  # only so can an id stand behind a gap
    merges = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    vocabulary = {token: i for token, i in tokenizer["model"]["vocab"].items() if token not in marks}
    _write_json(folder / "tokenizer.json", tokenizer)
    _write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    decoder = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in added}
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        **roles,
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131072,
        "tokenizer_class": "GPT2Tokenizer",
    }
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", roles)


def _write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
