"""What every pass that holds one Phi3 decoder layer at a time needs: the layer, and what it takes beside x.

transformers' own Phi3DecoderLayer does the arithmetic, so what is measured is the weights, not another
implementation of the model. The proof of a bake fills it with rows straight from the shards, in float64; the
measurements of GGUF files fill it with dequantised float32 weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, Phi3Config
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer, Phi3RMSNorm, Phi3RotaryEmbedding

from so8t_helpers.phi3.shape import BLOCK
from so8t_helpers.run.files import StageError

Read = Callable[[str], Tensor]


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


class LayerArguments(nn.Module):
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


LINEARS = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")

Observe = Callable[[str, Tensor], None]


def best_device() -> torch.device:
    """Return the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def last_hidden(
    config: Phi3Config,
    read: Read,
    texts: Sequence[Sequence[int]],
    on_layer: Callable[[], None],
    observe: Observe | None = None,
) -> Tensor:
    """Send texts through all layers and the last norm. -> (tokens of all texts, d) float32.

    Args:
        read: gives a weight by its GGUF name.
        texts: token ids; each text stands alone.
        on_layer: called after every layer.
        observe: called with a linear's GGUF name and its input (tokens, in) for every text.
    """
    device = best_device()
    embedding = read("token_embd.weight")
    hidden = [embedding[torch.tensor(ids)][None].to(device) for ids in texts]  # (1, T, d) each
    del embedding
    arguments, layer = LayerArguments(config).to(device), empty_layer(config)
    current = 0
    if observe is not None:
        for module, part in BLOCK.items():
            if part in LINEARS:
                layer.get_submodule(module).register_forward_pre_hook(
                    lambda _, inputs, part=part: observe(f"blk.{current}.{part}.weight", inputs[0][0])
                )
    for current in range(config.num_hidden_layers):
        weights = {
            f"{module}.weight": read(f"blk.{current}.{part}.weight").to(device)
            for module, part in BLOCK.items()
        }
        layer.load_state_dict(weights, assign=True)
        hidden = [layer(x, **arguments(x)) for x in hidden]
        on_layer()
    norm = Phi3RMSNorm(config.hidden_size, eps=config.rms_norm_eps).to(device)
    norm.weight.copy_(read("output_norm.weight"))
    return torch.cat([norm(x[0]) for x in hidden])


def output_weight(config: Phi3Config, read: Read) -> Tensor:
    """Return the output projection (vocabulary, d), the embedding where they are tied."""
    name = "token_embd.weight" if config.tie_word_embeddings else "output.weight"
    return read(name).to(best_device())


def log_probabilities(hidden: Tensor, output: Tensor) -> Tensor:
    """Hidden (n, d) -> natural-log probabilities of the next token (n, vocabulary)."""
    return functional.log_softmax(functional.linear(hidden, output), dim=-1)
