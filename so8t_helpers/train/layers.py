"""Phi-3's decoder layers as plain functions over frozen weights, LoRA and rotations.

Equal to transformers' Phi3 in outputs and gradients (tested, longrope included), but written so that a
layer is one function of tensors: all layers share one compiled graph, and a whole micro-step can be captured
as one CUDA graph. Sequences are packed: T tokens of several documents in a row, no batch dimension.
"""

from __future__ import annotations

import inspect
import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn

from so8t_helpers.phi3.shape import Phi3Shape
from so8t_helpers.train.frozen import FrozenWeight, adapted_product, frozen_linear
from so8t_helpers.train.gate import gate

# Odd 32-bit factors as int32: lowbias32's two (0x7feb352d, 0x846ca68b), and two to spread small numbers.
_MIX_1, _MIX_2 = 0x7FEB352D, -2073254261
_GOLDEN, _COLUMN = -1640531527, 0x2C1B3C6D
# Torch 2.11 says `is_causal=True`; later ones a window that looks back without limit.
_CAUSAL: dict[str, Any] = (
    {"is_causal": True}
    if "is_causal" in inspect.signature(varlen_attn).parameters
    else {"window_size": (-1, 0)}
)


class LoraFactors(NamedTuple):
    """a (r, in), b (out, r), float32 master weights."""

    a: Tensor
    b: Tensor


class AdaptedLinear(NamedTuple):
    """A frozen weight, its LoRA or None, and for dropout the salt: () int32, another for every linear."""

    weight: FrozenWeight
    lora: LoraFactors | None
    salt: Tensor


class LayerTensors(NamedTuple):
    """The tensors of one decoder layer; `rotation` (d/8, 8, 8), or None without a gate."""

    norm1: Tensor
    qkv: AdaptedLinear
    o: AdaptedLinear
    norm2: Tensor
    gate_up: AdaptedLinear
    down: AdaptedLinear
    rotation: Tensor | None


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
    x: Tensor, linear: AdaptedLinear, packed: Packed, config: LayerConfig, value_needed: bool = True
) -> Tensor:
    """Return y = W x + s B A dropout(x). x (T, in) -> (T, out); `value_needed` as in `adapted_product`."""
    weight, lora, salt = linear
    if lora is None:
        return frozen_linear(x, weight)
    dropped = x
    if config.dropout:
        keep = keep_mask(packed.keys, salt, x.shape[-1], config.dropout)
        dropped = torch.where(keep, x * (1.0 / (1.0 - config.dropout)), 0.0).to(x.dtype)
    a_x = functional.linear(dropped, lora.a.to(x.dtype))
    return adapted_product(x, a_x, lora.b, weight, config.lora_scale, value_needed)


def attention_half(
    x: Tensor, layer: LayerTensors, packed: Packed, config: LayerConfig, value_needed: bool = True
) -> Tensor:
    """Return x + o_proj(gate(attention(norm(x)))). x (T, d) -> (T, d)."""
    q, k, v = project_qkv(x, layer, packed, config)
    mixed = attend(q, k, v, packed.bounds, config.varlen).reshape(len(x), -1)  # (T, H * D)
    return project_out(x, mixed, layer, packed, config, value_needed)


def project_qkv(
    x: Tensor, layer: LayerTensors, packed: Packed, config: LayerConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries (T, H, D) and keys, both rotated, and values (T, KV, D), of x (T, d)."""
    shape, kv = config.shape, config.shape.num_kv_heads
    qkv = adapted_linear(rms_norm(x, layer.norm1, shape.rms_eps), layer.qkv, packed, config)
    heads = qkv.view(len(x), shape.num_heads + 2 * kv, shape.head_dim)  # (T, H + 2 KV, D)
    q, k, v = heads.split((shape.num_heads, kv, kv), dim=1)
    if config.v_apart:
        v = v.clone(memory_format=torch.contiguous_format)
    return _rope(q, packed.cos, packed.sin), _rope(k, packed.cos, packed.sin), v


def project_out(
    x: Tensor,
    mixed: Tensor,
    layer: LayerTensors,
    packed: Packed,
    config: LayerConfig,
    value_needed: bool = True,
) -> Tensor:
    """Return x + o_proj(gate(mixed)). x (T, d), mixed (T, H * D), attention's output."""
    if layer.rotation is not None:
        mixed = gate(mixed, layer.rotation)
    return x + adapted_linear(mixed, layer.o, packed, config, value_needed)


def mlp_half(
    x: Tensor, layer: LayerTensors, packed: Packed, config: LayerConfig, value_needed: bool = True
) -> Tensor:
    """Return x + down_proj(up * silu(gate)). x (T, d) -> (T, d)."""
    h = rms_norm(x, layer.norm2, config.shape.rms_eps)
    gated, up = adapted_linear(h, layer.gate_up, packed, config).chunk(2, dim=-1)
    return x + adapted_linear(up * functional.silu(gated), layer.down, packed, config, value_needed)


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first rotary_dim features of each head. x (T, H, D); cos, sin (T, rotary_dim)."""
    cos, sin = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
    rotary, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = rotary.chunk(2, dim=-1)
    rotated = rotary * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((rotated, rest), dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, varlen: bool) -> Tensor:
    """Causal attention within each document. q (T, H, D), k and v (T, KV, D) -> (T, H, D).

    `varlen` takes torch's variable-length flash attention; else one scaled-dot-product call a document, which
    runs anywhere but reads the bounds on the host.
    """
    if varlen:
        group = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(group, dim=1) if group > 1 else t for t in (k, v))
        out = varlen_attn(q, k, v, bounds, bounds, len(q), len(q), **_CAUSAL)
        assert isinstance(out, Tensor)  # a tuple only with return_aux
        return out
    parts = []
    borders = bounds.unique_consecutive().tolist()
    for start, end in itertools.pairwise(borders):
        one_q, one_k, one_v = (t[start:end].transpose(0, 1)[None] for t in (q, k, v))  # (1, heads, n, D)
        out = functional.scaled_dot_product_attention(
            one_q, one_k, one_v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1]
        )
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)
