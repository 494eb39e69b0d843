"""Which features of a linear's input stand apart, where activations are rounded to 8 bits (see `int8`).

In a real model a few features are tens of times as large as the middle one, for all tokens (Dettmers et al.
2022, LLM.int8, found so above 6 billion parameters; SmolLM2 has 135 million and shows it). One scale a token
costs SmolLM2 0.026 nats before training; with the 16 largest features apart 0.005, with 32 0.004 and after
training 0.002, with 64 0.003 (benchmarks/results/int8.json). One scale for 128 features, with nothing apart,
cost 0.008 and a third of the products' speed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from so8t_helpers.phi3.shape import LINEARS, rope_tables
from so8t_helpers.train.batches import Document, build_sequence
from so8t_helpers.train.frozen import Base, PlainWeight, TensorCoreWeight, dequantize, frozen_linear
from so8t_helpers.train.layers import (
    AdaptedLinear,
    LayerConfig,
    LayerTensors,
    Packed,
    attend,
    project_out,
    project_qkv,
    rms_norm,
)

APART = 32
_TOKENS = 2048  # that are looked at; which features are large hardly depends on the text


def keep_apart(base: Base, documents: Sequence[Document]) -> None:
    """Let the largest features of every input stand apart, as the first documents show them.

    Only weights that are multiplied as 8 bits change. The looking is one forward pass without LoRA and gates;
    it depends on base and documents alone, so a resumed training keeps the same features apart.
    """
    if not any(isinstance(weight, TensorCoreWeight) for weight in base.linears[0].values()):
        return
    for weights, largest in zip(base.linears, _largest(base, documents), strict=True):
        for name, weight in weights.items():
            assert isinstance(weight, TensorCoreWeight)
            weights[name] = weight.apart(largest[name].topk(min(APART, len(largest[name]))).indices)


@torch.no_grad()
def _largest(base: Base, documents: Sequence[Document]) -> list[dict[str, Tensor]]:
    """Largest absolute value of every feature of every linear's input, by layer and name: (in,)."""
    shape, length = base.shape, 0
    chosen: list[Document] = []
    for document in documents:
        if (room := _TOKENS - length) <= 0:
            break
        # What comes later changes nothing of what came before: a long document may be cut.
        chosen.append(Document(document.tokens[:room], document.targets[:room]))
        length += len(chosen[-1].tokens)
    sequence = build_sequence(chosen, length, 0, len(chosen))
    cos, sin = (t[sequence.positions.to(base.device)] for t in rope_tables(shape, length, base.device))
    none = torch.zeros((), dtype=torch.int32, device=base.device)
    packed = Packed(cos, sin, sequence.bounds.to(base.device), none)
    config = LayerConfig(shape, 1.0, 0.0, varlen=False, v_apart=False)
    x, found = base.embedding[sequence.tokens].to(base.device), []
    for weights, (norm1, norm2) in zip(base.linears, base.norms, strict=True):
        qkv, o, gate_up, down = (
            AdaptedLinear(PlainWeight(dequantize(weights[name], x.dtype)), None, none) for name in LINEARS
        )
        layer = LayerTensors(norm1, qkv, o, norm2, gate_up, down, None)
        mixed = attend(*project_qkv(x, layer, packed, config), packed.bounds, False).flatten(1)
        after = project_out(x, mixed, layer, packed, config)
        normed = rms_norm(after, norm2, shape.rms_eps)
        gated, up = frozen_linear(normed, gate_up.weight).chunk(2, dim=-1)
        inner = up * functional.silu(gated)
        inputs = (rms_norm(x, norm1, shape.rms_eps), mixed, normed, inner)  # in the order of LINEARS
        found.append({name: h.abs().amax(0).float() for name, h in zip(LINEARS, inputs, strict=True)})
        x = after + frozen_linear(inner, down.weight)
    return found
