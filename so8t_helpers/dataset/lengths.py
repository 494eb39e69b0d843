"""Token lengths with the profile's tokenizer: counted where they decide, bounded where they cannot."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

# The template's marks, and the space that SentencePiece puts before a text.
_EXTRA_TOKENS = 16


class TokenLengths:
    """Counts tokens as AutoTokenizer would, without its imports.

    A BPE tokenizer begins with single characters and only ever merges: a text has at most as many tokens as
    its characters have alone. That bound costs a hundredth of counting.
    """

    def __init__(self, path: Path):
        self._tokenizer = Tokenizer.from_file(str(path))
        # A tokenizer.json saved by a training run carries that run's cut and padding.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._longest = max(map(len, self._tokenizer.get_vocab(with_added_tokens=True)))
        self._costs = _character_costs(path)

    def count(self, text: str, limit: int) -> int:
        """Return the number of tokens of a rendered text; of one far over `limit`, a lower bound."""
        at_least = len(text) // self._longest
        if at_least > limit:
            return at_least
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def surely_within(self, text: str, limit: int) -> bool:
        """Say, without counting, whether a text has at most `limit` tokens; False means: count."""
        if self._costs is None:
            return False
        if 4 * len(text) + _EXTRA_TOKENS <= limit:
            return True
        points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        return int(self._costs[points].sum(dtype=np.int64)) + _EXTRA_TOKENS <= limit


def _character_costs(path: Path) -> np.ndarray | None:
    """Return tokens by code point, (0x110000,) uint8: 1 in the vocabulary, else its UTF-8 bytes.

    None for a tokenizer that is not BPE with byte fallback: nothing is known of it.
    """
    model = json.loads(path.read_text(encoding="utf-8"))["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        return None
    costs = np.full(0x110000, 4, dtype=np.uint8)
    costs[:0x10000], costs[:0x800], costs[:0x80] = 3, 2, 1
    known = [ord(piece) for piece in model["vocab"] if len(piece) == 1]
    costs[known] = 1
    return costs
