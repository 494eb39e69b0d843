"""Phi-3's decoder layers as plain functions over frozen weights, LoRA and rotations.

Equal to transformers' Phi3 in outputs and gradients (tested, longrope included), but written so that a
layer is one function of tensors: all layers share one compiled graph, and a whole micro-step can be captured
as one CUDA graph. Sequences are packed: T tokens of several documents in a row, no batch dimension.
"""

from __future__ import annotations

import inspect
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from so8t_helpers.gate import gate
from so8t_helpers.int8_linear import FrozenWeight, adapted_product, frozen_linear
from so8t_helpers.settings import SettingsError

LINEARS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")

# Odd 32-bit factors as int32: lowbias32's two (0x7feb352d, 0x846ca68b), and two to spread small numbers.
_MIX_1, _MIX_2 = 0x7FEB352D, -2073254261
_GOLDEN, _COLUMN = -1640531527, 0x2C1B3C6D


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


def read_shape(folder: Path) -> Phi3Shape:
    """Read config.json of a Phi3 folder, with the rope keys of transformers 4 or 5.

    Raises:
        SettingsError: missing file, another architecture, an activation or rope type that Phi-3 lacks.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise SettingsError(f"{folder}: no config.json; model.base must name a Phi3 folder or hub id")
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("model_type") != "phi3":
        raise SettingsError(f"{path}: model_type is {config.get('model_type')!r}, expected 'phi3'")
    if config.get("hidden_act", "silu") != "silu":
        raise SettingsError(f"{path}: hidden_act is {config['hidden_act']!r}, expected 'silu'")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in {"default", "longrope", "su"}:
        raise SettingsError(f"{path}: rope type {kind!r}, expected 'longrope' or none")
    heads = config["num_attention_heads"]
    partial = config.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0))
    maximum = config["max_position_embeddings"]
    factors = [tuple(rope[k]) if k in rope else None for k in ("short_factor", "long_factor")]
    return Phi3Shape(
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        vocab_size=config["vocab_size"],
        rms_eps=config.get("rms_norm_eps", 1e-5),
        rope_theta=config.get("rope_theta") or rope.get("rope_theta", 10000.0),
        rotary_dim=int(config["hidden_size"] // heads * partial),
        short_factor=factors[0],
        long_factor=factors[1],
        max_positions=maximum,
        original_max_positions=config.get("original_max_position_embeddings")
        or rope.get("original_max_position_embeddings", maximum),
        sliding_window=config.get("sliding_window"),
        tie_embeddings=config.get("tie_word_embeddings", False),
    )


def rope_tables(shape: Phi3Shape, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines for positions 0 ... length - 1, each (length, rotary_dim) float32.

    LongRoPE (Ding et al. 2024) as in transformers' `_compute_longrope_parameters`: the long factors when a
    document may be longer than the original context, and cos and sin scaled by
    sqrt(1 + ln(max / original) / ln(original)).
    """
    exponent = torch.arange(0, shape.rotary_dim, 2, device=device).float() / shape.rotary_dim
    factors = shape.long_factor if length > shape.original_max_positions else shape.short_factor
    divisor = torch.tensor(factors or 1.0, dtype=torch.float32, device=device)
    frequencies = 1.0 / (divisor * shape.rope_theta**exponent)
    scale = 1.0
    if factors and shape.max_positions > shape.original_max_positions:
        ratio = shape.max_positions / shape.original_max_positions
        scale = math.sqrt(1 + math.log(ratio) / math.log(shape.original_max_positions))
    angles = torch.arange(length, device=device).float()[:, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * scale, angles.sin() * scale


class Lora(NamedTuple):
    """a (r, in), b (out, r), float32 master weights."""

    a: Tensor
    b: Tensor


class Layer(NamedTuple):
    """The tensors of one decoder layer; `rotation` (d/8, 8, 8), or None without a gate; salt for dropout."""

    norm1: Tensor
    qkv: FrozenWeight
    o: FrozenWeight
    norm2: Tensor
    gate_up: FrozenWeight
    down: FrozenWeight
    lora_qkv: Lora | None
    lora_o: Lora | None
    lora_gate_up: Lora | None
    lora_down: Lora | None
    rotation: Tensor | None
    salt: Tensor


class Packed(NamedTuple):
    """What the layers need to know of one packed sequence of T tokens.

    Attributes:
        cos, sin: (T, rotary_dim) at each token's position in its document.
        bounds: (documents + 1,) int32, where documents begin and end; repeated T at the end as padding.
        keys: (T, 1) int32 from `token_keys`, for dropout.
    """

    cos: Tensor
    sin: Tensor
    bounds: Tensor
    keys: Tensor


@dataclass(frozen=True)
class LayerConfig:
    """What is the same for all layers of a run.

    Attributes:
        varlen: attention by torch's variable-length flash attention.
        v_apart: copy v out of the fused product, so that q and k as they were before RoPE can go: with
            65,536 tokens 0.8 GiB less at the peak, the backward pass of attention; 0.5% of the time.
    """

    shape: Phi3Shape
    lora_scale: float
    dropout: float
    varlen: bool
    v_apart: bool


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm in float32, as transformers does it. x (T, d), weight (d,)."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight.to(x.dtype) * wide.to(x.dtype)


def token_keys(rows: Tensor, seed: Tensor) -> Tensor:
    """What dropout's masks know of token and micro-step: rows (T, 1) int32, seed () int32 -> (T, 1) int32.

    Wellons' lowbias32 of the token's number, mixed with that of the seed.
    """
    return _mix(_mix(rows * _GOLDEN ^ _mix(seed)))


def _mix(h: Tensor) -> Tensor:
    h = _two_rounds(h)
    return h ^ ((h >> 16) & 0xFFFF)


def _two_rounds(h: Tensor) -> Tensor:
    h = (h ^ ((h >> 16) & 0xFFFF)) * _MIX_1
    return (h ^ ((h >> 15) & 0x1FFFF)) * _MIX_2


def keep_mask(keys: Tensor, salt: Tensor, columns: int, p: float) -> Tensor:
    """Dropout's mask as a function of (token, seed, salt, feature) alone: (T, columns), True with 1 - p.

    A counter-based hash instead of a generator's state: recomputed layers, replayed CUDA graphs, compiled and
    plain code and resumed runs all draw the same mask. It is drawn for every feature of every linear, so
    the token's part is mixed beforehand and two rounds of lowbias32 remain.

    Args:
        keys: (T, 1) int32 from `token_keys`.
        salt: () int32, another number for every linear.
    """
    h = keys ^ (salt * _GOLDEN) ^ (torch.arange(columns, dtype=torch.int32, device=keys.device) * _COLUMN)
    return (_two_rounds(h) & 0x7FFFFFFF) >= int(p * 2**31)


def adapted_linear(
    x: Tensor,
    weight: FrozenWeight,
    lora: Lora | None,
    packed: Packed,
    salt: Tensor,
    config: LayerConfig,
    wanted: bool = True,
) -> Tensor:
    """Return y = W x + s B A dropout(x). x (T, in) -> (T, out); `wanted` as in `adapted_product`."""
    if lora is None:
        return frozen_linear(x, weight)
    seen = x
    if config.dropout:
        keep = keep_mask(packed.keys, salt, x.shape[-1], config.dropout)
        seen = torch.where(keep, x * (1.0 / (1.0 - config.dropout)), 0.0).to(x.dtype)
    low = functional.linear(seen, lora.a.to(x.dtype))
    return adapted_product(x, low, lora.b, weight, config.lora_scale, wanted)


def attention_half(
    x: Tensor, layer: Layer, packed: Packed, config: LayerConfig, wanted: bool = True
) -> Tensor:
    """Return x + o_proj(gate(attention(norm(x)))). x (T, d) -> (T, d); `wanted` as in `adapted_product`."""
    shape = config.shape
    h = rms_norm(x, layer.norm1, shape.rms_eps)
    qkv = adapted_linear(h, layer.qkv, layer.lora_qkv, packed, layer.salt, config)
    kv = shape.num_kv_heads
    heads = qkv.view(len(x), shape.num_heads + 2 * kv, shape.head_dim)  # (T, H + 2 KV, D)
    q, k, v = heads.split((shape.num_heads, kv, kv), dim=1)
    if config.v_apart:
        v = v.clone(memory_format=torch.contiguous_format)
    q, k = _rope(q, packed.cos, packed.sin), _rope(k, packed.cos, packed.sin)
    mixed = attend(q, k, v, packed.bounds, config.varlen).reshape(len(x), -1)  # (T, H * D)
    if layer.rotation is not None:
        mixed = gate(mixed, layer.rotation)
    return x + adapted_linear(mixed, layer.o, layer.lora_o, packed, layer.salt ^ 1, config, wanted)


def mlp_half(x: Tensor, layer: Layer, packed: Packed, config: LayerConfig, wanted: bool = True) -> Tensor:
    """Return x + down_proj(up * silu(gate)). x (T, d) -> (T, d)."""
    h = rms_norm(x, layer.norm2, config.shape.rms_eps)
    both = adapted_linear(h, layer.gate_up, layer.lora_gate_up, packed, layer.salt ^ 2, config)
    gated, up = both.chunk(2, dim=-1)
    inner = up * functional.silu(gated)
    return x + adapted_linear(inner, layer.down, layer.lora_down, packed, layer.salt ^ 3, config, wanted)


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first rotary_dim features of each head. x (T, H, D); cos, sin (T, rotary_dim)."""
    cos, sin = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, varlen: bool) -> Tensor:
    """Causal attention within each document. q (T, H, D), k and v (T, KV, D) -> (T, H, D).

    `varlen` takes torch's variable-length flash attention; else one scaled-dot-product call a document, which
    runs anywhere but reads the bounds on the host.
    """
    if varlen:
        group = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(group, dim=1) if group > 1 else t for t in (k, v))
        return _varlen_attention(q, k, v, bounds)
    parts = []
    borders = bounds.unique_consecutive().tolist()
    for start, end in itertools.pairwise(borders):
        one_q, one_k, one_v = (t[start:end].transpose(0, 1)[None] for t in (q, k, v))  # (1, heads, n, D)
        out = functional.scaled_dot_product_attention(
            one_q, one_k, one_v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1]
        )
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def _varlen_attention(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415  (absent before torch 2.10)

    out = varlen_attn(q, k, v, bounds, bounds, len(q), len(q), **_CAUSAL)
    assert isinstance(out, Tensor)  # a tuple only with return_aux
    return out


def _causal_argument() -> dict[str, Any]:
    """Torch 2.10 and 2.11 say `is_causal=True`; later ones a window that looks back without limit."""
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415
    except ImportError:
        return {}
    named = inspect.signature(varlen_attn).parameters
    return {"is_causal": True} if "is_causal" in named else {"window_size": (-1, 0)}


_CAUSAL = _causal_argument()
