"""A forward pass that holds one decoder layer at a time, in float32, for models that memory cannot hold.

transformers' own Phi3DecoderLayer does the arithmetic. The gated variant does what training does: it turns
the activations and adds the LoRA branch; it shares no code with the baking it judges.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, Phi3Config
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer, Phi3RMSNorm, Phi3RotaryEmbedding

from so8t_helpers import rotation
from so8t_helpers.checkpoint import TensorPlace
from so8t_helpers.run_folder import StageError

EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"


class GatedLinear(nn.Module):
    """y = W R x + s·B·A R x: the gate stands before the linear and its LoRA; either may be missing."""

    def __init__(self, weight: Tensor, lora: tuple[Tensor, Tensor, float] | None, blocks: Tensor | None):
        super().__init__()
        self.weight, self.lora, self.blocks = weight, lora, blocks

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        if self.blocks is not None:
            x = rotation.rotate(x, self.blocks)
        y = functional.linear(x, self.weight)
        if self.lora is not None:
            a, b, scale = self.lora
            y = y + scale * functional.linear(functional.linear(x, a), b)
        return y


def read_config(folder: Path) -> Phi3Config:
    """Return a model folder's configuration, set to plain attention.

    Raises:
        StageError: if it is not a Phi3 model.
    """
    config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, Phi3Config):
        raise StageError(f"{folder / 'config.json'}: model_type {config.model_type!r}; only phi3 is baked")
    config._attn_implementation = "eager"
    return config


def empty_layer(config: Phi3Config, index: int) -> Phi3DecoderLayer:
    """Return a decoder layer without memory for its weights."""
    with torch.device("meta"):
        return Phi3DecoderLayer(config, index).eval()


def fill_layer(layer: nn.Module, index: int, weights: Mapping[str, TensorPlace]) -> None:
    """Read a layer's weights as float32, over those that it has."""
    for name, parameter in layer.named_parameters():
        place = weights[f"model.layers.{index}.{name}"]
        if parameter.is_meta:
            module, _, leaf = name.rpartition(".")
            layer.get_submodule(module).register_parameter(
                leaf, nn.Parameter(torch.empty(place.shape), requires_grad=False)
            )
        read_float32(place, layer.get_parameter(name))


def read_float32(place: TensorPlace, out: Tensor) -> Tensor:
    """Read a tensor into `out`, a few rows at a time, so that the 16-bit copy stays small."""
    for start in range(0, place.shape[0], 1024):
        stop = min(start + 1024, place.shape[0])
        out[start:stop] = place.read(start, stop)
    return out


def embed(ids: list[int], weights: Mapping[str, TensorPlace]) -> Tensor:
    """Look tokens up, row by row on disk. -> (1, T, d) float32."""
    place = weights[EMBEDDING]
    return torch.cat([place.read(i, i + 1) for i in ids]).float()[None]


class Positions:
    """Rotary tables and attention masks for texts that stand alone (batch 1, no padding)."""

    def __init__(self, config: Phi3Config):
        self.rotary, self.window = Phi3RotaryEmbedding(config), config.sliding_window

    def arguments(self, x: Tensor) -> dict[str, Any]:
        """Return what a decoder layer needs beside x (1, T, d)."""
        position = torch.arange(x.shape[1])
        distance = position[:, None] - position[None, :]
        seen = distance >= 0
        if self.window is not None:
            seen &= distance < self.window
        mask = torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(torch.float32).min)
        return {
            "attention_mask": mask[None, None],
            "position_embeddings": self.rotary(x, position[None]),
        }


def run_layer(layer: nn.Module, hidden: list[Tensor], positions: Positions) -> list[Tensor]:
    """Send every text through one layer. hidden: one (1, T, d) a text."""
    return [layer(x, **positions.arguments(x)) for x in hidden]


class Head:
    """The last norm and the output projection. Call it with (1, T, d) -> logits (T, V) float32."""

    def __init__(self, config: Phi3Config, weights: Mapping[str, TensorPlace]):
        self.norm = Phi3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.norm.weight = nn.Parameter(weights["model.norm.weight"].read().float(), requires_grad=False)
        place = weights.get(_HEAD, weights[EMBEDDING])
        self.weight = read_float32(place, torch.empty(place.shape))

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(self.norm(x[0]), self.weight)


def linears(layer: nn.Module, index: int) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield (weight's name in the checkpoint, parent module, attribute) of a layer's four linears."""
    for name, module in list(layer.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            yield f"model.layers.{index}.{name}.weight", layer.get_submodule(parent), leaf
