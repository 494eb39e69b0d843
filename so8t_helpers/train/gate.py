"""The SO8T gate as training applies it: on activations, with a backward pass that costs one small product."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from so8t_helpers.so8.rotation import BLOCK, side_by_side

# Features multiplied together: eight blocks side by side, seven eighths of it zeros. Wasteful on paper, and
# ten times as fast as thousands of 8x8 products.
_GROUP = 64
_TRITON = importlib.util.find_spec("triton") is not None


class _Gate(torch.autograd.Function):
    """R x; backward: R^T on the gradient, and the sum over tokens of dy x^T, block by block."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, blocks: Tensor) -> Tensor:
        ctx.save_for_backward(x, blocks)
        if _has_kernel(x):
            from so8t_helpers.train import gate_kernel  # noqa: PLC0415  (Triton is not everywhere)

            return gate_kernel.rotate(x, blocks)
        return _rotate_groups(x, blocks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, blocks = ctx.saved_tensors
        if _has_kernel(x):
            from so8t_helpers.train import gate_kernel  # noqa: PLC0415

            return gate_kernel.rotate_backward(grad, x, blocks)
        return _rotate_groups(grad, blocks.transpose(-1, -2)), _outer(grad, x)


def gate(x: Tensor, blocks: Tensor) -> Tensor:
    """Apply a gate: y_b = R_b x_b, with float32 sums, returned in x's dtype.

    16-bit activations on a card take `gate_kernel`'s kernels where Triton is installed, anything else
    matrix products.

    Args:
        x: (T, d) activations.
        blocks: (d/8, 8, 8) float32 rotations; their gradient is float32.
    """
    return _Gate.apply(x, blocks)


def _has_kernel(x: Tensor) -> bool:
    small = x.dtype in {torch.float16, torch.bfloat16}
    return _TRITON and x.is_cuda and small and x.shape[-1] % _GROUP == 0


def _rotate_groups(x: Tensor, blocks: Tensor) -> Tensor:
    groups = x.float().unflatten(-1, (-1, _group(x))).transpose(0, 1)  # (d/group, T, group)
    rotated = groups @ side_by_side(blocks, _group(x)).transpose(-1, -2)
    return rotated.transpose(0, 1).flatten(-2).to(x.dtype)


def _group(x: Tensor) -> int:
    return _GROUP if x.shape[-1] % _GROUP == 0 else BLOCK


def _outer(grad: Tensor, x: Tensor) -> Tensor:
    """Sum over tokens of grad_b x_b^T. grad, x (T, d) -> (d/8, 8, 8) float32."""
    group = _group(x)
    left = grad.unflatten(-1, (-1, group)).permute(1, 2, 0)  # (d/group, group, T)
    right = x.unflatten(-1, (-1, group)).permute(1, 0, 2)  # (d/group, T, group)
    if x.is_cuda and x.dtype != torch.float32:
        products = torch.bmm(left, right, out_dtype=torch.float32)
    else:
        products = torch.bmm(left.float(), right.float())
    count = group // BLOCK
    blocks = products.view(-1, count, BLOCK, count, BLOCK).diagonal(dim1=1, dim2=3)  # (d/group, 8, 8, count)
    return blocks.permute(0, 3, 1, 2).reshape(-1, BLOCK, BLOCK)
