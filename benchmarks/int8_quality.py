"""What 8-bit products cost in exactness: every linear of SmolLM2 on real activations, and the held-out loss.

In float32, against products in float64 with the same int8 rows: so what is seen is the rounding of
activations and gradients alone, and for `bf16` that of weight-only products.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from real_model_gpu import settings_of
from torch import Tensor
from torch.nn import functional

from so8t_helpers.phi3.shape import LINEARS, read_shape, rope_tables
from so8t_helpers.phi3.source import base_folder
from so8t_helpers.phi3.tokenizer_files import load_tokenizer
from so8t_helpers.phi3.weights import weight_reader
from so8t_helpers.run.files import read_jsonl
from so8t_helpers.settings import merge
from so8t_helpers.train import batches, layers, outliers
from so8t_helpers.train.frozen import (
    Base,
    FrozenWeight,
    TensorCoreWeight,
    dequantize,
    frozen_linear,
    load_base,
    quantize,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# name -> (int8_matmul, features that stand apart)
PRODUCTS: dict[str, tuple[str, int]] = {
    "weight_only": ("weight_only", 0),
    "tensor_core": ("tensor_core", outliers.APART),
    "tensor_core, 64 features apart": ("tensor_core", 64),
    "tensor_core, 16 features apart": ("tensor_core", 16),
    "tensor_core, none apart": ("tensor_core", 0),
}


def load(root: Path, int8_matmul: str, apart: int = 0, quantization: str = "int8") -> Base:
    """SmolLM2 in float32, linears as asked for; what stands apart is what the first records show."""
    settings = settings_of(root, "int8-quality", 1e-3, {})
    settings = merge(settings, {"model": {"int8_matmul": int8_matmul, "quantization": quantization}})
    folder = base_folder(settings)
    base = load_base(read_shape(folder), weight_reader(folder), settings.model, DEVICE, torch.float32)
    if apart:
        rows = read_jsonl(root / "runs" / "smollm2" / "01_dataset" / "train.jsonl")[:20]
        with patch.object(outliers, "APART", apart):
            outliers.keep_apart(base, batches.tokenize(rows, load_tokenizer(folder), 2048))
    return base


def held_out(root: Path, length: int, count: int) -> list[batches.PackedSequence]:
    """Held-out records of GSM8K, packed into so many sequences, with the answers as targets."""
    folder = base_folder(settings_of(root, "int8-quality", 1e-3, {}))
    rows = read_jsonl(root / "runs" / "smollm2" / "01_dataset" / "eval.jsonl")
    groups: list[list[batches.Document]] = [[]]
    for sample in batches.tokenize(rows, load_tokenizer(folder), length):
        if sum(len(s.tokens) for s in groups[-1]) + len(sample.tokens) > length:
            groups.append([])
        groups[-1].append(sample)
    most = max(map(len, groups))
    return [batches.build_sequence(group, length, 0, most) for group in groups[:count]]


def loss(base: Base, sequence: batches.PackedSequence) -> Tensor:
    """Cross-entropy of each of a sequence's targets, without LoRA and gates: (targets,)."""
    shape, zero = base.shape, torch.zeros((), dtype=torch.int32)
    config = layers.LayerConfig(shape, 1.0, 0.0, varlen=False, v_apart=False)
    positions, bounds, targets = (
        t.to(DEVICE) for t in (sequence.positions, sequence.bounds, sequence.targets)
    )
    cos, sin = (table[positions] for table in rope_tables(shape, len(sequence.tokens), DEVICE))
    packed = layers.Packed(cos, sin, bounds, zero)
    x = base.embedding[sequence.tokens].to(DEVICE)
    for linears, (norm1, norm2) in zip(base.linears, base.norms, strict=True):
        qkv, o, gate_up, down = (layers.AdaptedLinear(linears[name], None, zero) for name in LINEARS)
        layer = layers.LayerTensors(norm1, qkv, o, norm2, gate_up, down, None)
        x = layers.mlp_half(layers.attention_half(x, layer, packed, config), layer, packed, config)
    counted = targets != batches.IGNORE
    logits = layers.rms_norm(x[counted], base.final_norm, shape.rms_eps) @ base.head.t()
    return functional.cross_entropy(logits, targets[counted], reduction="none")


def losses(root: Path, length: int, count: int) -> dict[str, Any]:
    """The base's mean loss over held-out targets, for each product, and how far it is off weight_only's.

    The standard error of that difference takes each target for one observation.
    """
    sequences, each = held_out(root, length, count), {}
    for name, (int8_matmul, apart) in PRODUCTS.items():
        base = load(root, int8_matmul, apart)
        with torch.no_grad():
            each[name] = torch.cat([loss(base, sequence) for sequence in sequences]).double()
    found: dict[str, Any] = {name: values.mean().item() for name, values in each.items()}
    for name in list(each)[1:]:
        off = each[name] - each["weight_only"]
        error = off.std().item() / len(off) ** 0.5
        found[f"{name}, off"] = {"mean": off.mean().item(), "standard error": error}
    return found | {"targets": len(off)}


def linears(root: Path, length: int) -> dict[str, Any]:
    """Relative errors of all linears' products and input gradients, by kind of linear: mean and worst.

    Of a product in 16 bits, of one in 8 with and without features apart, and of LLM.int8's (whose gradient is
    weight-only, and ours has nothing apart).
    """
    base, (sequence,) = load(root, "weight_only", 0, "none"), held_out(root, length, 1)
    chosen = load(root, "tensor_core", outliers.APART)
    features = [weight.features for layer in chosen.linears for weight in layer.values()]
    seen: list[tuple[Tensor, Any, Tensor]] = []

    def recorded(x: Tensor, weight: Any) -> Tensor:
        x = x if x.requires_grad else x.requires_grad_()
        y = frozen_linear(x, weight)
        y.retain_grad()
        seen.append((x.detach(), weight, y))
        return y

    with patch.object(layers, "frozen_linear", recorded):
        loss(base, sequence).sum().backward()
    errors: dict[str, dict[str, list[float]]] = {}
    for index, (x, weight, y) in enumerate(seen):
        place = errors.setdefault(LINEARS[index % len(LINEARS)], {})
        assert y.grad is not None
        for name, error in product_errors(
            x, y.grad, dequantize(weight, torch.float32), features[index]
        ).items():
            place.setdefault(name, []).append(error)
    return {
        linear: {
            name: {"mean": round(sum(values) / len(values), 5), "worst": round(max(values), 5)}
            for name, values in found.items()
        }
        for linear, found in errors.items()
    }


def product_errors(x: Tensor, grad: Tensor, weight: Tensor, features: Tensor) -> dict[str, float]:
    """Relative errors of one linear. x (T, in), grad (T, out), weight (out, in) float32, features apart."""
    kept = grad.abs().amax(1) > 0  # padding and the last layer's prompts have no gradient
    exact = dequantize(quantize(weight, "int8"), torch.float64)
    wanted, wanted_grad = x.double() @ exact.t(), grad[kept].double() @ exact

    def pair(stored: FrozenWeight, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
        leaf = x.to(dtype, copy=True).requires_grad_()
        y = frozen_linear(leaf, stored)
        y.backward(grad.to(dtype))
        assert leaf.grad is not None
        return relative(y, wanted), relative(leaf.grad[kept], wanted_grad)

    together = quantize(weight, "int8", "tensor_core")
    assert isinstance(together, TensorCoreWeight)
    found = {}
    found["bf16"], found["bf16, gradient"] = pair(quantize(weight, "int8"), torch.bfloat16)
    found["tensor_core"], found["tensor_core, gradient"] = pair(together.apart(features))
    found["none apart"], _ = pair(together)
    found["LLM.int8"], _ = pair(quantize(weight, "int8", "llm_int8"))
    return found


def relative(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm."""
    return ((found.double() - exact).norm() / exact.norm()).item()
