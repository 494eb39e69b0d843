"""Which ggml type each tensor of a file gets, as llama.cpp's converter and quantiser choose it.

F16, BF16 and Q8_0 files follow the converter (`ModelBase.prepare_tensors` in conversion/base.py), the
k-quant files the quantiser (`llama_tensor_get_type` in src/llama-quant.cpp). Read in llama.cpp b11434; the
tests compare every tensor's type with what the real programs choose.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

_Q = GGMLQuantizationType


@dataclass(frozen=True)
class FileType:
    """One kind of GGUF file.

    Attributes:
        ftype: the number in `general.file_type`.
        default: type of a tensor that no rule singles out (`llama_ftype_get_default_type`).
        mixed: whether the more sensitive tensors get more bits, as in the `_M` mixtures.
    """

    ftype: LlamaFileType
    default: GGMLQuantizationType
    mixed: bool = False

    @property
    def is_k_quant(self) -> bool:
        return self.default not in {_Q.F16, _Q.BF16, _Q.Q8_0}


FILE_TYPES = {
    "f16": FileType(LlamaFileType.MOSTLY_F16, _Q.F16),
    "bf16": FileType(LlamaFileType.MOSTLY_BF16, _Q.BF16),
    "q8_0": FileType(LlamaFileType.MOSTLY_Q8_0, _Q.Q8_0),
    "q6_k": FileType(LlamaFileType.MOSTLY_Q6_K, _Q.Q6_K),
    "q5_k_m": FileType(LlamaFileType.MOSTLY_Q5_K_M, _Q.Q5_K, mixed=True),
    "q4_k_m": FileType(LlamaFileType.MOSTLY_Q4_K_M, _Q.Q4_K, mixed=True),
}

_SHARE_OF_MORE_BITS = 0.25  # of Phi-3.5-mini's weights in a mixture are Q6_K, see `_k_quant_type`

# `tensor_type_fallback`: what a row that 256 does not divide gets instead.
_FALLBACK = {_Q.Q4_K: _Q.Q5_0, _Q.Q5_K: _Q.Q5_1, _Q.Q6_K: _Q.Q8_0}


def tensor_type(
    file_type: FileType, name: str, shape: tuple[int, ...], layers: int, tied: bool
) -> GGMLQuantizationType:
    """Return the type of one tensor, named as in the GGUF, of a shape as in the checkpoint.

    `layers` is the number of decoder layers; a `tied` model has no `output.weight` of its own.
    """
    # Both programs keep vectors and norms in F32: `n_dims <= 1 or new_name.endswith("_norm.weight")` in the
    # converter, `tensor_allows_quantization` in the quantiser.
    if len(shape) < 2 or name.endswith("_norm.weight"):
        return _Q.F32
    row = shape[-1]
    if not file_type.is_k_quant:
        # `except gguf.QuantError: falling back to F16` in the converter.
        return file_type.default if _fits(file_type.default, row) else _Q.F16
    kind = _k_quant_type(file_type, name, row, layers, tied)
    return next((k for k in (kind, _FALLBACK.get(kind, kind)) if _fits(k, row)), _Q.F16)


def _k_quant_type(file_type: FileType, name: str, row: int, layers: int, tied: bool) -> GGMLQuantizationType:
    """`llama_tensor_get_type_impl`, the branches that a Phi3 model and our file types reach."""
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return _Q.Q6_K if _fits(file_type.default, row) else _Q.Q8_0
    block = re.fullmatch(r"blk\.(\d+)\.(attn_qkv|ffn_down)\.weight", name)
    # `category_is_attn_v` counts the fused attn_qkv in, so it takes ffn_down's rule.
    if file_type.mixed and block and _use_more_bits(int(block[1]), layers):
        return _Q.Q6_K
    return file_type.default


def _use_more_bits(layer: int, layers: int) -> bool:
    """`use_more_bits`: the first and last eighth of the layers and every third one between them."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _fits(kind: GGMLQuantizationType, row: int) -> bool:
    return row % GGML_QUANT_SIZES[kind][0] == 0


def byte_size(kind: GGMLQuantizationType, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor of that type and shape."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    return prod(shape) // block * block_bytes


def bytes_per_weight(kind: str) -> float:
    """Return about how many bytes a weight of Phi-3.5-mini takes in one of `FILE_TYPES`, scales included."""
    file_type = FILE_TYPES[kind]
    share = _SHARE_OF_MORE_BITS if file_type.mixed else 0.0
    row = 256  # weights, whole blocks of every type
    size = (1 - share) * byte_size(file_type.default, (row,)) + share * byte_size(_Q.Q6_K, (row,))
    return size / row
