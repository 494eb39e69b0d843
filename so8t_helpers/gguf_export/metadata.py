"""The metadata of a GGUF file: the keys that llama.cpp's converter writes for Phi3, and our few of our own.

Deliberate differences from the converter, all others are equal (tested):
- `general.name` and `general.basename` are the profile's `gguf.name`, not the folder's name; what the
  converter guesses from parts of the folder's name (`general.finetune`, `general.version`) is left out.
- `so8t.provenance` is added: the hashes that `so8t verify` walks back.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from gguf import GGUFWriter

from so8t_helpers.gguf_export.types import FileType
from so8t_helpers.gguf_export.vocabulary import read_vocabulary
from so8t_helpers.origin import GGUF_KEY
from so8t_helpers.phi3 import Phi3Shape, read_shape
from so8t_helpers.run_folder import StageError

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


def attention_factor(shape: Phi3Shape) -> float | None:
    """Longrope's scale of cos and sin, sqrt(1 + ln(max / original) / ln(original)); None without longrope.

    As `Phi3MiniModel.generate_extra_tensors` in llama.cpp's conversion/phi.py.
    """
    if shape.long_factor is None:
        return None
    ratio = shape.max_positions / shape.original_max_positions
    if ratio <= 1.0:
        return 1.0
    return math.sqrt(1 + math.log(ratio) / math.log(shape.original_max_positions))


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
