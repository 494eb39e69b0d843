"""The files of a base's tokenizer, and which of the two kinds it is that Phi-3's family has.

SentencePiece (Phi-3, Phi-3.5) needs `tokenizer.model` beside the fast tokenizer, since llama.cpp reads scores
and types from it. Byte-level BPE (Phi-4, Phi-4-mini, Llama 3, SmolLM2) stands in `tokenizer.json` alone.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, Tokenizer

from so8t_helpers.run.files import StageError, read_json, reading

Kind = Literal["sentencepiece", "bpe"]

# Copied byte for byte: a tokenizer that transformers 5 saves anew has no tokenizer.model and no
# added_tokens.json, and llama.cpp's converter needs both.
FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
HUB_PATTERNS = ("*.json", "tokenizer.model", "merges.txt", "*.jinja")  # what `FILES` are to a hub's download
_NEEDED: dict[Kind, tuple[str, ...]] = {
    "sentencepiece": ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    "bpe": ("tokenizer.json", "tokenizer_config.json"),
}
_STRIPS = re.compile(r'"([lr])strip"(\s*:\s*)true')


def is_byte_level(fast: dict[str, Any]) -> bool:
    """Say of a tokenizer.json's content whether it is BPE over GPT-2's 256 bytes."""
    # Merges are BPE's alone; GPT-2's own tokenizer.json does not name the model's type.
    return "merges" in fast["model"] and '"ByteLevel"' in json.dumps(fast.get("pre_tokenizer"))


def tokenizer_kind(folder: Path) -> Kind:
    """Return the kind of a folder's tokenizer, all of whose files are there.

    Raises:
        StageError: a missing file, or a tokenizer of neither kind.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise StageError(
            f"{folder} has no tokenizer.json; save the fast tokenizer there with "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    fast = read_json(path)
    kind: Kind = "bpe" if is_byte_level(fast) else "sentencepiece"
    model = fast["model"]
    if kind == "sentencepiece" and not ("merges" in model and model.get("byte_fallback")):
        raise StageError(
            f"{path}: its model is {model.get('type')}, its pre-tokenizer {fast.get('pre_tokenizer')}; "
            "expected BPE with byte_fallback (SentencePiece, Phi-3.5) or behind ByteLevel (Phi-4-mini): "
            "choose another base"
        )
    for name in _NEEDED[kind]:
        if not (folder / name).is_file():
            raise StageError(
                f"{folder} has no {name}, which a GGUF file of a tokenizer of kind {kind} is made of; fetch "
                "it from where the model comes from, or copy it from the base it was made of: transformers 5 "
                "does not save tokenizer.model"
            )
    return kind


def stripping_tokens(folder: Path) -> list[str]:
    """Return the added tokens that take the white space beside them, as tokenizer.json has them."""
    fast = read_json(folder / "tokenizer.json")
    return [t["content"] for t in fast.get("added_tokens", []) if t.get("rstrip") or t.get("lstrip")]


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer's files byte for byte; but in byte-level BPE no added token strips white space.

    Phi-4-mini's marks strip to their right, and llama.cpp's do so only under a Phi-3 name that byte-level BPE
    cannot bear (`gguf.metadata.general_name`). So such a base is trained (`load_tokenizer`) and exported
    without: ids differ from the base's own only where a turn begins with white space.
    """
    fast = source / "tokenizer.json"
    byte_level = fast.is_file() and is_byte_level(read_json(fast))
    for name in FILES:
        if not (source / name).is_file():
            continue
        shutil.copyfile(source / name, target / name)
        if byte_level and name.endswith(".json"):
            text = (source / name).read_text(encoding="utf-8")
            without = _STRIPS.sub(r'"\1strip"\2false', text)
            if without != text:
                (target / name).write_text(without, encoding="utf-8", newline="\n")


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json as training uses it; see `load_tokenizer`. Raises StageError: it is none."""
    with reading(path, "the JSON of a fast tokenizer"):
        return _as_trained(Tokenizer.from_file(str(path)))


def load_tokenizer(folder: Path) -> Any:
    """Load a folder's fast tokenizer in transformers' dress, as training uses it.

    What it was saved with (truncation, padding) is reset, and byte-level BPE strips no white space; see
    `copy_tokenizer`. Raises StageError: a file that is broken.
    """
    from transformers import AutoTokenizer  # noqa: PLC0415  (its import takes seconds)

    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        read_json(folder / name)  # the library would not say which of them is broken
    with reading(folder / "tokenizer.json", "a tokenizer that transformers loads"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    _as_trained(tokenizer.backend_tokenizer)
    return tokenizer


def _as_trained(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    before = tokenizer.pre_tokenizer
    if before is not None and b'"ByteLevel"' in before.__getstate__():
        for token in tokenizer.get_added_tokens_decoder().values():
            if token.rstrip or token.lstrip:  # added again, the same token keeps its id and takes new flags
                flags = {"single_word": token.single_word, "normalized": token.normalized}
                tokenizer.add_tokens([AddedToken(token.content, special=token.special, **flags)])
    return tokenizer
