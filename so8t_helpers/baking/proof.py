"""The proof of a bake: what baking changed, what rounding to 16 bits changed, and whether the bounds hold.

Three models see the same held-out texts, layer by layer: the gated one (activations turned, LoRA beside the
weights), the baked one before rounding, and the one in the files, all computed in float32. Gated against
baked is what baking costs; baked against rounded is what 16 bits cost, however the model was made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from so8t_helpers import rotation
from so8t_helpers.baking import layerwise
from so8t_helpers.baking.stream import Change, bake_rows, o_proj_name
from so8t_helpers.checkpoint import TensorPlace
from so8t_helpers.progress import Progress

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

    Args:
        config: of the base.
        base, stored: tensors of the base and of the files just written.
        changes: what was baked.
        gates: the trained gates, from which the gated model makes its own rotations.
        texts: token ids of each held-out text.
        bar: counts layers.
    """
    gate_rows = dict(zip(gates.layers, gates.free, strict=True)) if gates else {}
    positions = layerwise.Positions(config)
    gated = [layerwise.embed(ids, base) for ids in texts]
    baked, rounded = gated, [layerwise.embed(ids, stored) for ids in texts]
    layers: list[dict[str, Any]] = []
    weights: list[dict[str, Any]] = []
    for index in range(config.num_hidden_layers):
        layer = layerwise.empty_layer(config, index)
        layerwise.fill_layer(layer, index, base)
        free = gate_rows.get(index)
        seen = _attach(layer, index, changes, free)
        gated = layerwise.run_layer(layer, gated, positions)
        _merge(layer, index, changes)
        layers.append({"layer": index, **_rotation_facts(free), **_o_proj_facts(layer, seen)})
        baked = layerwise.run_layer(layer, baked, positions)
        weights += [
            _weight_facts(index, name, base[name], changes[name], free, stored[name])
            for name, _, _ in layerwise.linears(layer, index)
            if name in changes
        ]
        layerwise.fill_layer(layer, index, stored)
        rounded = layerwise.run_layer(layer, rounded, positions)
        bar.update(1)
    del layer
    return {
        "texts": len(texts),
        "tokens": sum(map(len, texts)),
        "gated_layers": sorted(gate_rows),
        **_logit_facts(layerwise.Head(config, stored), gated, baked, rounded),
        "layers": layers,
        "weights": weights,
    }


def _attach(
    layer: nn.Module, index: int, changes: Mapping[str, Change], free: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """Put the gated linears in place; what o_proj takes and gives is kept in the list returned."""
    for name, parent, leaf in layerwise.linears(layer, index):
        change = changes.get(name, Change())
        lora = (*change.lora.load(), change.lora.scale) if change.lora else None
        blocks = rotation.rotation(free) if free is not None and name == o_proj_name(index) else None
        linear = getattr(parent, leaf)
        setattr(parent, leaf, layerwise.GatedLinear(linear.weight, lora, blocks))
    seen: list[tuple[Tensor, Tensor]] = []
    layer.self_attn.o_proj.register_forward_hook(lambda _, x, y: seen.append((x[0], y)))  # type: ignore[union-attr]
    return seen


def _merge(layer: nn.Module, index: int, changes: Mapping[str, Change]) -> None:
    """Turn the gated linears into plain ones, by the arithmetic of the bake before its rounding."""
    for name, module in list(layer.named_modules()):
        if isinstance(module, layerwise.GatedLinear):
            change = changes.get(f"model.layers.{index}.{name}.weight", Change())
            for start in range(0, len(module.weight), 256):
                rows = module.weight[start : start + 256]
                lora = module.lora and (module.lora[1][start : start + 256], *module.lora[::2])
                rows.copy_(bake_rows(rows, lora, change.blocks))
            rows_out, columns_in = module.weight.shape
            plain = nn.Linear(columns_in, rows_out, bias=False, device="meta")
            plain.weight = nn.Parameter(module.weight, requires_grad=False)
            parent, _, leaf = name.rpartition(".")
            setattr(layer.get_submodule(parent), leaf, plain)


def _o_proj_facts(layer: nn.Module, seen: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Send what the gated o_proj took through the baked one: this layer's error alone."""
    o_proj = layer.self_attn.o_proj  # type: ignore[union-attr]
    return {
        "o_proj_difference": max(float((o_proj(x) - y).abs().max()) for x, y in seen),  # type: ignore[operator]
        "o_proj_scale": max(float(y.abs().max()) for _, y in seen),
    }


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
        a, b = change.lora.load()
        lora = (b[rows], a, change.lora.scale)
        exact = exact + change.lora.scale * (b[rows].double() @ a.double())
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
    head: layerwise.Head, gated: list[Tensor], baked: list[Tensor], rounded: list[Tensor]
) -> dict[str, Any]:
    """Differences of logits of the three models, token agreement, and KL(baked || rounded) in nats.

    One head serves all three: baking passes the last norm and the head through byte for byte.
    """
    pairs = {"baking": _Difference(), "rounding": _Difference(), "both": _Difference()}
    scale, kl = 0.0, []
    for hidden in zip(gated, baked, rounded, strict=True):
        g, b, r = (head(x) for x in hidden)
        pairs["baking"].add(g, b)
        pairs["rounding"].add(b, r)
        pairs["both"].add(g, r)
        scale = max(scale, float(g.abs().max()))
        log_b, log_r = b.log_softmax(-1), r.log_softmax(-1)
        kl.append((log_b.exp() * (log_b - log_r)).sum(-1))
    return {
        "logits": {name: difference.facts() for name, difference in pairs.items()},
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
        self.largest = max(self.largest, float(difference.max()))
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
