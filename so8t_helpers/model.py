"""The frozen base model: read tensor by tensor from safetensors, quantised on the way."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from so8t_helpers.int8_linear import FrozenWeight, quantize
from so8t_helpers.phi3 import LINEARS, Phi3Shape
from so8t_helpers.settings import ModelSettings, SettingsError


def weight_reader(folder: Path) -> Callable[[str], Tensor]:
    """Return a function that reads one tensor by name from a folder's safetensors, single or sharded.

    Raises:
        SettingsError: no safetensors in the folder; on a call, a tensor that is not there.
    """
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.is_file():
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    elif single.is_file():
        with safe_open(single, framework="pt") as file:
            where = dict.fromkeys(file.keys(), single.name)
    else:
        raise SettingsError(f"{folder}: no model.safetensors and no index; only safetensors weights are read")

    def read(name: str) -> Tensor:
        if name not in where:
            raise SettingsError(f"{folder}: no tensor {name}; a Phi3 model has it, is this another one?")
        with safe_open(folder / where[name], framework="pt") as file:
            return file.get_tensor(name)

    return read


@dataclass
class Base:
    """A frozen Phi3: linears stored as the settings say, the rest in the compute dtype.

    Attributes:
        embedding: (vocab, d) on the host. One micro-step needs a few thousand rows of it; on the card the
            table of the real model would take 188 MiB for nothing.
        linears: one dict a layer, by the names in `LINEARS`.
        norms: (input norm, post-attention norm) of each layer, each (d,).
        final_norm: (d,). head: (vocab, d).
    """

    shape: Phi3Shape
    dtype: torch.dtype
    device: torch.device
    embedding: Tensor
    linears: list[dict[str, FrozenWeight]]
    norms: list[tuple[Tensor, Tensor]]
    final_norm: Tensor
    head: Tensor


def load_base(
    shape: Phi3Shape,
    read: Callable[[str], Tensor],
    settings: ModelSettings,
    device: torch.device,
    dtype: torch.dtype,
) -> Base:
    """Read a base model, one tensor at a time, so that the host never holds it whole.

    Args:
        read: gives a tensor by its name in the checkpoint, e.g. from `weight_reader`.
        dtype: compute dtype of all that is not quantised.
    """

    def move(name: str) -> Tensor:
        return read(name).to(device, dtype)

    def store(name: str) -> FrozenWeight:
        return quantize(read(name).to(device), settings.quantization, settings.int8_matmul, dtype)

    linears, norms = [], []
    for i in range(shape.num_layers):
        linears.append({name: store(f"{weight_path(i, name)}.weight") for name in LINEARS})
        layer = f"model.layers.{i}"
        norms.append(
            (move(f"{layer}.input_layernorm.weight"), move(f"{layer}.post_attention_layernorm.weight"))
        )
    embedding = read("model.embed_tokens.weight").to("cpu", dtype)
    head = "model.embed_tokens.weight" if shape.tie_embeddings else "lm_head.weight"
    return Base(shape, dtype, device, embedding, linears, norms, move("model.norm.weight"), move(head))


def weight_path(layer: int, linear: str) -> str:
    """Return the module path of a linear in a Phi3 checkpoint: "model.layers.3.self_attn.o_proj"."""
    part = "self_attn" if linear in {"qkv_proj", "o_proj"} else "mlp"
    return f"model.layers.{layer}.{part}.{linear}"
