"""What quantisation costs: perplexity, KL divergence and top-token agreement of a file against F16.

The file's tensors are dequantised and run in float32, which measures exactly the error of the stored
weights. llama.cpp's own kernels also round the activations to 8 bits, so `llama-perplexity` differs in the
third digit (compared in the tests).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Phi3Config

from so8t_helpers.phi3.shape import EMBEDDING, HEAD, TOP, logit_rows
from so8t_helpers.phi3.stream import Read, last_hidden


@dataclass(frozen=True)
class States:
    """A model's last hidden states on the held-out texts, one text after another.

    Attributes:
        hidden: (tokens, d). output: (vocabulary, d).
        scored: (n,) positions whose next token is known and counts.
        targets: (n,) those next tokens.
    """

    hidden: Tensor
    output: Tensor
    scored: Tensor
    targets: Tensor

    def log_probabilities(self, at: Tensor) -> Tensor:
        """Natural-log probabilities of the next token at n positions, (n, vocabulary)."""
        return functional.log_softmax(functional.linear(self.hidden[at], self.output), dim=-1)


def run_texts(
    config: Phi3Config,
    read: Read,
    texts: Sequence[Sequence[int]],
    on_layer: Callable[[], None],
    first_scored: int = 1,
) -> States:
    """Run texts through a model; `first_scored` is the index in each of the first token that counts."""
    hidden = last_hidden(config, read, texts, on_layer)
    device = hidden.device
    ids = torch.tensor([token for text in texts for token in text], device=device)
    places = torch.cat([torch.arange(len(text)) for text in texts]).to(device)
    scored = (places >= first_scored).nonzero()[:, 0] - 1  # whose next token lies in the same text
    output = read(TOP[EMBEDDING if config.tie_word_embeddings else HEAD]).to(device)
    return States(hidden, output, scored, ids[scored + 1])


@torch.no_grad()
def compare(states: States, reference: States) -> dict[str, Any]:
    """Return a model's figures against a reference on the same texts.

    KL divergence is sum p ln(p / q), p the reference's distribution, in nats a token, as in
    `llama-perplexity --kl-divergence`; `top1_agreement` is a share of the positions.
    """
    loss, divergences, agree = 0.0, [], 0
    rows = logit_rows(len(states.output))
    chunks = (tensor.split(rows) for tensor in (states.scored, states.targets))
    for at, targets in zip(*chunks, strict=True):
        q = states.log_probabilities(at)
        loss -= q.gather(1, targets[:, None]).double().sum().item()
        p = reference.log_probabilities(at)
        divergences.append((p.exp().double() * (p - q).double()).sum(-1).cpu())
        agree += int((p.argmax(-1) == q.argmax(-1)).sum())
    count = len(states.scored)
    kl = torch.cat(divergences)
    return {
        "perplexity": math.exp(loss / count),
        "kl_mean": kl.mean().item(),
        "kl_max": kl.max().item(),
        "top1_agreement": agree / count,
        "positions": count,
    }


def take_tokens(texts: Iterable[Sequence[int]], limit: int, longest: int) -> list[list[int]]:
    """Return the first texts that together have at most `limit` tokens, each cut to `longest`."""
    taken, count = [], 0
    for ids in texts:
        if count >= limit:
            break
        cut = list(ids[: min(longest, limit - count)])
        if len(cut) < 2:  # nothing to predict
            continue
        taken.append(cut)
        count += len(cut)
    return taken
