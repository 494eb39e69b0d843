"""A forward pass that holds one decoder layer at a time, in float32, for models that memory cannot hold.

transformers' own Phi3DecoderLayer does the arithmetic. The gated variant does what training does: it turns
the activations and adds the LoRA branch; it shares no code with the baking it judges.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    """y = W R x + s·B·A R x: the gate stands before the linear and its LoRA; both may be None.

    Attributes:
        weight: (out, in). lora: (A (r, in), B (out, r), s). blocks: (in/8, 8, 8).
    """

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape), requires_grad=False)
        self.lora: tuple[Tensor, Tensor, float] | None = None
        self.blocks: Tensor | None = None

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


class LayerSlot:
    """One decoder layer's memory, filled with the weights of one layer after another.

    Attributes:
        linears: the four gated linears by their names within the layer ("self_attn.o_proj").
    """

    def __init__(self, config: Phi3Config):
        with torch.device("meta"):
            self.layer = Phi3DecoderLayer(config, 0).eval()
        self.linears: dict[str, GatedLinear] = {}
        for name, module in list(self.layer.named_modules()):
            if isinstance(module, nn.Linear):
                parent, _, leaf = name.rpartition(".")
                self.linears[name] = GatedLinear(tuple(module.weight.shape))
                setattr(self.layer.get_submodule(parent), leaf, self.linears[name])
        self.layer.to_empty(device="cpu")

    def fill(self, index: int, weights: Mapping[str, TensorPlace]) -> None:
        """Read the weights of layer `index` as float32, without LoRA and gates."""
        for name, parameter in self.layer.named_parameters():
            read_float32(weights[f"model.layers.{index}.{name}"], parameter.data)
        for linear in self.linears.values():
            linear.lora = linear.blocks = None

    def run(self, hidden: list[Tensor], positions: Positions) -> None:
        """Send every text through the layer; `hidden` holds one (1, T, d) a text and is changed in place."""
        for i, x in enumerate(hidden):
            hidden[i] = self.layer(x, **positions.arguments(x))


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


class Head:
    """The last norm and the output projection. Call it with (1, T, d) -> logits (T, V) float32."""

    def __init__(self, config: Phi3Config, weights: Mapping[str, TensorPlace]):
        self.norm = Phi3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.norm.weight = nn.Parameter(weights["model.norm.weight"].read().float(), requires_grad=False)
        place = weights.get(_HEAD, weights[EMBEDDING])
        self.weight = read_float32(place, torch.empty(place.shape))

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(self.norm(x[0]), self.weight)
