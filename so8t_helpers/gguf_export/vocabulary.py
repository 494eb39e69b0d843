"""The tokenizer as GGUF stores it: every piece with its score and type, as llama.cpp's converter reads it.

Follows `Phi3MiniModel.set_vocab` in llama.cpp's conversion/phi.py, later sources overriding earlier ones.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType
from sentencepiece import SentencePieceProcessor

from so8t_helpers.run_folder import StageError

_ADDED_SCORE = -1000.0
_PADDING_SCORE = -10000.0


@dataclass
class Vocabulary:
    """tokens, scores and types, one entry per row of the embedding."""

    tokens: list[bytes]
    scores: list[float]
    types: list[int]

    def set(self, index: int, token: str, score: float, kind: TokenType, source: Path) -> None:
        """Set one entry.

        Raises:
            StageError: the id lies outside the embedding; `source` is the file that names it.
        """
        if not 0 <= index < len(self.tokens):
            raise StageError(
                f"{source}: token {token!r} has id {index}, but vocab_size is {len(self.tokens)}; "
                "the embedding has no row for it"
            )
        self.tokens[index], self.scores[index], self.types[index] = token.encode("utf-8"), score, kind

    def add(self, index: int, token: str, special: bool, source: Path) -> None:
        """Set an added token: special ones are CONTROL, so that llama.cpp hides them from the text."""
        kind = TokenType.CONTROL if special else TokenType.USER_DEFINED
        self.set(index, token, _ADDED_SCORE, kind, source)


def read_vocabulary(folder: Path, vocab_size: int) -> Vocabulary:
    """Read the SentencePiece model and the added tokens of a Phi3 folder, padded to `vocab_size`.

    Raises:
        StageError: no tokenizer.model, or a token without a row in the embedding.
    """
    path = folder / "tokenizer.model"
    if not path.is_file():
        raise StageError(
            f"{path}: missing; a GGUF of a Phi3 model is made from the SentencePiece model. transformers 5 "
            "does not save it: copy it from the base model's folder"
        )
    pieces = SentencePieceProcessor(model_file=str(path))
    vocabulary = Vocabulary(
        [f"[PAD{i}]".encode() for i in range(vocab_size)],
        [_PADDING_SCORE] * vocab_size,
        [TokenType.UNUSED] * vocab_size,
    )
    for index in range(pieces.vocab_size()):
        kind = _piece_type(pieces, index)
        vocabulary.set(index, pieces.id_to_piece(index), pieces.get_score(index), kind, path)
    for token, index in _read_json(folder / "added_tokens.json").items():
        vocabulary.add(index, token, False, folder / "added_tokens.json")
    config = folder / "tokenizer_config.json"
    for number, entry in _read_json(config).get("added_tokens_decoder", {}).items():
        vocabulary.add(int(number), entry["content"], bool(entry.get("special")), config)
    fast = folder / "tokenizer.json"
    for entry in _read_json(fast).get("added_tokens", []):
        vocabulary.add(int(entry["id"]), entry["content"], bool(entry.get("special")), fast)
    return vocabulary


def _piece_type(pieces: SentencePieceProcessor, index: int) -> TokenType:
    if pieces.is_unknown(index):
        return TokenType.UNKNOWN
    if pieces.is_control(index):
        return TokenType.CONTROL
    if pieces.is_unused(index):
        return TokenType.UNUSED
    if pieces.is_byte(index):
        return TokenType.BYTE
    return TokenType.NORMAL


def _read_json(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return data
