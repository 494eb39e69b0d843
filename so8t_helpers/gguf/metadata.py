"""The metadata of a GGUF file: the keys that llama.cpp's converter writes for Phi3, and our few of our own.

Deliberate differences from the converter, all others are equal (tested):
- `general.name` and `general.basename` are the profile's `gguf.name`, not the folder's name; what the
  converter guesses from parts of the folder's name (`general.finetune`, `general.version`) is left out.
- `so8t.provenance` is added: the hashes that `so8t verify` walks back.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import gguf
from gguf import GGUFWriter

from so8t_helpers.gguf.types import FileType
from so8t_helpers.gguf.vocabulary import add_vocabulary
from so8t_helpers.phi3.shape import Phi3Shape, attention_factor, read_shape
from so8t_helpers.phi3.tokenizer_files import Kind, tokenizer_kind
from so8t_helpers.run.files import StageError
from so8t_helpers.run.origin import GGUF_KEY

ARCHITECTURE = "phi3"
_PHI3_NAME = re.compile(r"(phi)-?(3)", flags=re.IGNORECASE)


def general_name(name: str, kind: Kind) -> str:
    """Return the `general.name` for a profile's `gguf.name` and the kind of the tokenizer.

    In a model whose name contains "phi-3" or "phi3" llama.cpp strips white space right of Phi-3's special
    tokens, as its HF tokenizer does (`llama_vocab::impl::load` in src/llama-vocab.cpp): with SentencePiece
    any other name gets the prefix "phi3-". The same lines look up `</s>`, `<s>` and `<unk>`, and throw
    `_Map_base::at` where a vocabulary lacks one, as byte-level BPE does: there "phi3" is written "phi_3".
    """
    if kind == "bpe":
        return _PHI3_NAME.sub(r"\1_\2", name)
    return name if _PHI3_NAME.search(name) else f"phi3-{name}"


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
    _add_general(writer, model, general_name(name, tokenizer_kind(model.folder)))
    _add_architecture(writer, model.shape)
    writer.add_file_type(file_type.ftype)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_vocabulary(writer, model.folder, model.shape.vocab_size)
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
