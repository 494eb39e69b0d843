"""Products of frozen int8 rows with activations rounded to 8 bits as well: `model.int8_matmul: tensor_core`.

A card multiplies 8-bit numbers two to four times as fast as 16-bit ones. The rows are exact as they are; what
is multiplied with them is rounded, in groups of 128 features of one token with a scale of their own:

    a[g, t] = max_{j in g} |x[t, j]| / 127,    q[t, j] = round(x[t, j] / a[g, t])
    y[t, o] = r[o] sum_g a[g, t] sum_{j in g} q[t, j] rows[o, j]

Inner sums are of integers and exact, those over groups float32. The input's gradient is the same product
with the transposed rows, dx[t, j] = sum_o (dy[t, o] r[o]) rows[o, j]; the rows' scales are multiplied in
before dy is rounded, as one scale must hold along an inner sum.

What is given up: a number is off by at most half a step, 1/254 of the largest of its group. (LLM.int8 has
one scale a token and keeps outliers apart; its backward pass is in 16 bits.) On a card the kernels of
`int8_kernel` compute this; here it stands as torch, for the CPU and for tests. Equal numbers are rounded
equally, so a layer that is recomputed is the one that ran forward.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

GROUP = 128  # one scale a token lost 0.008 nats on a model of 135 M parameters, one for 128 features 0.002
LARGEST = 127.0
SMALLEST = 2.0**-100  # a group with nothing larger is zero: 127 over it would overflow


def product(x: Tensor, rows: Tensor, scale: Tensor, a_x: Tensor, b: Tensor) -> Tensor:
    """Return (scale * rows) x + b a_x, (T, out) in x's dtype.

    Args:
        x: (T, in). rows: (out, in) int8. scale: (out,) float32.
        a_x: (T, r) and b: (out, r) in x's dtype; r may be 0.
    """
    q, scales = quantize_groups(x)
    has_lora = b.shape[1] > 0
    return grouped_product(
        q, scales, rows, scale, a_x if has_lora else None, b if has_lora else None, x.dtype
    )


def input_gradient(grad: Tensor, turned: Tensor, scale: Tensor) -> Tensor:
    """Return the gradient by x of (scale * rows) x: (T, in) in grad's dtype.

    Args:
        grad: (T, out). turned: (in, out), the transposed rows, from `turn`. scale: (out,) float32.
    """
    q, scales = quantize_groups(grad, scale)
    return grouped_product(q, scales, turned, None, None, None, grad.dtype)


def quantize_groups(x: Tensor, column_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round to 8 bits, one scale for each token and group of features.

    Args:
        x: (T, n). column_scale: (n,) float32, multiplied in before.

    Returns:
        (T, n) int8; (groups, T) float32 scales, NaN where a number of the group is not finite.
    """
    if x.is_cuda:
        from so8t_helpers.train import int8_kernel  # noqa: PLC0415  (Triton is not everywhere)

        return int8_kernel.quantize_groups(x, column_scale)
    tokens, features = x.shape
    values = x.float() if column_scale is None else x.float() * column_scale
    padded = functional.pad(values, (0, -features % GROUP)).view(tokens, -1, GROUP)
    largest = padded.abs().amax(2) + (padded * 0.0).sum(2)  # (T, groups)
    inverse = torch.where(largest >= SMALLEST, torch.full_like(largest, LARGEST) / largest, 0.0)
    q = (padded * inverse[..., None]).nan_to_num(0.0).round().to(torch.int8)
    return q.view(tokens, -1)[:, :features].contiguous(), (largest / LARGEST).t().contiguous()


def grouped_product(
    q: Tensor,
    scales: Tensor,
    weight: Tensor,
    row_scale: Tensor | None,
    low: Tensor | None,
    b: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return row_scale * sum over groups of scales * (q weight^T within the group), plus low b^T.

    Args:
        q: (T, n) int8 and scales (groups, T), from `quantize_groups`.
        weight: (m, n) int8. row_scale: (m,) float32, or None for ones.
        low: (T, r) and b: (m, r), in `dtype`; None for nothing.

    Returns:
        (T, m) in `dtype`, rounded once from float32.
    """
    if q.is_cuda:
        from so8t_helpers.train import int8_kernel  # noqa: PLC0415

        return int8_kernel.grouped_product(q, scales, weight, row_scale, low, b, dtype)
    total = torch.zeros(len(q), len(weight), device=q.device)
    for group, scale in enumerate(scales):
        part = slice(group * GROUP, (group + 1) * GROUP)
        # Integers below 2^24 are exact in float32, and so is each sum of 128 products of two of 7 bits.
        total += scale[:, None] * (q[:, part].float() @ weight[:, part].float().t())
    if row_scale is not None:
        total *= row_scale
    if low is not None and b is not None:
        total += low.float() @ b.float().t()
    return total.to(dtype)


def turn(weight: Tensor) -> Tensor:
    """Return the transpose of weight (out, in) int8, written out."""
    if weight.is_cuda:
        from so8t_helpers.train import int8_kernel  # noqa: PLC0415

        return int8_kernel.turn(weight)
    return weight.t().contiguous()
