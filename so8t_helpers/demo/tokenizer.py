"""The demo's tokenizer: SentencePiece BPE with byte fallback, dressed as Phi-3.5's published files are.

Everything that decides ids (normalizer, merges, added tokens and which of them strip the white space to
their right) follows the published tokenizer.json, so that what holds here holds for the real model.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece as spm
from sentencepiece import sentencepiece_model_pb2 as spm_format

PIECES = 1440
# The pieces, the added tokens and room to spare, as the real model has (32011 of 32064).
VOCAB_SIZE = 1504

# In the order of Phi-3.5's ids 32000 to 32010.
ADDED_TOKENS = (
    "<|endoftext|>",
    "<|assistant|>",
    "<|placeholder1|>",
    "<|placeholder2|>",
    "<|placeholder3|>",
    "<|placeholder4|>",
    "<|system|>",
    "<|end|>",
    "<|placeholder5|>",
    "<|placeholder6|>",
    "<|user|>",
)
END_OF_TEXT = PIECES

_FLAGS = {"single_word": False, "lstrip": False, "normalized": False}

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}{{'<|system|>\n"
    "' + message['content'] + '<|end|>\n"
    "'}}{% elif message['role'] == 'user' %}{{'<|user|>\n"
    "' + message['content'] + '<|end|>\n"
    "'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n"
    "' + message['content'] + '<|end|>\n"
    "'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n"
    "' }}{% else %}{{ eos_token }}{% endif %}"
)


def write_tokenizer(folder: Path, texts: Iterable[str]) -> None:
    """Train on `texts` and write every tokenizer file of a published Phi-3.5 folder."""
    model = train_sentencepiece(texts)
    (folder / "tokenizer.model").write_bytes(model)
    # As published: <unk> and <s> are special, </s> is a plain added token that strips to its right.
    added = [
        _token(0, "<unk>", rstrip=False),
        _token(1, "<s>", rstrip=False),
        _token(2, "</s>", rstrip=True, special=False),
        *(_token(i, text, rstrip=text != "<|endoftext|>") for i, text in enumerate(ADDED_TOKENS, PIECES)),
    ]
    files: dict[str, Any] = {
        "tokenizer.json": _fast_tokenizer(model, added),
        "tokenizer_config.json": _tokenizer_config(added),
        "added_tokens.json": {
            content: PIECES + ADDED_TOKENS.index(content) for content in sorted(ADDED_TOKENS)
        },
        "special_tokens_map.json": {
            f"{role}_token": {**_FLAGS, "content": text, "rstrip": False}
            for role, text in zip(
                ("bos", "eos", "pad", "unk"), ("<s>", *["<|endoftext|>"] * 2, "<unk>"), strict=True
            )
        },
    }
    for name, data in files.items():
        text = json.dumps(data, ensure_ascii=False, indent=2) + "\n"
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


def train_sentencepiece(texts: Iterable[str]) -> bytes:
    """Return a SentencePiece model trained with the options of Phi-3.5's (but for its size)."""
    lines = (line for text in texts for line in text.splitlines() if line)
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        model_type="bpe",
        vocab_size=PIECES,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        max_sentencepiece_length=16,
        # One thread and no sampling: the same text gives the same bytes.
        num_threads=1,
        shuffle_input_sentence=False,
        max_sentence_length=100_000,
        minloglevel=2,
    )
    return model.getvalue()


def _token(number: int, content: str, rstrip: bool, special: bool = True) -> dict[str, Any]:
    return {"id": number, "content": content, **_FLAGS, "rstrip": rstrip, "special": special}


def _merges(pieces: dict[str, int]) -> list[list[str]]:
    """Return BPE merges: every split of a piece into two pieces, by the joined piece's rank.

    The rule is that of transformers' conversion of SentencePiece models.
    """
    merges = []
    for piece, rank in pieces.items():
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        known = sorted((pieces[a], pieces[b], a, b) for a, b in splits if a in pieces and b in pieces)
        merges += [(rank, [a, b]) for _, _, a, b in known]
    return [pair for _, pair in sorted(merges, key=lambda merge: merge[0])]


def _fast_tokenizer(model: bytes, added: list[dict[str, Any]]) -> dict[str, Any]:
    """Return tokenizer.json's content for the `tokenizers` library."""
    proto = spm_format.ModelProto.FromString(model)  # type: ignore[attr-defined]
    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    normal = {piece.piece: i for i, piece in enumerate(proto.pieces) if piece.type == piece.NORMAL}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [sequence],
            "pair": [sequence, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": _merges(normal),
        },
    }


def _tokenizer_config(added: list[dict[str, Any]]) -> dict[str, Any]:
    decoder = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in added}
    return {
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": None,
        "added_tokens_decoder": decoder,
        "bos_token": "<s>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "extra_special_tokens": {},
        "legacy": False,
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }
