"""The vocabulary of a GGUF file, `tokenizer.ggml.*`: of a SentencePiece model, or of byte-level BPE.

Equal to what llama.cpp's converter writes: `Phi3MiniModel.set_vocab` in conversion/phi.py, and
`get_vocab_base`, `get_vocab_base_pre` and `_set_vocab_gpt2` in conversion/base.py (read in b11434).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
from gguf import GGUFWriter, TokenType
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from so8t_helpers.phi3.tokenizer_files import stripping_tokens, tokenizer_kind
from so8t_helpers.run.files import StageError, read_json, reading

Token = tuple[bytes, float, TokenType]  # text, score, type
_ADDED_SCORE = -1000.0
_PADDING_SCORE = -10000.0

# The converter's text: its token ids tell pre-tokenizers apart, in every way that they are known to differ.
CHECK_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis "
    "concatenated) ✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 "
    "?我想在apple工作1314151天～ ------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? "
    "I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
# sha256 of str(ids of CHECK_TEXT) -> `tokenizer.ggml.pre`; of the converter's table, the models of Phi-3's
# family and those of Llama's that a Phi3 folder can be made of.
_BY_HASH = {
    "ccc2ef013c104be7bae2965776d611e1d7a8a2a9c547dd93a682c9a9fc80352e": "gpt-4o",  # Phi-4-mini
    "a8594e3edff7c29c003940395316294b2c623e09894deebbc65f33f1515df79e": "dbrx",  # Phi-4
    "fcace8b9cac38ce847670c970cd5892031a753a1ef381abd1d9af00f713da085": "phi-2",
    "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",  # Llama 3
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",
    "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",
    "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454": "gpt-2",
}
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_ENDS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The steps of a pre-tokenizer (see `_steps`) -> the name of the same regexes in llama.cpp's
# src/llama-vocab.cpp, `llm_tokenizer_bpe`: for tokenizers made small or extended, whose ids are their own.
_BY_DEFINITION = {
    (_O200K, "bytes"): "gpt-4o",
    (_WORDS + r"\p{N}{1,3}" + _ENDS, "bytes"): "dbrx",
    (_WORDS + r"\p{N}" + _ENDS, "bytes"): "qwen2",
    ("digits", "gpt-2", "bytes"): "smollm",
    ("gpt-2", "bytes"): "gpt-2",
}


def check_pre_tokenizer(folder: Path) -> None:
    """Raise StageError for a tokenizer that no GGUF file can hold: see `tokenizer_kind`, `pre_tokenizer`."""
    if tokenizer_kind(folder) == "bpe":
        pre_tokenizer(folder)
    else:
        _load_pieces(folder / "tokenizer.model")


def check_vocabulary(folder: Path) -> None:
    """Raise StageError for a tokenizer that no GGUF file can hold, or that llama.cpp would not follow.

    The base of a bake may have marks that strip white space; the baked folder has none.
    """
    check_pre_tokenizer(folder)
    if tokenizer_kind(folder) == "bpe" and (stripping := stripping_tokens(folder)):
        raise StageError(
            f"{folder / 'tokenizer.json'}: {', '.join(stripping)} strip the white space beside them "
            "(rstrip, lstrip), which llama.cpp cannot do with byte-level BPE: token ids would differ. Set "
            "both to false there and in tokenizer_config.json, or bake the model with 03_bake, which does"
        )


def add_vocabulary(writer: GGUFWriter, folder: Path, vocab_size: int) -> None:
    """Add tokens, types, scores or merges, special ids and the chat template; padded to `vocab_size`.

    Raises:
        StageError: a missing file, a tokenizer of neither kind, a pre-tokenizer that llama.cpp has no name
            for, or a token without a row in the embedding.
    """
    if tokenizer_kind(folder) == "bpe":
        tokens, types = zip(*read_byte_level(folder, vocab_size), strict=True)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer(folder))
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        gguf.SpecialVocab(folder, load_merges=True).add_to_gguf(writer, quiet=True)
        return
    pieces, scores, kinds = zip(*read_sentencepiece(folder, vocab_size), strict=True)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(pieces)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    gguf.SpecialVocab(folder, n_vocab=vocab_size).add_to_gguf(writer, quiet=True)


def pre_tokenizer(folder: Path) -> str:
    """Return the `tokenizer.ggml.pre` of byte-level BPE: by the converter's hash, else by its definition.

    Raises:
        StageError: llama.cpp has no name for it.
    """
    path = folder / "tokenizer.json"
    with reading(path, "the JSON of a fast tokenizer"):
        ids = Tokenizer.from_file(str(path)).encode(CHECK_TEXT).ids
    if known := _BY_HASH.get(hashlib.sha256(str(ids).encode()).hexdigest()):
        return known
    fast = read_json(path)
    steps = tuple(_steps(fast["pre_tokenizer"]))
    name = _BY_DEFINITION.get(steps)
    if name is None:
        raise StageError(
            f"{path}: llama.cpp's name for this pre-tokenizer is not known: {' > '.join(steps)}; expected "
            f"that of {', '.join(sorted(set(_BY_DEFINITION.values())))}. Choose a base with one of these"
        )
    # The same regex: Llama 3 takes a word that is a token whole, without looking at the merges.
    return "llama-bpe" if name == "dbrx" and fast["model"].get("ignore_merges") else name


def _steps(part: dict[str, Any]) -> Iterator[str]:
    """Yield what a pre-tokenizer of tokenizer.json does, step by step; a Split is its regex."""
    match part:
        case {"type": "Sequence", "pretokenizers": parts}:
            for inner in parts:
                yield from _steps(inner)
        case {"type": "Digits", "individual_digits": True}:
            yield "digits"
        case {"type": "ByteLevel", "add_prefix_space": False}:
            # Left out, `use_regex` is true: GPT-2's pattern.
            yield from ("gpt-2", "bytes") if part.get("use_regex", True) else ("bytes",)
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
            yield regex
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Removed", "invert": True}:
            yield regex  # "remove all that does not match": these patterns match everything
        case _:
            yield json.dumps(part)


def read_byte_level(folder: Path, vocab_size: int) -> list[tuple[str, TokenType]]:
    """Read the tokens of byte-level BPE by id, gaps and the rows behind them padded.

    Raises:
        StageError: a token without a row in the embedding.
    """
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    added = tokenizer.get_added_tokens_decoder()
    entries = [(f"[PAD{i}]", TokenType.UNUSED) for i in range(vocab_size)]
    for text, index in tokenizer.get_vocab(with_added_tokens=True).items():
        _check_row(path, text, index, vocab_size)
        kind, token = TokenType.NORMAL, text
        if index in added:
            if not added[index].normalized:  # llama.cpp looks for these in the text as it is written
                ids = tokenizer.encode(text, add_special_tokens=False).ids
                token = tokenizer.decode(ids, skip_special_tokens=False)
            kind = TokenType.CONTROL
            if not (added[index].special or _looks_special(token)):
                kind, token = TokenType.USER_DEFINED, token.replace("▁", " ")
        entries[index] = (token, kind)
    return entries


def _looks_special(token: str) -> bool:
    """`does_token_look_special` of the converter: marks that a tokenizer forgot to call special."""
    ends = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return token in {"<pad>", "<mask>", "<2mass>", "[@BOS@]"} or any(
        token.startswith(first) and token.endswith(last) for first, last in ends
    )


def read_sentencepiece(folder: Path, vocab_size: int) -> list[Token]:
    """Read the SentencePiece model and the added tokens of a Phi3 folder, padded to `vocab_size`.

    gguf's own `SentencePieceVocab` knows neither the padding nor which added tokens are special, and on
    Windows it cannot open a path outside the system's code page.

    Raises:
        StageError: a token without a row in the embedding.
    """
    entries: list[Token] = [
        (f"[PAD{i}]".encode(), _PADDING_SCORE, TokenType.UNUSED) for i in range(vocab_size)
    ]
    for path, index, entry in (*_pieces(folder / "tokenizer.model"), *_added_tokens(folder)):
        _check_row(path, entry[0].decode(), index, vocab_size)
        entries[index] = entry
    return entries


def _check_row(path: Path, token: str, index: int, vocab_size: int) -> None:
    if not 0 <= index < vocab_size:
        raise StageError(
            f"{path}: token {token!r} has id {index}, but vocab_size is {vocab_size}; the embedding has no "
            "row for it"
        )


def _load_pieces(path: Path) -> SentencePieceProcessor:
    with reading(path, "a SentencePiece model"):
        return SentencePieceProcessor(model_proto=path.read_bytes())


def _pieces(path: Path) -> Iterator[tuple[Path, int, Token]]:
    """Yield file, id and entry of each piece of a SentencePiece model."""
    pieces = _load_pieces(path)
    kinds = (
        (pieces.is_unknown, TokenType.UNKNOWN),
        (pieces.is_control, TokenType.CONTROL),
        (pieces.is_unused, TokenType.UNUSED),
        (pieces.is_byte, TokenType.BYTE),
    )
    for index in range(pieces.vocab_size()):
        kind = next((kind for applies, kind in kinds if applies(index)), TokenType.NORMAL)
        yield path, index, (pieces.id_to_piece(index).encode(), pieces.get_score(index), kind)


def _added_tokens(folder: Path) -> Iterator[tuple[Path, int, Token]]:
    """Yield file, id and entry of each added token; CONTROL ones are those that llama.cpp hides."""
    names = ("added_tokens.json", "tokenizer_config.json", "tokenizer.json")
    added, slow, fast = (folder / name for name in names)
    found = [(added, index, {"content": token}) for token, index in read_json(added).items()]
    found += [(slow, int(i), entry) for i, entry in read_json(slow).get("added_tokens_decoder", {}).items()]
    found += [(fast, int(entry["id"]), entry) for entry in read_json(fast).get("added_tokens", [])]
    for path, index, entry in found:
        kind = TokenType.CONTROL if entry.get("special") else TokenType.USER_DEFINED
        yield path, index, (entry["content"].encode(), _ADDED_SCORE, kind)
