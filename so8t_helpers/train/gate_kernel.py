"""The gate's two kernels for 16-bit activations on a card: each reads its inputs once.

A gate is bound by memory: at the real size its arithmetic is nothing against the 12 MiB of activations that
go in and come out. So eight blocks side by side make one 64 x 64 factor, seven eighths of it zeros, and the
tensor cores do not mind. R is split into two 16-bit parts, R = high + rest, whose products with 16-bit
activations are exact in the float32 sums: the result is that of float32 arithmetic, rounded once.
"""

from __future__ import annotations

# Triton reads annotations as they are, so no `from __future__ import annotations` here.
import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = 64  # features that one program rotates: eight blocks
_ROWS = 64  # tokens at a time
_MOST_PARTS = 32  # partial sums over tokens that the rotations' gradient is added up from


@triton.jit
def _factor(blocks, group, TRANSPOSE: tl.constexpr, GROUP: tl.constexpr):
    """Load eight blocks (8, 8) onto the diagonal of one (GROUP, GROUP) float32 tile."""
    i = tl.arange(0, GROUP)[:, None]
    j = tl.arange(0, GROUP)[None, :]
    inner = (j % 8) * 8 + i % 8 if TRANSPOSE else (i % 8) * 8 + j % 8
    return tl.load(blocks + group * GROUP * 8 + (i // 8) * 64 + inner, mask=i // 8 == j // 8, other=0.0)


@triton.jit
def _product(x, factor):
    """Multiply x (ROWS, GROUP), 16 bits, by a float32 factor, with float32 sums."""
    high = factor.to(x.dtype)
    rest = (factor - high.to(tl.float32)).to(x.dtype)
    return tl.dot(x, rest, acc=tl.dot(x, high))


@triton.jit
def _rotate_kernel(x, blocks, out, tokens, x_stride, out_stride, ROWS: tl.constexpr, GROUP: tl.constexpr):
    group = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = group * GROUP + tl.arange(0, GROUP)[None, :]
    inside = rows < tokens
    tile = tl.load(x + rows.to(tl.int64) * x_stride + columns, mask=inside, other=0.0)
    rotated = _product(tile, _factor(blocks, group, True, GROUP))  # a row times R^T is R x
    tl.store(out + rows.to(tl.int64) * out_stride + columns, rotated.to(tile.dtype), mask=inside)


@triton.jit
def _rotate_backward_kernel(
    grad, x, blocks, out, parts, tokens, grad_stride, x_stride, out_stride, blocks_total,
    TILES: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    columns = group * GROUP + tl.arange(0, GROUP)[None, :]
    factor = _factor(blocks, group, False, GROUP)
    total = tl.zeros((GROUP, GROUP), tl.float32)
    for tile in range(TILES):
        rows = (tl.program_id(0) * TILES + tile) * ROWS + tl.arange(0, ROWS)[:, None]
        inside = rows < tokens
        row = rows.to(tl.int64)
        grad_tile = tl.load(grad + row * grad_stride + columns, mask=inside, other=0.0)
        x_tile = tl.load(x + row * x_stride + columns, mask=inside, other=0.0)
        rotated = _product(grad_tile, factor)
        tl.store(out + row * out_stride + columns, rotated.to(grad_tile.dtype), mask=inside)
        total = tl.dot(tl.trans(grad_tile), x_tile, acc=total)
    i = tl.arange(0, GROUP)[:, None]
    j = tl.arange(0, GROUP)[None, :]
    block = tl.program_id(0) * blocks_total + group * (GROUP // 8) + i // 8
    tl.store(parts + block * 64 + (i % 8) * 8 + j % 8, total, mask=i // 8 == j // 8)


@torch.library.custom_op("so8t::rotate", mutates_args=())
def rotate(x: Tensor, blocks: Tensor) -> Tensor:
    """R x, block by block. x (T, d) fp16 or bf16, blocks (d/8, 8, 8) float32 -> (T, d)."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(len(x), _ROWS), x.shape[1] // GROUP)
    _rotate_kernel[grid](x, blocks, out, len(x), x.stride(0), out.stride(0), ROWS=_ROWS, GROUP=GROUP)
    return out


@rotate.register_fake
def _(x: Tensor, blocks: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("so8t::rotate_backward", mutates_args=())
def rotate_backward(grad: Tensor, x: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """R^T on the gradient, and the sum over tokens of grad_b x_b^T.

    Args:
        grad: (T, d) fp16 or bf16. x: (T, d), what the gate rotated. blocks: (d/8, 8, 8) float32.

    Returns:
        (T, d) in grad's dtype, (d/8, 8, 8) float32.
    """
    out = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    tiles = max(4, triton.cdiv(len(x), _ROWS * _MOST_PARTS))
    grid = (triton.cdiv(len(x), _ROWS * tiles), x.shape[1] // GROUP)
    parts = torch.empty((grid[0], *blocks.shape), dtype=torch.float32, device=x.device)
    _rotate_backward_kernel[grid](
        grad, x, blocks, out, parts, len(x), grad.stride(0), x.stride(0), out.stride(0), len(blocks),
        TILES=tiles, ROWS=_ROWS, GROUP=GROUP,
    )  # fmt: skip
    return out, parts.sum(0)


@rotate_backward.register_fake
def _(grad: Tensor, x: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape), blocks.new_empty(blocks.shape)
