"""How much of a file's error comes from o_proj, and whether the baked rotation helps or hurts there.

The baked weight is W' = W R (see `rotation`). Quantised as it is, o_proj computes Q(W R) x; had the rotation
stayed outside, Q(W) R x. Both stand for one exact product, so their errors can be compared. No importance
matrix enters here: it would have to be another one for each side.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gguf import GGMLQuantizationType
from torch import Tensor
from torch.nn import functional
from transformers import Phi3Config

from so8t_helpers.gguf.quality import States, compare, run_texts
from so8t_helpers.gguf.weights import quantised, rounded_weights
from so8t_helpers.phi3.shape import O_PROJ, gguf_block_name
from so8t_helpers.phi3.stream import Read, last_hidden


@dataclass(frozen=True)
class Study:
    """What both measurements share.

    Attributes:
        blocks: layer -> its baked rotation (d/8, 8, 8); layers without a gate are left out.
        types: file type -> {GGUF name: ggml type}.
    """

    config: Phi3Config
    read: Read
    texts: Sequence[Sequence[int]]
    blocks: Mapping[int, Tensor]
    types: Mapping[str, Mapping[str, GGMLQuantizationType]]
    threads: int
    on_layer: Callable[[], None]

    @property
    def names(self) -> list[str]:
        """Each layer's o_proj by its GGUF name."""
        return [gguf_block_name(layer, O_PROJ) for layer in range(self.config.num_hidden_layers)]


def passes(types: Mapping[str, object], blocks: Mapping[int, Tensor]) -> int:
    """How often all layers are run by `divergences` and `output_errors` together."""
    return 1 + len(types) * (2 if blocks else 1)


def divergences(study: Study, reference: States) -> dict[str, dict[str, float]]:
    """KL divergence of models in which o_proj alone is quantised, in nats a token, by file type.

    "kl_o_proj" is as baked, "kl_o_proj_unrotated" quantised before the rotation, where there are gates.
    """
    names = study.names
    variants: dict[str, dict[str, Tensor]] = {"kl_o_proj": {}}
    if study.blocks:
        variants["kl_o_proj_unrotated"] = {names[layer]: blocks for layer, blocks in study.blocks.items()}
    found: dict[str, dict[str, float]] = {}
    for file, types in study.types.items():
        found[file] = {}
        for key, blocks in variants.items():
            read = rounded_weights(study.read, {name: types[name] for name in names}, study.threads, blocks)
            states = run_texts(study.config, read, study.texts, study.on_layer)
            found[file][key] = compare(states, reference)["kl_mean"]
    return found


def output_errors(study: Study) -> list[dict[str, Any]]:
    """Relative error of each layer's o_proj output on the held-out texts, ||(Q - W') x|| / ||W' x||.

    One row a layer and file type; `unrotated` is None for a layer without a gate.
    """
    squares: dict[str, defaultdict[str, float]] = {}  # weight -> variant -> sum of squared outputs or errors
    products: dict[str, Tensor] = {}  # of the layer at hand: "exact" and what each variant computes with

    def observe(name: str, x: Tensor) -> None:  # x (tokens, d)
        if name not in study.names:
            return
        if name not in squares:
            squares[name] = defaultdict(float)
            products.clear()
            products.update({key: weight.to(x.device) for key, weight in _variants(study, name).items()})
        exact = functional.linear(x, products["exact"])
        for key, weight in products.items():
            error = exact if key == "exact" else functional.linear(x, weight) - exact
            squares[name][key] += error.double().square().sum().item()

    last_hidden(study.config, study.read, study.texts, study.on_layer, observe)

    def relative(name: str, key: str) -> float | None:
        sums = squares[name]
        return (sums[key] / sums["exact"]) ** 0.5 if key in sums else None

    return [
        {"layer": layer, "file": file}
        | {side: relative(name, f"{file} {side}") for side in ("rotated", "unrotated")}
        for layer, name in enumerate(study.names)
        for file in study.types
    ]


def _variants(study: Study, name: str) -> dict[str, Tensor]:
    weight, blocks = study.read(name), study.blocks.get(study.names.index(name))
    found = {"exact": weight}
    for file, types in study.types.items():
        found[f"{file} rotated"] = quantised(weight, types[name], None, study.threads)
        if blocks is not None:
            found[f"{file} unrotated"] = quantised(weight, types[name], blocks, study.threads)
    return found
