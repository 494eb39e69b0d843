"""The proof of a bake: what baking changed, what rounding to 16 bits changed, and whether the bounds hold.

Three models see the same held-out texts, layer by layer: the gated one (activations rotated, LoRA next to the
weights), the baked one before rounding, and the one in the files, all with float64 activations: float32's own
noise would drown what is measured. Gated against baked is what baking costs; baked against rounded is what 16
bits cost, however the model was made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from so8t_helpers.bake import proof_model
from so8t_helpers.bake.rows import Change, bake_rows
from so8t_helpers.phi3.shape import logit_rows, o_proj_name, weight_name
from so8t_helpers.phi3.weights import TensorPlace
from so8t_helpers.run.progress import Progress
from so8t_helpers.so8 import rotation

SAMPLED_ROWS = 32
DECADES = np.arange(-10.0, 2.01, 0.25)  # edges of the histograms of |difference of logits|, log10


@torch.no_grad()
def prove(
    config: Any,
    base: Mapping[str, TensorPlace],
    changes: Mapping[str, Change],
    gates: rotation.Gates | None,
    stored: Mapping[str, TensorPlace],
    texts: list[list[int]],
    bar: Progress,
) -> dict[str, Any]:
    """Compare gated, baked and rounded model; returns the figures of proof.json without bounds.

    The gated model makes its own rotations from `gates`; `texts` are token ids, `bar` counts layers.
    """
    free = dict(zip(gates.layers, gates.free, strict=True)) if gates else {}
    layer = proof_model.ExactLayer(config)
    gated, rounded = proof_model.embed(texts, base), proof_model.embed(texts, stored)
    baked = gated.clone()
    layers: list[dict[str, Any]] = []
    weights: list[dict[str, Any]] = []
    for index in range(config.num_hidden_layers):
        linears = {weight_name(index, module): linear for module, linear in layer.linears.items()}
        o_proj = o_proj_name(index)
        layer.set_norms(index, base)
        change = {name: changes.get(name, Change()) for name in linears}
        for name, linear in linears.items():
            linear.gate(base[name], change[name], free.get(index) if name == o_proj else None)
        with _against_merged(linears[o_proj], base[o_proj], change[o_proj]) as alone:
            layer.run(gated)
        layers.append({"layer": index, **_rotation_facts(free.get(index)), **alone})
        for name, linear in linears.items():
            linear.merge(base[name], change[name])
        layer.run(baked)
        weights += [
            _weight_facts(index, name, base[name], changes[name], free.get(index), stored[name])
            for name in linears
            if name in changes
        ]
        layer.set_norms(index, stored)
        for name, linear in linears.items():
            linear.plain(stored[name])
        layer.run(rounded)
        bar.update(1)
    # Where a text ends, padding begins.
    valid = torch.arange(gated.shape[1]) < torch.tensor([len(ids) for ids in texts])[:, None]
    states = [hidden[valid] for hidden in (gated, baked, rounded)]  # (tokens, d) each
    return {
        "texts": len(texts),
        "tokens": sum(map(len, texts)),
        "gated_layers": sorted(free),
        **_logit_facts(proof_model.head(config, stored), config.vocab_size, *states),
        "layers": layers,
        "weights": weights,
    }


@contextmanager
def _against_merged(o_proj: nn.Module, place: TensorPlace, change: Change) -> Iterator[dict[str, float]]:
    """Send what the gated o_proj takes meanwhile through the baked one, too: this layer's error alone."""
    baked = proof_model.StreamedLinear()
    baked.merge(place, change)
    facts = {"o_proj_difference": 0.0, "o_proj_scale": 0.0}

    def compare(_: nn.Module, x: tuple[Tensor], y: Tensor) -> None:
        for key, values in (("o_proj_difference", baked(x[0]) - y), ("o_proj_scale", y)):
            facts[key] = _larger(facts[key], values.abs().max())

    handle = o_proj.register_forward_hook(compare)
    try:
        yield facts
    finally:
        handle.remove()


def _larger(so_far: float, found: Tensor) -> float:
    """The larger of both; NaN if one is, where Python's max would drop it and let a bound hold."""
    return float(torch.maximum(found, found.new_tensor(so_far)))


def _rotation_facts(free: Tensor | None) -> dict[str, float | None]:
    """Largest |R^T R - 1| and |det R - 1| over a layer's float32 rotations, measured in float64."""
    if free is None:
        return {"orthogonality": None, "determinant": None}
    blocks = rotation.rotation(free.double()).float().double()
    gram = blocks.transpose(-1, -2) @ blocks - torch.eye(rotation.BLOCK, dtype=torch.float64)
    return {
        "orthogonality": float(gram.abs().max()),
        "determinant": float((torch.linalg.det(blocks) - 1).abs().max()),
    }


def _weight_facts(
    index: int, name: str, base: TensorPlace, change: Change, free: Tensor | None, stored: TensorPlace
) -> dict[str, Any]:
    """||W' - (W + sBA) R|| / ||W|| on sampled rows, before and after rounding, against dense float64."""
    generator = torch.Generator().manual_seed(index)
    rows = torch.randperm(base.shape[0], generator=generator)[:SAMPLED_ROWS].tolist()
    weight = torch.cat([base.read(i, i + 1) for i in rows]).float()
    exact, lora = weight.double(), None
    if change.lora is not None:
        lora = change.lora.load().rows(rows)
        exact = exact + lora.scale * (lora.b.double() @ lora.a.double())
    if free is not None and name == o_proj_name(index):
        exact = exact @ torch.block_diag(*torch.matrix_exp(rotation.skew(free.double())))
    norm = weight.double().norm()
    written = torch.cat([stored.read(i, i + 1) for i in rows]).double()
    baked = bake_rows(weight, lora, change.blocks).double()
    return {
        "layer": index,
        "module": name.split(".")[-2],
        "baked_error": float((baked - exact).norm() / norm),
        "stored_error": float((written - exact).norm() / norm),
    }


def _logit_facts(
    head: nn.Module, vocabulary: int, gated: Tensor, baked: Tensor, rounded: Tensor
) -> dict[str, Any]:
    """Differences of logits of the three models, token agreement, and KL(baked || rounded) in nats.

    One head serves all three: baking passes the last norm and the head through byte for byte.
    """
    differences = {name: _Difference() for name in ("baking", "rounding", "both")}
    # Three models' logits and what is made of them, in float64, take some 16 times the bytes of one float32;
    # but each time the head is read anew, so there is a least.
    rows = max(32, logit_rows(vocabulary) // 8)
    scale, kl = 0.0, []
    for hidden in zip(*(model.split(rows) for model in (gated, baked, rounded)), strict=True):
        g, b, r = head(torch.cat(hidden)).chunk(3)  # (tokens, V) each
        differences["baking"].add(g, b)
        differences["rounding"].add(b, r)
        differences["both"].add(g, r)
        scale = max(scale, float(g.abs().max()))
        log_b, log_r = b.log_softmax(-1), r.log_softmax(-1)
        kl.append((log_b.exp() * (log_b - log_r)).sum(-1))
    return {
        "logits": {name: difference.facts() for name, difference in differences.items()},
        "logit_scale": scale,
        "rounding_kl_mean": float(torch.cat(kl).mean()),
        "histogram_edges_log10": DECADES.tolist(),
    }


class _Difference:
    """Gathers |x - y| over texts."""

    def __init__(self) -> None:
        self.largest, self.total, self.count = 0.0, 0.0, 0
        self.agreed, self.tokens = 0, 0
        self.histogram = np.zeros(len(DECADES) - 1, dtype=np.int64)

    def add(self, x: Tensor, y: Tensor) -> None:  # (T, V) each
        difference = (x - y).abs()
        self.largest = _larger(self.largest, difference.max())
        self.total += float(difference.sum(dtype=torch.float64))
        self.count += difference.numel()
        self.agreed += int((x.argmax(-1) == y.argmax(-1)).sum())
        self.tokens += len(x)
        # Equal logits fall into the lowest bin.
        decades = difference.clamp_(min=10 ** DECADES[0], max=10 ** DECADES[-1]).log10_().numpy()
        self.histogram += np.histogram(decades, bins=DECADES)[0]

    def facts(self) -> dict[str, Any]:
        return {
            "largest": self.largest,
            "mean": self.total / self.count,
            "next_token_agreement": self.agreed / self.tokens,
            "histogram": self.histogram.tolist(),
        }
