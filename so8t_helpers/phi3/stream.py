"""A Phi3 run one decoder layer at a time, so that its weights are never in memory together.

transformers' own Phi3DecoderLayer does the arithmetic, so what is measured is the weights, not another
implementation of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, Phi3Config
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer, Phi3RMSNorm, Phi3RotaryEmbedding

from so8t_helpers.phi3.shape import BLOCK, EMBEDDING, LAST_NORM, LINEAR_MODULES, TOP, gguf_block_name
from so8t_helpers.run.files import StageError

Read = Callable[[str], Tensor]  # gives a weight by its GGUF name
# Through a layer at once: 128 MiB of what gate_up_proj gives, in float64. The proof of a bake reads, merges
# and widens the whole layer again each time.
_TOKENS = 1024


def read_config(folder: Path) -> Phi3Config:
    """Return the configuration that transformers' layers take, set to torch's own attention.

    `shape.read_shape` is for code that does the arithmetic itself.

    Raises:
        StageError: if it is not a Phi3 model.
    """
    config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, Phi3Config):
        raise StageError(f"{folder / 'config.json'}: model_type {config.model_type!r}; only phi3 is read")
    config._attn_implementation = "sdpa"
    return config


class StreamedLayer:
    """One decoder layer without memory of its own, given the weights of one layer of a model after another.

    Texts begin at position 0 and are padded, if at all, right: a padded position comes after all others of
    its text, so the causal mask alone hides it from them. `module` is on the meta device until its weights
    are set.
    """

    def __init__(self, config: Phi3Config, device: str | torch.device = "cpu"):
        with torch.device("meta"):
            self.module = Phi3DecoderLayer(config, 0).eval()
        self.rotary, self.window = Phi3RotaryEmbedding(config).to(device), config.sliding_window

    def run(self, *hidden: Tensor) -> None:
        """Send batches of texts, (B, T, d) each, through the layer, a few texts at a time, in place."""
        for batch in hidden:
            position = torch.arange(batch.shape[1], device=batch.device)
            mask = None  # plain causal attention
            if self.window is not None and len(position) > self.window:
                distance = position[:, None] - position[None, :]
                mask = ((distance >= 0) & (distance < self.window))[None, None]
            rotary = self.rotary(batch, position[None])
            for x in batch.split(max(1, _TOKENS // len(position))):
                x.copy_(self.module(x, attention_mask=mask, position_embeddings=rotary))


@torch.no_grad()
def last_hidden(
    config: Phi3Config,
    read: Read,
    texts: Sequence[Sequence[int]],
    on_layer: Callable[[], None],
    observe: Callable[[str, Tensor], None] | None = None,
) -> Tensor:
    """Send texts (token ids, each alone) through all layers and the last norm. -> (all tokens, d) float32.

    `observe` is called with a linear's GGUF name and its input (tokens, in) for every text.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    embedding = read(TOP[EMBEDDING])
    hidden = [embedding[torch.tensor(ids)][None].to(device) for ids in texts]  # (1, T, d) each
    del embedding
    layer = StreamedLayer(config, device)
    names: dict[str, str] = {}  # of the layer at hand: module -> GGUF name
    if observe is not None:
        for module in LINEAR_MODULES.values():
            layer.module.get_submodule(module).register_forward_pre_hook(
                lambda _, inputs, module=module: observe(names[module], inputs[0][0])
            )
    for index in range(config.num_hidden_layers):
        names |= {module: gguf_block_name(index, module) for module in BLOCK}
        weights = {f"{module}.weight": read(name).to(device) for module, name in names.items()}
        layer.module.load_state_dict(weights, assign=True)
        layer.run(*hidden)
        on_layer()
    norm = Phi3RMSNorm(config.hidden_size, eps=config.rms_norm_eps).to(device)
    norm.weight.copy_(read(TOP[LAST_NORM]))
    return torch.cat([norm(x[0]) for x in hidden])
