"""Products of 8-bit numbers on a card: three kernels; what they compute stands in `int8`, as plain torch."""

from __future__ import annotations

# Triton reads annotations as they are, so kernels have none.
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# These three as in `int8`.
_GROUP = 128
_LARGEST = tl.constexpr(127.0)
_SMALLEST = tl.constexpr(2.0**-100)
# A float32 of this size has steps of one: adding and taking it away rounds to whole numbers, half to even.
_SHIFT = tl.constexpr(12582912.0)  # 1.5 * 2^23
_BAND = 16  # tiles of tokens that share a weight's tile while it is in the L2 cache
_QUANTIZED_ROWS = 16
_TURNED = 128


class Tile(NamedTuple):
    """What one program computes (tokens x outputs), and how: warps, and stages of its loads."""

    tokens: int
    outputs: int
    warps: int
    stages: int


# Compiled and counted, not yet timed: no accumulator leaves the registers, and the shared memory fits.
TILES = {(9, 0): Tile(256, 128, 8, 3)}
_OTHERS = Tile(128, 128, 8, 3)  # 64 KiB of shared memory; cards of 8.6 and 8.9 have 99


def tile_of(capability: tuple[int, int]) -> Tile:
    """Return the tile for a card's compute capability."""
    return TILES.get(capability, _OTHERS)


@triton.jit
def _quantize_kernel(
    x, column_scale, q, scales, tokens, features, stride,
    SCALED: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # a = max |x| / 127 over a group, q = round(x / a): one read of x, a byte for each number written.
    group = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = group * GROUP + tl.arange(0, GROUP)[None, :]
    row = rows[:, None].to(tl.int64)
    inside = (rows[:, None] < tokens) & (columns < features)
    values = tl.load(x + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        values *= tl.load(column_scale + columns, mask=columns < features, other=0.0)
    # The second term is zero, and NaN where a number is not finite: so an overflow reaches the gradients.
    largest = tl.max(tl.abs(values), 1) + tl.sum(values * 0.0, 1)
    inverse = tl.where(largest >= _SMALLEST, tl.div_rn(_LARGEST, largest), 0.0)
    rounded = values * inverse[:, None] + _SHIFT
    # The low byte of the shifted number's bits is the rounded number in two's complement.
    tl.store(q + row * features + columns, rounded.to(tl.int32, bitcast=True).to(tl.int8), mask=inside)
    tl.store(scales + group * tokens + rows, tl.div_rn(largest, _LARGEST), mask=rows < tokens)


@triton.jit
def _load(at, start, at_feature, features, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(at + start)
    return tl.load(at + start, mask=at_feature < features - start, other=0)


@triton.jit
def _finish(
    total, row_scale, low, b, out, token, output, tokens, outputs,
    SCALED: tl.constexpr, RANK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    row, line = (token % tokens).to(tl.int64), (output % outputs).to(tl.int64)
    if SCALED:
        total *= tl.load(row_scale + line)[None, :]
    for first in tl.static_range(0, RANK, STEP):  # LoRA's second half, in the activations' dtype
        k = first + tl.arange(0, STEP)
        a_x = tl.load(low + row[:, None] * RANK + k[None, :], mask=k[None, :] < RANK, other=0.0)
        factor = tl.load(b + line[None, :] * RANK + k[:, None], mask=k[:, None] < RANK, other=0.0)
        total = tl.dot(a_x, factor, acc=total)
    inside = (token[:, None] < tokens) & (output[None, :] < outputs)
    to = out + token[:, None].to(tl.int64) * outputs + output[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def product_kernel(
    q, scales, weight, row_scale, low, b, out, tokens, features, outputs,
    SCALED: tl.constexpr, RANK: tl.constexpr, STEP: tl.constexpr, WHOLE: tl.constexpr, GROUP: tl.constexpr,
    BAND: tl.constexpr, TOKENS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    # out[t, o] = r[o] sum_g a[g, t] sum_{j in g} q[t, j] w[o, j]  +  sum_k low[t, k] b[o, k]
    # The inner sum is of integers, at most 128 * 127 * 127. Its registers come on top of those of the
    # float32 sums, so a tile's outputs are done in two halves: only so does one of 256 x 128 fit the
    # registers. It reads a quarter less than two of 128 x 128, which on a Hopper wait for the L2 cache.
    tiles = tl.cdiv(outputs, 2 * HALF)
    band, within = tl.program_id(0) // (BAND * tiles), tl.program_id(0) % (BAND * tiles)
    height = tl.minimum(tl.cdiv(tokens, TOKENS) - band * BAND, BAND)
    token = (band * BAND + within % height) * TOKENS + tl.arange(0, TOKENS)
    output_1 = within // height * 2 * HALF + tl.arange(0, HALF)
    output_2 = output_1 + HALF
    # Rows past the end wrap around, which costs no mask; what they give is not stored.
    feature = tl.arange(0, GROUP)
    across, down = feature[None, :], feature[:, None]
    q_at = q + (token % tokens).to(tl.int64)[:, None] * features + across
    weight_1 = weight + (output_1 % outputs).to(tl.int64)[None, :] * features + down
    weight_2 = weight + (output_2 % outputs).to(tl.int64)[None, :] * features + down
    scale_at = scales + token % tokens
    total_1 = tl.zeros((TOKENS, HALF), tl.float32)
    total_2 = tl.zeros((TOKENS, HALF), tl.float32)
    for start in range(0, features, GROUP):
        x = _load(q_at, start, across, features, WHOLE)
        a = tl.load(scale_at)[:, None]
        sums = tl.dot(x, _load(weight_1, start, down, features, WHOLE), out_dtype=tl.int32)
        total_1 += a * sums.to(tl.float32)
        sums = tl.dot(x, _load(weight_2, start, down, features, WHOLE), out_dtype=tl.int32)
        total_2 += a * sums.to(tl.float32)
        scale_at += tokens
    _finish(total_1, row_scale, low, b, out, token, output_1, tokens, outputs, SCALED, RANK, STEP)
    _finish(total_2, row_scale, low, b, out, token, output_2, tokens, outputs, SCALED, RANK, STEP)


@triton.jit
def _turn_kernel(weight, turned, rows, columns, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    j = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = (i[:, None] < rows) & (j[None, :] < columns)
    tile = tl.load(weight + i[:, None].to(tl.int64) * columns + j[None, :], mask=inside, other=0)
    tl.store(turned + j[:, None].to(tl.int64) * rows + i[None, :], tl.trans(tile), mask=tl.trans(inside))


@torch.library.custom_op("so8t::int8_quantize", mutates_args=())
def quantize_groups(x: Tensor, column_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """`int8.quantize_groups` on a card."""
    x = x if x.stride(1) == 1 else x.contiguous()
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty((triton.cdiv(x.shape[1], _GROUP), len(x)), dtype=torch.float32, device=x.device)
    _quantize_kernel[triton.cdiv(len(x), _QUANTIZED_ROWS), len(scales)](
        x, column_scale, q, scales, len(x), x.shape[1], x.stride(0),
        SCALED=column_scale is not None, ROWS=_QUANTIZED_ROWS, GROUP=_GROUP,
    )  # fmt: skip
    return q, scales


@quantize_groups.register_fake
def _(x: Tensor, column_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return q, x.new_empty((triton.cdiv(x.shape[1], _GROUP), len(x)), dtype=torch.float32)


@torch.library.custom_op("so8t::int8_product", mutates_args=())
def grouped_product(
    q: Tensor,
    scales: Tensor,
    weight: Tensor,
    row_scale: Tensor | None,
    low: Tensor | None,
    b: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`int8.grouped_product` on a card."""
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (0, 0)
    return launch(q, scales, weight, row_scale, low, b, dtype, tile_of(capability))


def launch(
    q: Tensor,
    scales: Tensor,
    weight: Tensor,
    row_scale: Tensor | None,
    low: Tensor | None,
    b: Tensor | None,
    dtype: torch.dtype,
    tile: Tile,
) -> Tensor:
    """The product with a tile of one's choice; arguments as `int8.grouped_product`."""
    if low is not None and dtype == torch.float32:  # no tensor core multiplies these, and no kernel of ours
        assert b is not None
        return launch(q, scales, weight, row_scale, None, None, dtype, tile).addmm_(low, b.t())
    (tokens, features), outputs = q.shape, len(weight)
    out = torch.empty((tokens, outputs), dtype=dtype, device=q.device)
    grid = (triton.cdiv(tokens, tile.tokens) * triton.cdiv(outputs, tile.outputs),)
    product_kernel[grid](
        q, scales, weight, row_scale, low, b, out, tokens, features, outputs,
        **constants(features, row_scale is not None, 0 if low is None else low.shape[1], tile),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def constants(features: int, scaled: bool, rank: int, tile: Tile) -> dict[str, int | bool]:
    """Return what `product_kernel` is compiled for: the ends of its rows, LoRA's rank, the tile."""
    step = min(64, max(16, triton.next_power_of_2(rank)))
    return {
        "SCALED": scaled,
        "RANK": rank,
        "STEP": step,
        "WHOLE": features % _GROUP == 0,
        "GROUP": _GROUP,
        "BAND": _BAND,
        "TOKENS": tile.tokens,
        "HALF": tile.outputs // 2,
    }


@grouped_product.register_fake
def _(
    q: Tensor,
    scales: Tensor,
    weight: Tensor,
    row_scale: Tensor | None,
    low: Tensor | None,
    b: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return q.new_empty((len(q), len(weight)), dtype=dtype)


@register_flop_formula(torch.ops.so8t.int8_product)
def _product_flops(q_shape, scales_shape, weight_shape, *_, out_shape=None, **__):
    """Without it the compiler takes the product for free, and runs it again instead of keeping its result."""
    return 2 * q_shape[0] * q_shape[1] * weight_shape[0]


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
