"""Tokenizer files of a byte-level BPE vocabulary as a GGUF file holds it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, processors
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

from so8t_helpers.run.files import write_json
from so8t_helpers.settings import SettingsError

# gguf.TokenType
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# How text is cut into words before the merges, by llama.cpp's name for it (`llm_tokenizer_bpe` in
# src/llama-vocab.cpp); None is GPT-2's own expression, which `ByteLevel` brings along. Qwen2's tokenizer.json
# also composes characters (NFC), which llama.cpp does not.
_WORDS: dict[str, str | None] = {
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}",
    "qwen2": rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}",
    "gpt-4o": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
        rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"
    ),
}
# Those whose words that are whole tokens are taken as they are, merges or not.
_IGNORE_MERGES = {"llama-bpe"}


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE vocabulary.

    Attributes:
        tokens, types: by id; types are gguf's `TokenType`.
        merges: pairs, each as "left right".
        pre: llama.cpp's name of how text is cut into words.
        special: token by role ("bos", "eos", "pad", "unk"), those that there are.
        add_bos: whether a text begins with `bos` unless told otherwise.
    """

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre: str
    special: dict[str, str]
    add_bos: bool
    chat_template: str | None
    context_length: int


def write_tokenizer(folder: Path, vocabulary: Vocabulary, source: str) -> None:
    """Write tokenizer.json and tokenizer_config.json.

    Raises:
        SettingsError: text is cut into words in a way that is not known here; it names `source`.
    """
    tokenizer = Tokenizer(
        BPE(
            {
                token: index
                for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
                if kind != _UNUSED  # padding of the embedding
            },
            [_pair(merge) for merge in vocabulary.merges],
            ignore_merges=vocabulary.pre in _IGNORE_MERGES,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizer(vocabulary.pre, source)
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        # No white space beside them is taken away: llama.cpp takes none for a byte-level vocabulary.
        if kind == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    bos = vocabulary.special.get("bos")
    if vocabulary.add_bos and bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "add_bos_token": vocabulary.add_bos,
        "add_prefix_space": False,
        **{f"{role}_token": token for role, token in vocabulary.special.items()},
        "chat_template": vocabulary.chat_template,
        "clean_up_tokenization_spaces": False,
        "model_max_length": vocabulary.context_length,
        # The name that llama.cpp's converter wants of a Phi-3 with such a vocabulary. transformers takes
        # tokenizer.json as it is under any name, since config.json says "phi3".
        "tokenizer_class": "GPT2Tokenizer",
    }
    write_json(folder / "tokenizer_config.json", {k: v for k, v in config.items() if v is not None})


def pre_tokenizer(pre: str, source: str) -> PreTokenizer:
    """Return what cuts a text into words; a SettingsError for a name that is not known here."""
    if pre not in _WORDS:
        raise SettingsError(
            f"{source}: its text is cut into words as {pre!r}, which is not known here ({', '.join(_WORDS)} "
            "are); import the model's safetensors folder, which has its tokenizer.json"
        )
    if (expression := _WORDS[pre]) is not None:
        return Sequence([Split(Regex(expression), "isolated"), ByteLevel(False, use_regex=False)])
    words = ByteLevel(add_prefix_space=False)
    return Sequence([Digits(individual_digits=True), words]) if pre == "smollm" else words


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right
