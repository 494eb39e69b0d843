"""What every pass that holds one Phi3 decoder layer at a time needs: the layer, and what it takes beside x.

transformers' own Phi3DecoderLayer does the arithmetic, so what is measured is the weights, not another
implementation of the model. The proof of a bake fills it with rows straight from the shards, in float64; the
measurements of GGUF files fill it with dequantised float32 weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, Phi3Config
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer, Phi3RotaryEmbedding

from so8t_helpers.run_folder import StageError


def read_config(folder: Path) -> Phi3Config:
    """Return a model folder's configuration, set to torch's own attention.

    Raises:
        StageError: if it is not a Phi3 model.
    """
    config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, Phi3Config):
        raise StageError(f"{folder / 'config.json'}: model_type {config.model_type!r}; only phi3 is read")
    config._attn_implementation = "sdpa"
    return config


def empty_layer(config: Phi3Config) -> Phi3DecoderLayer:
    """Return a decoder layer without memory, to be given weights."""
    with torch.device("meta"):
        return Phi3DecoderLayer(config, 0).eval()


class Beside(nn.Module):
    """Rotary tables and attention masks for texts that begin at position 0 and are padded, if at all, right.

    A padded position comes after all others of its text, so the causal mask alone hides it from them.
    """

    def __init__(self, config: Phi3Config):
        super().__init__()
        self.rotary, self.window = Phi3RotaryEmbedding(config), config.sliding_window

    def forward(self, x: Tensor) -> dict[str, Any]:
        """Return the arguments of a decoder layer beside x (B, T, d)."""
        length = x.shape[1]
        position = torch.arange(length, device=x.device)
        mask = None  # plain causal attention
        if self.window is not None and length > self.window:
            distance = position[:, None] - position[None, :]
            mask = ((distance >= 0) & (distance < self.window))[None, None]
        return {"attention_mask": mask, "position_embeddings": self.rotary(x, position[None])}
