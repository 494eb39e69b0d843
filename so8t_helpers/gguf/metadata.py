"""The metadata of a GGUF file: the keys that llama.cpp's converter writes for Phi3, and our few of our own.

Deliberate differences from the converter, all others are equal (tested):
- `general.name` and `general.basename` are the profile's `gguf.name`, not the folder's name; what the
  converter guesses from parts of the folder's name (`general.finetune`, `general.version`) is left out.
- `so8t.provenance` is added: the hashes that `so8t verify` walks back.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from gguf import GGUFWriter, TokenType
from sentencepiece import SentencePieceProcessor

from so8t_helpers.gguf.types import FileType
from so8t_helpers.phi3.shape import Phi3Shape, attention_factor, read_shape
from so8t_helpers.run.files import StageError
from so8t_helpers.run.origin import GGUF_KEY

ARCHITECTURE = "phi3"
_LLAMA_CPP_NAMES = ("phi-3", "phi3")


def general_name(name: str) -> str:
    """Return the `general.name` for a profile's `gguf.name`.

    llama.cpp strips white space right of Phi-3's special tokens, as its HF tokenizer does, only in models
    whose name contains "phi-3" or "phi3" (`llama_vocab::impl::load` in src/llama-vocab.cpp); any other name
    gets the prefix "phi3-".
    """
    return name if any(part in name.lower() for part in _LLAMA_CPP_NAMES) else f"phi3-{name}"


@dataclass(frozen=True)
class Model:
    """What the files need to know of the model folder beside its weights.

    Attributes:
        folder: config.json, tokenizer files, model card.
        shape: the numbers of config.json.
        config: config.json as it is.
        parameters: number of weights, longrope factors included, as the converter counts them.
    """

    folder: Path
    shape: Phi3Shape
    config: dict[str, Any]
    parameters: int


def read_model(folder: Path, weights: int) -> Model:
    """Read and check config.json; `weights` is the checkpoint's number of weights.

    Raises:
        SettingsError: not a Phi3 folder.
        StageError: longrope factors that do not fit, or a context beyond the trained one without factors.
    """
    shape = read_shape(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    factors = (shape.long_factor, shape.short_factor)
    if shape.max_positions > shape.original_max_positions and None in factors:
        raise StageError(
            f"{path}: max_position_embeddings {shape.max_positions} is beyond the original "
            f"{shape.original_max_positions}, but the longrope factors are missing; bake the model again"
        )
    for factor in factors:
        if factor is not None and len(factor) != shape.rotary_dim // 2:
            raise StageError(f"{path}: {len(factor)} longrope factors, expected {shape.rotary_dim // 2}")
    return Model(folder, shape, config, weights + sum(len(f) for f in factors if f))


def add_metadata(
    writer: GGUFWriter,
    model: Model,
    name: str,
    file_type: FileType,
    provenance: str,
    imatrix: dict[str, str | int] | None = None,
) -> None:
    """Add all keys of a file to a writer.

    Args:
        name: the profile's `gguf.name`.
        provenance: the JSON text behind `so8t.provenance`.
        imatrix: the keys `quantize.imatrix.*`, for a k-quant file made with an importance matrix.
    """
    _add_general(writer, model, general_name(name))
    _add_architecture(writer, model.shape)
    writer.add_file_type(file_type.ftype)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_tokenizer(writer, model)
    for key, value in (imatrix or {}).items():
        if isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    writer.add_string(GGUF_KEY, provenance)


def _add_general(writer: GGUFWriter, model: Model, name: str) -> None:
    """`ModelBase.prepare_metadata`: from the model card, generation_config.json and the size."""
    writer.add_type(gguf.GGUFType.MODEL)
    metadata = gguf.Metadata.load(None, model.folder, name, model.parameters)
    metadata.basename, metadata.finetune, metadata.version = name, None, None
    if metadata.size_label is None:
        metadata.size_label = gguf.size_label(model.parameters, model.parameters, 0, 0)
    metadata.set_gguf_meta_model(writer)


def _add_architecture(writer: GGUFWriter, shape: Phi3Shape) -> None:
    """`Phi3MiniModel.set_gguf_parameters` in llama.cpp's conversion/phi.py."""
    writer.add_context_length(shape.max_positions)
    writer.add_rope_scaling_orig_ctx_len(shape.original_max_positions)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_block_count(shape.num_layers)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_layer_norm_rms_eps(shape.rms_eps)
    writer.add_rope_dimension_count(shape.rotary_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_sliding_window(shape.sliding_window or 0)
    factor = attention_factor(shape)
    if factor is not None:
        writer.add_rope_scaling_attn_factors(factor)


def _add_tokenizer(writer: GGUFWriter, model: Model) -> None:
    vocabulary = read_vocabulary(model.folder, model.shape.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    special = gguf.SpecialVocab(model.folder, n_vocab=len(vocabulary.tokens))
    special.add_to_gguf(writer, quiet=True)


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
