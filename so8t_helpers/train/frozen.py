"""Frozen weights in 8, 4 or 16 bits and the products with them.

bitsandbytes' LLM.int8 stores a weight as int8 rows `CB` and one absolute maximum per row `SCB`, so that
W[i, j] = CB[i, j] * SCB[i] / 127. Its own product quantises the activations too, searches them for outliers
(a host synchronisation in every layer) and keeps large tensors for the backward pass. Here the product is
weight-only: dequantise to the compute dtype, multiply, forget; the backward pass dequantises again, so only
the int8 rows stay in memory. The same holds for NF4. LoRA rides along: [W | sB] [x; A x] is one product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from so8t_helpers.phi3.shape import LINEARS, Phi3Shape, weight_path
from so8t_helpers.run.files import StageError
from so8t_helpers.settings import ModelSettings
from so8t_helpers.train import int8

_INT8_MAX = 127.0


class PlainWeight(NamedTuple):
    """weight (out, in) in a floating-point dtype."""

    weight: Tensor


class Int8Weight(NamedTuple):
    """rows (out, in) int8; scale (out, 1) float32, the row's absolute maximum / 127."""

    rows: Tensor
    scale: Tensor


class TensorCoreWeight(NamedTuple):
    """The same numbers as `Int8Weight`, multiplied as 8 bits by `int8`.

    turned: (in, out), see `hold`, else empty. features (k,) of the input stand apart, with their columns
    (out, k) of the rows; kept: (in,) float32, zeros for them and ones for the others.
    """

    rows: Tensor
    scale: Tensor
    turned: Tensor
    kept: Tensor
    features: Tensor
    columns: Tensor

    def apart(self, features: Tensor) -> TensorCoreWeight:
        """Let these features, (k,) int64, stand apart."""
        kept = torch.ones_like(self.kept).index_fill_(0, features, 0.0)
        return self._replace(kept=kept, features=features, columns=self.rows[:, features].contiguous())


class LlmInt8Weight(NamedTuple):
    """The same numbers as `Int8Weight`, multiplied by LLM.int8 as bitsandbytes ships it."""

    rows: Tensor
    absmax: Tensor


class Nf4Weight(NamedTuple):
    """packed: two codes a byte; absmax one a block; code: the 16 values; shape: an empty (out, in, 0)."""

    packed: Tensor
    absmax: Tensor
    code: Tensor
    shape: Tensor


class HeldWeight(NamedTuple):
    """joined (out, in + r): [W | s B] dequantised ahead, where several products with it follow at once."""

    joined: Tensor


FrozenWeight = PlainWeight | Int8Weight | TensorCoreWeight | LlmInt8Weight | Nf4Weight | HeldWeight

NF4_BLOCK = 64


def quantize(
    weight: Tensor, quantization: str, int8_matmul: str = "weight_only", dtype: torch.dtype = torch.float32
) -> FrozenWeight:
    """Store a 16- or 32-bit weight (out, in) as the setting says; one that stays whole takes `dtype`.

    The int8 rows are those of `bitsandbytes.functional.int8_vectorwise_quant` without an outlier threshold:
    round(W / absmax * 127).
    """
    if quantization == "none":
        return PlainWeight(weight.to(dtype))
    if quantization == "nf4":
        return _quantize_nf4(weight)
    values = weight.float()
    absmax = values.abs().amax(dim=1, keepdim=True)  # (out, 1)
    scale = torch.where(absmax > 0, absmax / _INT8_MAX, torch.ones_like(absmax))
    rows = (values * (_INT8_MAX / absmax).nan_to_num(posinf=0.0)).round().to(torch.int8)
    if int8_matmul == "llm_int8":
        return LlmInt8Weight(rows, absmax.squeeze(1))
    if int8_matmul == "tensor_core":
        empty = rows.new_empty(0)
        kept = torch.ones(rows.shape[1], device=rows.device)
        return TensorCoreWeight(rows, scale, empty, kept, empty.long(), rows[:, :0])
    return Int8Weight(rows, scale)


def _quantize_nf4(weight: Tensor) -> Nf4Weight:
    from bitsandbytes.functional import quantize_4bit  # noqa: PLC0415  (its import takes a second)

    packed, state = quantize_4bit(weight, blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=False)
    shape = torch.empty((*weight.shape, 0), dtype=torch.int8, device=weight.device)
    return Nf4Weight(packed, state.absmax, state.code.to(weight.device), shape)


def dequantize(weight: FrozenWeight, dtype: torch.dtype) -> Tensor:
    """Return the weight (out, in) in `dtype`."""
    if isinstance(weight, PlainWeight):
        return weight.weight.to(dtype)
    if isinstance(weight, (Int8Weight, TensorCoreWeight)):
        return weight.rows.to(dtype) * weight.scale.to(dtype)
    if isinstance(weight, LlmInt8Weight):
        return weight.rows.to(dtype) * (weight.absmax[:, None] / _INT8_MAX).to(dtype)
    assert isinstance(weight, Nf4Weight)
    pairs = weight.packed.flatten()
    codes = torch.stack((pairs >> 4, pairs & 15), dim=-1)  # the high half comes first
    values = weight.code[codes.int()].view(-1, NF4_BLOCK) * weight.absmax[:, None]
    return values.to(dtype).view(weight.shape.shape[:2])


class _Product(torch.autograd.Function):
    """The product of `adapted_product`: a stored weight is dequantised in both directions, never kept so."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a_x: Tensor,
        b: Tensor,
        s: float,
        value_needed: bool,
        weight: FrozenWeight,  # one tuple: with *tensors, torch.compile miscounts whether forward takes ctx
    ) -> Tensor:
        ctx.save_for_backward(a_x, b, *weight)
        ctx.s, ctx.kind = s, type(weight)
        if not value_needed:
            return x.new_zeros(()).expand(len(x), len(b))
        if isinstance(weight, TensorCoreWeight):
            apart = weight.columns.to(x.dtype) * weight.scale.to(x.dtype)
            low = torch.cat((a_x, x[:, weight.features]), 1)
            factor = torch.cat(((b * s).to(x.dtype), apart), 1)
            return int8.product(x, weight.rows, weight.scale[:, 0], weight.kept, low, factor)
        return torch.cat((x, a_x), 1) @ _joined(weight, b, s, x.dtype).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        a_x, b, *tensors = ctx.saved_tensors
        weight = ctx.kind(*tensors)
        if isinstance(weight, TensorCoreWeight):
            by_x = int8.input_gradient(grad, weight.rows, weight.turned, weight.scale[:, 0])
            by_a_x = grad @ (b * ctx.s).to(grad.dtype)
        else:
            both = grad @ _joined(weight, b, ctx.s, grad.dtype)
            r = a_x.shape[1]
            by_x, by_a_x = both.split((both.shape[1] - r, r), 1)
        by_b = (grad.t() @ a_x).float() * ctx.s
        return by_x, by_a_x, by_b, None, None, None


def _joined(weight: FrozenWeight, b: Tensor, s: float, dtype: torch.dtype) -> Tensor:
    """Return [W | s B], (out, in + r)."""
    if isinstance(weight, HeldWeight):
        return weight.joined
    return torch.cat((dequantize(weight, dtype), (b * s).to(dtype)), 1)


def hold(weight: FrozenWeight, b: Tensor | None, s: float, dtype: torch.dtype) -> FrozenWeight:
    """Dequantise [W | s B] for the products that follow; a weight that needs none stays as it is.

    One that is multiplied as 8 bits is transposed instead, for the gradients of all token tiles.

    Args:
        b: (out, r) float32, or None without LoRA.
    """
    if isinstance(weight, TensorCoreWeight):
        # Not _replace: compiled by torch 2.11 it returns a tuple without its items.
        rows, scale, _, *apart = weight
        return TensorCoreWeight(rows, scale, int8.turn(rows), *apart)
    if not isinstance(weight, Int8Weight | Nf4Weight):
        return weight
    return HeldWeight(dequantize(weight, dtype) if b is None else _joined(weight, b, s, dtype))


def adapted_product(
    x: Tensor, a_x: Tensor, b: Tensor, weight: FrozenWeight, s: float, value_needed: bool = True
) -> Tensor:
    """Return y = W x + s B A x; for int8 and NF4 as one product [W | s B] [x; A x], see `int8` for the other.

    Args:
        x: (T, in). a_x: (T, r), LoRA's A on its input.
        b: (out, r) float32.
        value_needed: False where only gradients are, as for the last product of a layer that is recomputed;
            then the values returned mean nothing.
    """
    if isinstance(weight, (Int8Weight, TensorCoreWeight, Nf4Weight, HeldWeight)):
        return _Product.apply(x, a_x, b, s, value_needed, weight)
    return torch.addmm(frozen_linear(x, weight), a_x, b.to(x.dtype).t(), alpha=s)


def frozen_linear(x: Tensor, weight: FrozenWeight) -> Tensor:
    """Return y = W x. x (T, in) -> (T, out) in x's dtype; gradients reach x alone."""
    if isinstance(weight, PlainWeight):
        return functional.linear(x, weight.weight)
    if isinstance(weight, LlmInt8Weight):
        return _llm_int8(x, weight)
    out = len(weight.shape if isinstance(weight, Nf4Weight) else weight[0])
    return adapted_product(x, x.new_empty(len(x), 0), x.new_empty(out, 0), weight, 1.0)


def _llm_int8(x: Tensor, weight: LlmInt8Weight) -> Tensor:
    """LLM.int8 (Dettmers et al. 2022) through bitsandbytes' own autograd function, threshold 6.0.

    On the CPU bitsandbytes takes a dequantised product instead wherever a state is said to be training; its
    backward pass does not ask, so here no state is.
    """
    import bitsandbytes as bnb  # noqa: PLC0415

    state = bnb.MatmulLtState()
    state.CB, state.SCB = weight.rows, weight.absmax
    state.threshold, state.has_fp16_weights, state.is_training = 6.0, False, False
    return bnb.matmul(x, weight.rows, state=state)


@dataclass
class Base:
    """A frozen Phi3: linears stored as the settings say, the rest in the compute dtype.

    Attributes:
        embedding: (vocab, d) on the host. One micro-step needs a few thousand rows of it; on the card the
            table of the real model would take 188 MiB for nothing.
        linears: one dict a layer, by the names in `LINEARS`.
        norms: (input norm, post-attention norm) of each layer, each (d,).
        final_norm: (d,). head: (vocab, d).
    """

    shape: Phi3Shape
    dtype: torch.dtype
    device: torch.device
    embedding: Tensor
    linears: list[dict[str, FrozenWeight]]
    norms: list[tuple[Tensor, Tensor]]
    final_norm: Tensor
    head: Tensor


def load_base(
    shape: Phi3Shape,
    read: Callable[[str], Tensor],
    settings: ModelSettings,
    device: torch.device,
    dtype: torch.dtype,
) -> Base:
    """Read a base model, one tensor at a time, so that the host never holds it whole.

    Args:
        read: gives a tensor by its name in the checkpoint, e.g. from `weight_reader`.
        dtype: compute dtype of all that is not quantised.

    Raises:
        StageError: a weight is not finite; a training would go on with it, and end in nothing.
    """

    def load(name: str, where: torch.device) -> Tensor:
        weight = read(name).to(where)
        if not bool(torch.isfinite(weight).all()):
            raise StageError(f"model.base: {name} holds a value that is no number; fetch the base again")
        return weight

    def move(name: str) -> Tensor:
        return load(name, device).to(dtype)

    def store(name: str) -> FrozenWeight:
        return quantize(load(name, device), settings.quantization, settings.int8_matmul, dtype)

    linears, norms = [], []
    for i in range(shape.num_layers):
        linears.append({name: store(f"{weight_path(i, name)}.weight") for name in LINEARS})
        layer = f"model.layers.{i}"
        norms.append(
            (move(f"{layer}.input_layernorm.weight"), move(f"{layer}.post_attention_layernorm.weight"))
        )
    embedding = load("model.embed_tokens.weight", torch.device("cpu")).to(dtype)
    head = "model.embed_tokens.weight" if shape.tie_embeddings else "lm_head.weight"
    return Base(shape, dtype, device, embedding, linears, norms, move("model.norm.weight"), move(head))
