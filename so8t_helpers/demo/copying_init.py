"""Start weights in which heads can already copy, so that a minute of pre-training teaches what to copy.

From random weights a model of this size sees far too few texts in a minute to find induction: after 300,000
tokens it answers with any name but the one in the text (measured). So the weights start mimetically (Trockman
and Kolter 2023, arXiv:2305.09828) with the circuit that Olsson et al. (2022, arXiv:2209.11895) found in
trained models: the first layer's heads look at the token before, later heads look for tokens that follow one
like the current token, and what a head reads it writes back as it is, for the output matrix to read.

All start weights are large against the learning rate, or AdamW's first steps would wash them out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Phi3ForCausalLM

PREVIOUS_HEADS = (
    6  # of the first layer; they pass on PREVIOUS_HEADS * head_dim directions of the token before
)
POSITION_PAIRS = 6  # fastest rotary pairs: they tell a neighbour from the next but one
POSITION_SCALE = 1.4  # attention logits: 93% of the weight falls on the token before
MATCH_PAIRS = 8  # slowest rotary pairs: they hardly turn over a question's length
MATCH_SCALE = 1.6
CONSTANT = 4.0  # one coordinate that all tokens share; position heads have nothing else to ask with
WRITE_SCALE = 2.0  # what one head writes, against embeddings of variance 1
OUTPUT_SCALE = 0.04


@torch.no_grad()
def start_copying(model: Phi3ForCausalLM) -> None:
    """Overwrite a new model's embeddings, output matrix and attention; draws from the global generator."""
    width = model.config.hidden_size
    heads = model.config.num_attention_heads
    size = width // heads
    embedding, output = model.model.embed_tokens.weight, model.lm_head.weight
    nn.init.normal_(embedding)
    output.copy_(embedding * OUTPUT_SCALE)
    output[:, 0] = 0.0
    embedding[:, 0] = CONSTANT
    passed = directions(PREVIOUS_HEADS * size, width)
    # Where the token before is written: turned away from where the token itself stands.
    turn = torch.zeros(width, width)
    turn[1:, 1:] = torch.linalg.qr(torch.randn(width - 1, width - 1))[0]
    frequencies = model.model.rotary_emb.inv_freq
    for depth, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        query, key, value = attention.qkv_proj.weight.view(3, heads, size, width)
        written = attention.o_proj.weight.view(width, heads, size)
        for head in range(heads):
            if depth == 0 and head < PREVIOUS_HEADS:
                _look_at_previous(query[head], key[head], frequencies)
                read = passed[head * size : (head + 1) * size]
                value[head], written[:, head] = read, turn @ read.T
            elif depth > 0 and head in {2, 3, 4}:
                # Two layers of three heads: between them all the directions that were passed on.
                first = (head - 2 + 3 * (depth == 2)) * size
                read = passed[first : first + size]
                value[head], written[:, head] = read @ turn.T, WRITE_SCALE * read.T
            elif depth > 0:
                read = directions(size, width)
                value[head], written[:, head] = read, WRITE_SCALE * read.T
                if head > 4:
                    _look_for_followers(query[head], key[head], passed, turn)


def directions(count: int, width: int) -> Tensor:
    """Return (count, width): orthonormal rows that leave the shared first coordinate out."""
    rows = torch.zeros(count, width)
    rows[:, 1:] = torch.linalg.qr(torch.randn(width - 1, count))[0].T
    return rows


def _look_at_previous(query: Tensor, key: Tensor, frequencies: Tensor) -> None:
    """Make q and k constants, q one step behind: the rotary angle is then zero at distance 1.

    q, k: (head_dim, width), views that are written; pair f of the rotation is (f, f + head_dim / 2).
    """
    half = len(frequencies)
    query *= 0.05
    key *= 0.05
    for pair, angle in enumerate(frequencies[:POSITION_PAIRS]):
        query[pair, 0] = POSITION_SCALE * torch.cos(angle)
        query[pair + half, 0] = -POSITION_SCALE * torch.sin(angle)
        key[pair, 0] = POSITION_SCALE


def _look_for_followers(query: Tensor, key: Tensor, passed: Tensor, turn: Tensor) -> None:
    """Let q be the token itself and k the token before, in the same few directions: an induction head."""
    half = len(query) // 2
    slow = [row for row in range(2 * half) if row % half >= half - MATCH_PAIRS]
    chosen = passed[torch.randperm(len(passed))[: len(slow)]]
    query.zero_()
    key.zero_()
    query[slow] = MATCH_SCALE * chosen
    key[slow] = MATCH_SCALE * (chosen @ turn.T)
