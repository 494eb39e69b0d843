"""A Phi3 forward pass that holds one decoder layer at a time, in float32, over weights by GGUF name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Phi3Config
from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm

from so8t_helpers.gguf_export.layout import BLOCK
from so8t_helpers.gguf_export.weights import Read
from so8t_helpers.layer_stream import Beside, empty_layer

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
    beside, layer = Beside(config).to(device), empty_layer(config)
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
        hidden = [layer(x, **beside(x)) for x in hidden]
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
