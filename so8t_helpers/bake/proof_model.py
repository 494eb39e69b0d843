"""The forward pass of the proof: float64, one decoder layer at a time, weights straight from the shards.

In float32 the noise of 32 layers alone moves logits by more than a bake may, so everything here is float64,
where that noise is nine digits smaller. Weights are exact in it; a few rows at a time are read, widened, used
and forgotten, so no layer is ever whole in memory. The gated variant does what training does: it rotates the
activations and adds the LoRA branch; it shares no code with the baking it judges.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Phi3Config

from so8t_helpers.bake.rows import Change, bake_rows
from so8t_helpers.phi3.lora_folder import LoraUpdate
from so8t_helpers.phi3.shape import BLOCK, EMBEDDING, HEAD, LAST_NORM, weight_name
from so8t_helpers.phi3.stream import StreamedLayer
from so8t_helpers.phi3.weights import TensorPlace
from so8t_helpers.so8 import rotation

_WEIGHTS = 2**22  # numbers of a weight at once: 32 MiB in float64


class StreamedLinear(nn.Module):
    """A linear layer whose weight stays on disk; one of three models, see `plain`, `gate` and `merge`."""

    place: TensorPlace
    lora: LoraUpdate | None
    blocks: Tensor | None
    merged: Change

    def plain(self, place: TensorPlace) -> None:
        """Y = W x, as the file has it."""
        self.place, self.lora, self.blocks, self.merged = place, None, None, Change()

    def gate(self, place: TensorPlace, change: Change, free: Tensor | None) -> None:
        """Y = W R x + s·B·A R x, as in training: R comes from the gate's own numbers, (d/8, 28) or None."""
        self.plain(place)
        if change.lora is not None:
            lora = change.lora.load()
            self.lora = LoraUpdate(lora.a.double(), lora.b.double(), lora.scale)
        self.blocks = None if free is None else rotation.rotation(free.double())

    def merge(self, place: TensorPlace, change: Change) -> None:
        """Y = W' x, with the bake's own float32 arithmetic before its rounding."""
        self.plain(place)
        self.merged = change

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out), float64
        if self.blocks is not None:
            x = rotation.rotate(x, self.blocks)
        lora = self.merged.lora.load() if self.merged.lora else None
        tokens = x.flatten(0, -2)  # (n, in)
        y = x.new_empty(len(tokens), self.place.shape[0])
        step = min(y.shape[1], max(1, _WEIGHTS // x.shape[-1]))
        wide = x.new_empty(step, x.shape[-1])
        for start in range(0, y.shape[1], step):
            stop = min(start + step, y.shape[1])
            rows = self.place.read(start, stop)
            if self.merged.lora is not None or self.merged.blocks is not None:
                rows = bake_rows(rows.float(), lora and lora.rows(slice(start, stop)), self.merged.blocks)
            weight = wide[: stop - start].copy_(rows)
            torch.mm(tokens, weight.T, out=y[:, start:stop])
        if self.lora is not None:
            y.addmm_(functional.linear(tokens, self.lora.a), self.lora.b.T, alpha=self.lora.scale)
        return y.unflatten(0, x.shape[:-1])


class ExactLayer(StreamedLayer):
    """A decoder layer in float64; `linears` has its four by name within it ("self_attn.o_proj")."""

    def __init__(self, config: Phi3Config):
        super().__init__(config)
        modules = self.module.named_modules()
        self.linears = {name: StreamedLinear() for name, module in modules if isinstance(module, nn.Linear)}
        # transformers' own norms go through float32
        self._norms = {name: _norm(config) for name in BLOCK if name not in self.linears}
        for name, module in (self.linears | self._norms).items():
            self.module.set_submodule(name, module)

    def set_norms(self, index: int, weights: Mapping[str, TensorPlace]) -> None:
        """Read the norms of layer `index`."""
        for name, norm in self._norms.items():
            norm.weight.data = weights[weight_name(index, name)].read().double()


def head(config: Phi3Config, weights: Mapping[str, TensorPlace]) -> nn.Sequential:
    """The last norm and the output projection: (n, d) -> logits (n, V), float64."""
    norm, linear = _norm(config), StreamedLinear()
    norm.weight.data = weights[LAST_NORM].read().double()
    linear.plain(weights.get(HEAD, weights[EMBEDDING]))
    return nn.Sequential(norm, linear)


def embed(texts: list[list[int]], weights: Mapping[str, TensorPlace]) -> Tensor:
    """Look tokens up, row by row on disk. -> (B, T, d) float64, padded right with zeros."""
    place = weights[EMBEDDING]
    hidden = torch.zeros(len(texts), max(map(len, texts)), place.shape[1], dtype=torch.float64)
    for text, ids in zip(hidden, texts, strict=True):
        for position, index in enumerate(ids):
            text[position] = place.read(index, index + 1)[0]
    return hidden


def _norm(config: Phi3Config) -> nn.RMSNorm:
    return nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=torch.float64)
