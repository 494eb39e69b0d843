"""What config.json says of a Phi3: sizes, rope and the names of its tensors, here and in a GGUF file."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from so8t_helpers.run.files import read_json, reading
from so8t_helpers.settings import SettingsError

EMBEDDING, LAST_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"

# gguf's `TensorNameMap` for PHI3, written out: a reader sees all of a Phi3 model at once.
TOP = {EMBEDDING: "token_embd.weight", LAST_NORM: "output_norm.weight", HEAD: "output.weight"}
BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
LINEAR_MODULES = {name.rpartition(".")[2]: name for name in BLOCK if name.endswith("_proj")}
LINEARS = tuple(LINEAR_MODULES)
O_PROJ = LINEAR_MODULES["o_proj"]


def logit_rows(vocabulary: int) -> int:
    """Return how many tokens' logits may exist at a time: about 64 MiB of float32, a power of two.

    512 for Phi-3.5's 32,064 entries (and fewer), 256 for 49,152, 64 for Phi-4-mini's 200,064; never below 64,
    where a product only waits for the head's weights. It is fixed for a model, as a captured graph needs.
    """
    return 1 << min(9, max(6, (2**24 // vocabulary).bit_length() - 1))


def weight_path(layer: int, linear: str) -> str:
    """Return the module path of a linear in a Phi3 checkpoint: "model.layers.3.self_attn.o_proj"."""
    return f"model.layers.{layer}.{LINEAR_MODULES[linear]}"


def weight_name(layer: int, module: str) -> str:
    """Return the checkpoint's name of the weight of one of `BLOCK`'s modules."""
    return f"model.layers.{layer}.{module}.weight"


def o_proj_name(layer: int) -> str:
    """Name of the weight behind the gate of a decoder layer."""
    return weight_name(layer, O_PROJ)


def gguf_name(name: str) -> str | None:
    """Return the GGUF name of a checkpoint tensor, None for one that a Phi3 model does not have."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    if match and match[2] in BLOCK:
        return gguf_block_name(int(match[1]), match[2])
    return TOP.get(name)


def gguf_block_name(layer: int, module: str) -> str:
    """Return the GGUF name of the weight of one of `BLOCK`'s modules: "blk.3.attn_output.weight"."""
    return f"blk.{layer}.{BLOCK[module]}.weight"


@dataclass(frozen=True)
class Phi3Shape:
    """What config.json says of a Phi3 model; sizes in features, positions in tokens."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    rms_eps: float
    rope_theta: float
    rotary_dim: int
    short_factor: tuple[float, ...] | None
    long_factor: tuple[float, ...] | None
    max_positions: int
    original_max_positions: int
    sliding_window: int | None
    tie_embeddings: bool

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def linear_shape(self, name: str) -> tuple[int, int]:
        """Return (out, in) of one of `LINEARS`."""
        qkv = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        return {
            "qkv_proj": (qkv, self.hidden_size),
            "o_proj": (self.hidden_size, self.num_heads * self.head_dim),
            "gate_up_proj": (2 * self.intermediate_size, self.hidden_size),
            "down_proj": (self.hidden_size, self.intermediate_size),
        }[name]

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor of the checkpoint, by name; without a head that is tied."""
        vocabulary, norm = (self.vocab_size, self.hidden_size), (self.hidden_size,)
        shapes: dict[str, tuple[int, ...]] = {EMBEDDING: vocabulary, LAST_NORM: norm}
        if not self.tie_embeddings:
            shapes[HEAD] = vocabulary
        linears = {module: self.linear_shape(linear) for linear, module in LINEAR_MODULES.items()}
        for layer in range(self.num_layers):
            shapes |= {weight_name(layer, module): linears.get(module, norm) for module in BLOCK}
        return shapes


_COUNTS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"),
    "max_position_embeddings",
)


def read_shape(folder: Path) -> Phi3Shape:
    """Read config.json; a SettingsError if missing, or for another architecture, activation or rope type."""
    path = folder / "config.json"
    if not path.is_file():
        raise SettingsError(f"{folder}: no config.json; model.base must name a Phi3 folder or hub id")
    return shape_of(read_json(path), path)


def shape_of(config: dict[str, Any], path: Path) -> Phi3Shape:
    """Return what a config.json says; a SettingsError that names `path` as `read_shape`."""
    if config.get("model_type") != "phi3":
        raise SettingsError(f"{path}: model_type is {config.get('model_type')!r}, expected 'phi3'")
    if config.get("hidden_act", "silu") != "silu":
        raise SettingsError(f"{path}: hidden_act is {config['hidden_act']!r}, expected 'silu'")
    for key in _COUNTS:
        if not isinstance(config.get(key), int) or config[key] < 1:
            raise SettingsError(f"{path}: {key} is {config.get(key)!r}, expected a whole number of 1 or more")
    with reading(path, "the rope of a Phi3"):
        rope = rope_parameters(config)
    if rope["rope_type"] not in {"default", "longrope"}:
        raise SettingsError(f"{path}: rope type {rope['rope_type']!r}, expected 'longrope' or none")
    heads = config["num_attention_heads"]
    short, long = (tuple(rope[k]) if k in rope else None for k in ("short_factor", "long_factor"))
    return Phi3Shape(
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        vocab_size=config["vocab_size"],
        rms_eps=config.get("rms_norm_eps", 1e-5),
        rope_theta=rope["rope_theta"],
        rotary_dim=int(config["hidden_size"] // heads * rope["partial_rotary_factor"]),
        short_factor=short,
        long_factor=long,
        max_positions=config["max_position_embeddings"],
        original_max_positions=rope["original_max_position_embeddings"],
        sliding_window=config.get("sliding_window"),
        tie_embeddings=config.get("tie_word_embeddings", False),
    )


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """Return the rope of a config.json, written by transformers 4 or 5, in the keys of 5."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    defaults = {
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "original_max_position_embeddings": config["max_position_embeddings"],
    }
    return {
        **{key: rope[key] for key in ("long_factor", "short_factor") if key in rope},
        "rope_type": "longrope" if kind in {"su", "yarn"} else kind,  # as early Phi-3 configurations call it
        **{key: rope.get(key) or config.get(key) or value for key, value in defaults.items()},
    }


def attention_factor(shape: Phi3Shape) -> float | None:
    """Longrope's scale of cos and sin, sqrt(1 + ln(max / original) / ln(original)); None without longrope.

    As `Phi3MiniModel.generate_extra_tensors` in llama.cpp's conversion/phi.py.
    """
    if shape.long_factor is None:
        return None
    ratio = max(1.0, shape.max_positions / shape.original_max_positions)
    return math.sqrt(1 + math.log(ratio) / math.log(shape.original_max_positions))


def rope_tables(shape: Phi3Shape, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines for positions 0 ... length - 1, each (length, rotary_dim) float32.

    LongRoPE (Ding et al. 2024) as in transformers' `_compute_longrope_parameters`: the long factors when a
    document may be longer than the original context, and cos and sin scaled by `attention_factor`.
    """
    exponent = torch.arange(0, shape.rotary_dim, 2, device=device).float() / shape.rotary_dim
    factors = shape.long_factor if length > shape.original_max_positions else shape.short_factor
    divisor = torch.tensor(factors or 1.0, dtype=torch.float32, device=device)
    frequencies = 1.0 / (divisor * shape.rope_theta**exponent)
    scale = attention_factor(shape) or 1.0
    angles = torch.arange(length, device=device).float()[:, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * scale, angles.sin() * scale
