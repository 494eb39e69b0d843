"""Products of 8-bit numbers on a card: three kernels; what they compute stands in `int8`, as plain torch."""

from __future__ import annotations

# Triton reads annotations as they are, so kernels have none.
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# These two as in `int8`.
_LARGEST = tl.constexpr(127.0)
_SMALLEST = tl.constexpr(2.0**-100)
# A float32 of this size has steps of one: adding and taking it away rounds to whole numbers, half to even.
_SHIFT = tl.constexpr(12582912.0)  # 1.5 * 2^23
_BAND = 16  # tiles of tokens that share a weight's tile while it is in the L2 cache
_TURNED = 128


class Tile(NamedTuple):
    """What one program computes (tokens x outputs), and how: features a load, warps, stages of its loads."""

    tokens: int
    outputs: int
    features: int
    warps: int
    stages: int


TILES = {(9, 0): Tile(128, 128, 128, 4, 3)}  # the best of twelve in all eight products of Phi-3.5-mini
# Not timed. 48 KiB of shared memory: two programs fit the 99 KiB of 8.6 and 8.9.
_OTHERS = Tile(128, 128, 64, 4, 3)


def tile_of(capability: tuple[int, int]) -> Tile:
    """Return the tile for a card's compute capability."""
    return TILES.get(capability, _OTHERS)


@triton.jit
def _quantize_kernel(x, column_scale, q, scales, features, stride, BLOCK: tl.constexpr):
    # a = max |x| / 127 over a token, q = round(x / a): one read of x, a byte for each number written.
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < features
    values = tl.load(x + token * stride + columns, mask=inside, other=0.0).to(tl.float32)
    values *= tl.load(column_scale + columns, mask=inside, other=0.0)
    # The second term is zero, and NaN where a number is not finite: so an overflow reaches the gradients.
    largest = tl.max(tl.abs(values), 0) + tl.sum(values * 0.0, 0)
    inverse = tl.where(largest >= _SMALLEST, tl.div_rn(_LARGEST, largest), 0.0)
    rounded = values * inverse + _SHIFT
    # The low byte of the shifted number's bits is the rounded number in two's complement.
    tl.store(q + token * features + columns, rounded.to(tl.int32, bitcast=True).to(tl.int8), mask=inside)
    tl.store(scales + token, tl.div_rn(largest, _LARGEST))


@triton.jit
def product_kernel(
    q, scales, weight, row_scale, low, factor, out, tokens, features, outputs,
    SCALED: tl.constexpr, RANK: tl.constexpr, STEP: tl.constexpr, WHOLE: tl.constexpr, BAND: tl.constexpr,
    TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    # out[t, o] = r[o] a[t] sum_j q[t, j] w[o, j]  +  sum_k low[t, k] factor[o, k]
    # The sum over j is of integers, at most 127 * 127 * features, and never leaves the registers.
    tiles = tl.cdiv(outputs, OUTPUTS)
    band, within = tl.program_id(0) // (BAND * tiles), tl.program_id(0) % (BAND * tiles)
    height = tl.minimum(tl.cdiv(tokens, TOKENS) - band * BAND, BAND)
    token = (band * BAND + within % height) * TOKENS + tl.arange(0, TOKENS)
    output = within // height * OUTPUTS + tl.arange(0, OUTPUTS)
    # Rows past the end wrap around, which costs no mask; what they give is not stored.
    row, line = (token % tokens).to(tl.int64), (output % outputs).to(tl.int64)
    feature = tl.arange(0, FEATURES)
    q_at = q + row[:, None] * features + feature[None, :]
    weight_at = weight + line[None, :] * features + feature[:, None]
    sums = tl.zeros((TOKENS, OUTPUTS), tl.int32)
    for start in range(0, features, FEATURES):
        if WHOLE:
            x, w = tl.load(q_at), tl.load(weight_at)
        else:
            x = tl.load(q_at, mask=feature[None, :] < features - start, other=0)
            w = tl.load(weight_at, mask=feature[:, None] < features - start, other=0)
        sums = tl.dot(x, w, sums, out_dtype=tl.int32)
        q_at += FEATURES
        weight_at += FEATURES
    total = sums.to(tl.float32) * tl.load(scales + row)[:, None]
    if SCALED:
        total *= tl.load(row_scale + line)[None, :]
    for first in tl.static_range(0, RANK, STEP):  # LoRA's second half and what stands apart, in x's dtype
        k = first + tl.arange(0, STEP)
        a_x = tl.load(low + row[:, None] * RANK + k[None, :], mask=k[None, :] < RANK, other=0.0)
        b = tl.load(factor + line[None, :] * RANK + k[:, None], mask=k[:, None] < RANK, other=0.0)
        total = tl.dot(a_x, b, acc=total)
    inside = (token[:, None] < tokens) & (output[None, :] < outputs)
    to = out + token[:, None].to(tl.int64) * outputs + output[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _turn_kernel(weight, turned, rows, columns, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    j = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = (i[:, None] < rows) & (j[None, :] < columns)
    tile = tl.load(weight + i[:, None].to(tl.int64) * columns + j[None, :], mask=inside, other=0)
    tl.store(turned + j[:, None].to(tl.int64) * rows + i[None, :], tl.trans(tile), mask=tl.trans(inside))


@torch.library.custom_op("so8t::int8_quantize", mutates_args=())
def quantize_tokens(x: Tensor, column_scale: Tensor) -> tuple[Tensor, Tensor]:
    """`int8.quantize_tokens` on a card."""
    x = x if x.stride(1) == 1 else x.contiguous()
    tokens, features = x.shape
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(tokens, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(features)
    warps = min(32, max(1, block // 1024))
    _quantize_kernel[(tokens,)](
        x, column_scale, q, scales, features, x.stride(0), BLOCK=block, num_warps=warps
    )  # fmt: skip
    return q, scales


@quantize_tokens.register_fake
def _(x: Tensor, column_scale: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=torch.int8, device=x.device), x.new_empty(len(x), dtype=torch.float32)


@torch.library.custom_op("so8t::int8_product", mutates_args=())
def scaled_product(
    q: Tensor,
    scales: Tensor,
    weight: Tensor,
    row_scale: Tensor | None,
    low: Tensor | None,
    factor: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`int8.scaled_product` on a card."""
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (0, 0)
    return launch(q, scales, weight, row_scale, low, factor, dtype, tile_of(capability))


def launch(
    q: Tensor,
    scales: Tensor,
    weight: Tensor,
    row_scale: Tensor | None,
    low: Tensor | None,
    factor: Tensor | None,
    dtype: torch.dtype,
    tile: Tile,
) -> Tensor:
    """The product with a tile of one's choice; arguments as `int8.scaled_product`."""
    if low is not None and dtype == torch.float32:  # no tensor core multiplies these, and no kernel of ours
        assert factor is not None
        return launch(q, scales, weight, row_scale, None, None, dtype, tile).addmm_(low, factor.t())
    (tokens, features), outputs = q.shape, len(weight)
    out = torch.empty((tokens, outputs), dtype=dtype, device=q.device)
    grid = (triton.cdiv(tokens, tile.tokens) * triton.cdiv(outputs, tile.outputs),)
    product_kernel[grid](
        q, scales, weight, row_scale, low, factor, out, tokens, features, outputs,
        **constants(features, row_scale is not None, 0 if low is None else low.shape[1], tile),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def constants(features: int, scaled: bool, rank: int, tile: Tile) -> dict[str, int | bool]:
    """Return what `product_kernel` is compiled for: the ends of its rows, the rank beside them, the tile."""
    return {
        "SCALED": scaled,
        "RANK": rank,
        "STEP": 16 if rank <= 16 else 32,
        "WHOLE": features % tile.features == 0,
        "BAND": _BAND,
        "TOKENS": tile.tokens,
        "OUTPUTS": tile.outputs,
        "FEATURES": tile.features,
    }


@scaled_product.register_fake
def _(
    q: Tensor,
    scales: Tensor,
    weight: Tensor,
    row_scale: Tensor | None,
    low: Tensor | None,
    factor: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return q.new_empty((len(q), len(weight)), dtype=dtype)


@register_flop_formula(torch.ops.so8t.int8_product)
def _product_flops(q_shape, scales_shape, weight_shape, *_, out_shape=None, **__):
    """Without it the compiler takes the product for free, and runs it again instead of keeping its result."""
    return 2 * q_shape[0] * q_shape[1] * weight_shape[0]


@torch.library.custom_op("so8t::int8_turned_product", mutates_args=())
def turned_product(q: Tensor, scales: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The product with rows (n, m) that lie the other way: (T, m).

    One operation, since the compiler would turn the rows in the forward pass and keep them for the backward.
    """
    return scaled_product(q, scales, turn(rows), None, None, None, dtype)


@turned_product.register_fake
def _(q: Tensor, scales: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    return q.new_empty((len(q), rows.shape[1]), dtype=dtype)


@register_flop_formula(torch.ops.so8t.int8_turned_product)
def _turned_flops(q_shape, scales_shape, rows_shape, *_, out_shape=None, **__):
    return 2 * q_shape[0] * q_shape[1] * rows_shape[1]


@torch.library.custom_op("so8t::int8_turn", mutates_args=())
def turn(weight: Tensor) -> Tensor:
    """The transpose of weight (out, in), written out: both operands of an 8-bit product lie along the sum."""
    rows, columns = weight.shape
    turned = torch.empty((columns, rows), dtype=torch.int8, device=weight.device)
    grid = (triton.cdiv(rows, _TURNED), triton.cdiv(columns, _TURNED))
    _turn_kernel[grid](weight, turned, rows, columns, SIZE=_TURNED)
    return turned


@turn.register_fake
def _(weight: Tensor) -> Tensor:
    return weight.new_empty((weight.shape[1], weight.shape[0]))
