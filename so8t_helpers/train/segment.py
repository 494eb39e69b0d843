"""Half a decoder layer as the micro-step runs it: forward, kept, or again with gradients, in token tiles."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from so8t_helpers.train.frozen import FrozenWeight, TensorCoreWeight, hold
from so8t_helpers.train.layers import AdaptedLinear, LayerConfig, LayerTensors, Packed

# Of what a compiled layer would keep if memory were free; see `keeping_little`.
_KEPT_SHARE, _KEPT_BESIDE_INT8 = 0.7, 0.8


@dataclass
class Segment:
    """A piece of the model that maps (T, d) to (T, d), run in `tiles` equal parts of the tokens.

    Attributes:
        linears: names of the weights that it multiplies with, the one of its last product last.
        hold: dequantises one of them for several products, see `frozen.hold`.
    """

    function: Callable[..., Tensor]
    layer: LayerTensors
    config: LayerConfig
    tiles: int
    linears: tuple[str, ...]
    hold: Callable[..., FrozenWeight] = hold

    def __call__(self, x: Tensor, packed: Packed) -> Tensor:
        return self.function(x, self.layer, packed, self.config)

    def forward_only(self, x: Tensor, packed: Packed) -> Tensor:
        """Run without gradients, tile by tile."""
        if self.tiles == 1:
            return self(x, packed)
        out, layer = torch.empty_like(x), self._held_layer(x.dtype)
        for rows in self._tiles(x):
            out[rows] = self.function(x[rows], layer, _rows_of(packed, rows), self.config)
        return out

    def recompute_and_differentiate(self, x: Tensor, grad: Tensor, packed: Packed) -> Tensor:
        """Run again with gradients on and differentiate at once; `grad` becomes the gradient of x."""
        layer = self._held_layer(x.dtype)
        for rows in self._tiles(x):
            leaf = x[rows].detach().requires_grad_()
            with torch.enable_grad():
                out = self.function(leaf, layer, _rows_of(packed, rows), self.config, False)
            torch.autograd.backward(out, grad[rows])
            assert leaf.grad is not None
            if self.tiles == 1:
                return leaf.grad
            grad[rows] = leaf.grad
        return grad

    def _held_layer(self, dtype: torch.dtype) -> LayerTensors:
        """Dequantise a weight once for both directions and all tiles, at the real size 98 MiB (tiles: 147).

        The last product of a half is not run again: with one tile its weight is needed once.
        """
        held: dict[str, Any] = {}
        with torch.no_grad():
            for name in self.linears if self.tiles > 1 else self.linears[:-1]:
                linear: AdaptedLinear = getattr(self.layer, name)
                b = None if linear.lora is None else linear.lora.b
                weight = self.hold(linear.weight, b, self.config.lora_scale, dtype)
                held[name] = linear._replace(weight=weight)
        return self.layer._replace(**held)

    def _tiles(self, x: Tensor) -> list[slice]:
        size = len(x) // self.tiles
        return [slice(start, start + size) for start in range(0, len(x), size)]


def _rows_of(packed: Packed, rows: slice) -> Packed:
    """Narrow what depends on the token; bounds and positions stay, since only whole sequences attend."""
    return packed._replace(keys=packed.keys[rows])


def keeping_little(weight: FrozenWeight) -> AbstractContextManager[None]:
    """Let the compiler keep a share of what a backward pass reads, and compute the rest again.

    Products and attention are kept, norms, dropout and activation functions are not: 0.14 GiB a layer of the
    real size at 2,048 tokens instead of 0.42, so all 32 layers fit where 11 did (on 11 GiB, one H100: 22,600
    tokens/s; keeping less still, 21,100; recomputing all, 18,900; 0.8 of it in fewer layers, 21,000).
    Products of 8-bit numbers count as cheaper beside what they leave, and are kept from 0.8 on: 29,400
    tokens/s, where 0.7 runs one of them again (27,000) and 0.5 two (24,600).

    Args:
        weight: one of the layer's.
    """
    share = _KEPT_BESIDE_INT8 if isinstance(weight, TensorCoreWeight) else _KEPT_SHARE
    return functorch_config.patch(activation_memory_budget=share)
