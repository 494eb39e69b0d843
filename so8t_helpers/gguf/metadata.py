"""The metadata of a GGUF file: the keys that llama.cpp's converter writes for Phi3, and our few of our own.

Deliberate differences from the converter, all others are equal (tested):
- `general.name` and `general.basename` are the profile's `gguf.name`, not the folder's name; what the
  converter guesses from parts of the folder's name (`general.finetune`, `general.version`) is left out.
- `so8t.provenance` is added: the hashes that `so8t verify` walks back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
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
    """A model folder but its weights, whose number is `parameters`, longrope factors included."""

    folder: Path
    shape: Phi3Shape
    parameters: int


def read_model(folder: Path, weights: int) -> Model:
    """Read and check config.json; `weights` is the checkpoint's number of weights.

    Raises:
        SettingsError: not a Phi3 folder.
        StageError: longrope factors that do not fit, or a context beyond the trained one without factors.
    """
    shape = read_shape(folder)
    path = folder / "config.json"
    factors = (shape.long_factor, shape.short_factor)
    if shape.max_positions > shape.original_max_positions and None in factors:
        raise StageError(
            f"{path}: max_position_embeddings {shape.max_positions} is beyond the original "
            f"{shape.original_max_positions}, but the longrope factors are missing; bake the model again"
        )
    for factor in factors:
        if factor is not None and len(factor) != shape.rotary_dim // 2:
            raise StageError(f"{path}: {len(factor)} longrope factors, expected {shape.rotary_dim // 2}")
    return Model(folder, shape, weights + sum(len(f) for f in factors if f))


def add_metadata(
    writer: GGUFWriter,
    model: Model,
    name: str,
    file_type: FileType,
    provenance: str,
    imatrix: dict[str, str | int],
) -> None:
    """Add all keys of a file to a writer; `provenance` is JSON, `imatrix` the keys `quantize.imatrix.*`."""
    _add_general(writer, model, general_name(name))
    _add_architecture(writer, model.shape)
    writer.add_file_type(file_type.ftype)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    tokens, scores, types = zip(*read_vocabulary(model.folder, model.shape.vocab_size), strict=True)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    gguf.SpecialVocab(model.folder, n_vocab=len(tokens)).add_to_gguf(writer, quiet=True)
    for key, value in imatrix.items():
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


Token = tuple[bytes, float, TokenType]  # text, score, type
_ADDED_SCORE = -1000.0
_PADDING_SCORE = -10000.0


def read_vocabulary(folder: Path, vocab_size: int) -> list[Token]:
    """Read the SentencePiece model and the added tokens of a Phi3 folder, padded to `vocab_size`.

    gguf's own `SentencePieceVocab` knows neither the padding nor which added tokens are special, and on
    Windows it cannot open a path outside the system's code page.

    Raises:
        StageError: no tokenizer.model, or a token without a row in the embedding.
    """
    entries: list[Token] = [
        (f"[PAD{i}]".encode(), _PADDING_SCORE, TokenType.UNUSED) for i in range(vocab_size)
    ]
    for path, index, entry in (*_pieces(folder / "tokenizer.model"), *_added_tokens(folder)):
        if not 0 <= index < vocab_size:
            raise StageError(
                f"{path}: token {entry[0].decode()!r} has id {index}, but vocab_size is {vocab_size}; "
                "the embedding has no row for it"
            )
        entries[index] = entry
    return entries


def _pieces(path: Path) -> Iterator[tuple[Path, int, Token]]:
    """Yield file, id and entry of each piece of a SentencePiece model."""
    if not path.is_file():
        raise StageError(
            f"{path}: missing; a GGUF of a Phi3 model is made from the SentencePiece model. transformers 5 "
            "does not save it: copy it from the base model's folder"
        )
    pieces = SentencePieceProcessor(model_proto=path.read_bytes())
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
    found = [(added, index, {"content": token}) for token, index in _read_json(added).items()]
    found += [(slow, int(i), entry) for i, entry in _read_json(slow).get("added_tokens_decoder", {}).items()]
    found += [(fast, int(entry["id"]), entry) for entry in _read_json(fast).get("added_tokens", [])]
    for path, index, entry in found:
        kind = TokenType.CONTROL if entry.get("special") else TokenType.USER_DEFINED
        yield path, index, (entry["content"].encode(), _ADDED_SCORE, kind)


def _read_json(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return data
