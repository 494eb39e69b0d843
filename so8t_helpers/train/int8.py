"""Products of frozen int8 rows with activations rounded to 8 bits as well: `model.int8_matmul: tensor_core`.

A card multiplies 8-bit numbers two to four times as fast as 16-bit ones. The rows are exact as they are; what
is multiplied with them is rounded, with one scale a token. A few features of every input are larger than the
rest by orders of magnitude, the same ones for all tokens, and would leave the others few of the 8 bits. So
they are found once (`outliers`) and stay in the compute dtype, beside LoRA's second half (F: all but them):

    a[t] = max_{j in F} |x[t, j]| / 127,    q[t, j] = round(x[t, j] / a[t]) for j in F, else 0
    y[t, o] = r[o] a[t] sum_j q[t, j] rows[o, j]  +  sum_{j not in F} x[t, j] r[o] rows[o, j]

The inner sum is of integers and exact. The input's gradient is the same product with the transposed rows and
nothing apart, dx[t, j] = sum_o (dy[t, o] r[o]) rows[o, j]; the rows' scales are multiplied in before dy is
rounded, as one scale must hold along an inner sum.

What is given up: a number is off by at most half a step, 1/254 of its token's largest. (LLM.int8 looks for
outliers again in every product, and its backward pass is in 16 bits.) On a card the kernels of `int8_kernel`
compute this; here it stands as torch, for the CPU and for tests. Equal numbers are rounded equally, so a
layer that is recomputed is the one that ran forward.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127.0
SMALLEST = 2.0**-100  # a token with nothing larger is zero: 127 over it would overflow
_EXACT = 1024  # so many products of two 7-bit numbers and a sign sum up below 2^24, exactly in float32


def product(x: Tensor, rows: Tensor, scale: Tensor, kept: Tensor, low: Tensor, factor: Tensor) -> Tensor:
    """Return (scale * rows) (kept x) + factor low, (T, out) in x's dtype.

    Args:
        x: (T, in). rows: (out, in) int8. scale: (out,) float32.
        kept: (in,) float32, ones, and zeros for features that stand apart.
        low: (T, r) and factor: (out, r) in x's dtype: LoRA and what stands apart; r may be 0.
    """
    q, scales = quantize_tokens(x, kept)
    has_low = factor.shape[1] > 0
    return scaled_product(
        q, scales, rows, scale, low if has_low else None, factor if has_low else None, x.dtype
    )


def input_gradient(grad: Tensor, rows: Tensor, turned: Tensor, scale: Tensor) -> Tensor:
    """Return the gradient by x of (scale * rows) x: (T, in) in grad's dtype.

    Args:
        grad: (T, out). rows: (out, in) int8. scale: (out,) float32.
        turned: (in, out), the transposed rows, from `turn`; empty: they are turned here.
    """
    q, scales = quantize_tokens(grad, scale)
    if not len(turned):
        if q.is_cuda:
            from so8t_helpers.train import int8_kernel  # noqa: PLC0415

            return int8_kernel.turned_product(q, scales, rows, grad.dtype)
        turned = turn(rows)
    return scaled_product(q, scales, turned, None, None, None, grad.dtype)


def quantize_tokens(x: Tensor, column_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Round to 8 bits, one scale for each token.

    Args:
        x: (T, n). column_scale: (n,) float32, multiplied in before.

    Returns:
        (T, n) int8; (T,) float32 scales, NaN where a number of the token is not finite.
    """
    if x.is_cuda:
        from so8t_helpers.train import int8_kernel  # noqa: PLC0415  (Triton is not everywhere)

        return int8_kernel.quantize_tokens(x, column_scale)
    values = x.float() * column_scale
    largest = values.abs().amax(1) + (values * 0.0).sum(1)  # (T,)
    inverse = torch.where(largest >= SMALLEST, torch.full_like(largest, LARGEST) / largest, 0.0)
    return (values * inverse[:, None]).nan_to_num(0.0).round().to(torch.int8), largest / LARGEST


def scaled_product(
    q: Tensor,
    scales: Tensor,
    weight: Tensor,
    row_scale: Tensor | None,
    low: Tensor | None,
    factor: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return row_scale * scales * (q weight^T), plus low factor^T.

    Args:
        q: (T, n) int8 and scales (T,), from `quantize_tokens`.
        weight: (m, n) int8. row_scale: (m,) float32, or None for ones.
        low: (T, r) and factor: (m, r), in `dtype`; None for nothing.

    Returns:
        (T, m) in `dtype`, rounded once from float32.
    """
    if q.is_cuda:
        from so8t_helpers.train import int8_kernel  # noqa: PLC0415

        return int8_kernel.scaled_product(q, scales, weight, row_scale, low, factor, dtype)
    sums = torch.zeros((len(q), len(weight)), dtype=torch.int32, device=q.device)
    for part, rows in zip(q.split(_EXACT, 1), weight.split(_EXACT, 1), strict=True):
        sums += (part.float() @ rows.float().t()).to(torch.int32)
    total = sums.float() * scales[:, None]
    if row_scale is not None:
        total *= row_scale
    if low is not None and factor is not None:
        total += low.float() @ factor.float().t()
    return total.to(dtype)


def turn(weight: Tensor) -> Tensor:
    """Return the transpose of weight (out, in) int8, written out."""
    if weight.is_cuda:
        from so8t_helpers.train import int8_kernel  # noqa: PLC0415

        return int8_kernel.turn(weight)
    return weight.t().contiguous()
